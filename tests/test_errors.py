"""Bad input is one line on stderr and exit code 2, before anything is started."""

import re
import socket
import sys

import pytest
from conftest import DDP, STANDALONE

# Python runs a module of this name at every start: it counts the processes.
COUNT_STARTS = """
import os
with open("starts", "a") as file:
    file.write(f"{os.getpid()}\\n")
"""


@pytest.fixture
def refuse(finish, folder):
    """Run a command that is refused, and return its one line."""
    (folder / "sitecustomize.py").write_text(COUNT_STARTS)

    def refuse(command, env=None):
        run = finish(command, 2, dict(env or {}, PYTHONPATH=str(folder)))
        assert run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
        assert (folder / "starts").read_text().count("\n") == 1, "started a process"
        return run.stderr

    return refuse


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--epochs 0", "--epochs: '0' is not a whole number from 1 to"),
        ("--epochs 1.5", "--epochs"),
        ("--batch_size -1", "--batch_size"),
        ("--batch-size 0", "--batch_size"),
        ("--input_size many", "--input_size"),
        ("--dataset_length 99999999999999999999", "--dataset_length"),
        ("--dataset_length 100000000 --input_size 1000", "--dataset_length times"),
        ("--learning_rate 0", "--learning_rate"),
        ("--learning_rate nan", "--learning_rate"),
        ("--learning_rate 1e30", "--learning_rate"),
        ("--seed -1", "--seed"),
        ("--num_workers 1000", "--num_workers"),
        ("--grad_accum_steps 0", "--grad_accum_steps"),
        ("--timeout 0", "--timeout"),
        ("--timeout inf", "--timeout"),
        ("--world_size 0", "--world_size"),
        ("--world_size 100000", "--world_size"),
        ("--backend mpi", "--backend: invalid choice: 'mpi'"),
        ("--epochs", "--epochs: expected one argument"),
        ("--nonsense", "--nonsense"),
    ],
)
def test_a_bad_flag(refuse, flags, says):
    assert says in refuse(DDP + flags.split())


def test_nccl_without_a_gpu(refuse):
    line = refuse(DDP + ["--backend", "nccl"])
    assert "--backend: nccl needs a CUDA GPU" in line and "--backend gloo" in line


@pytest.mark.parametrize("port", ["abc", "70000", "-1", "0", "1e3"])
def test_a_bad_port(refuse, port):
    assert f"MASTER_PORT={port} is not a number from 1 to" in refuse(
        DDP, {"MASTER_PORT": port}
    )


# 192.0.2.1 is an address that is kept for examples: no machine has it.
@pytest.mark.parametrize("address", ["no-such-host.invalid", "192.0.2.1", "a..b"])
def test_an_address_that_is_not_ours(refuse, address):
    assert f"MASTER_ADDR={address} is not" in refuse(DDP, {"MASTER_ADDR": address})


def test_a_busy_port(refuse):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        line = refuse(DDP, {"MASTER_PORT": str(port)})
    assert f"MASTER_PORT={port} cannot be used: Address already in use" in line


def test_dotenv_is_read_and_the_environment_wins(refuse, finish, folder):
    (folder / ".env").write_text("MASTER_ADDR=localhost\nMASTER_PORT=from-the-file\n")
    assert "MASTER_PORT=from-the-file is not" in refuse(DDP)
    with socket.create_server(("localhost", 0)) as server:
        free = str(server.getsockname()[1])
    assert " yes " in finish(DDP, env={"MASTER_PORT": free}).stdout


def test_without_torchrun(refuse):
    line = refuse([sys.executable, "torchrun_ddp.py"])
    assert "torchrun --standalone --nproc_per_node=2 torchrun_ddp.py" in line


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--epochs 0", "--epochs: '0' is not a whole number from 1 to"),
        ("--backend nccl", "--backend: nccl needs a CUDA GPU"),
    ],
)
def test_under_torchrun_the_line_appears_once(finish, flags, says):
    # torchrun reports a failed rank with exit code 1, whatever the rank's own was.
    run = finish(STANDALONE + flags.split(), 1)
    assert (
        len(re.findall(r"^torchrun_ddp.py: error: .*$", run.stderr, re.MULTILINE)) == 1
    )
    assert says in run.stderr and re.search(r"exitcode  : 2 ", run.stderr)


def test_ddp_under_torchrun(finish):
    run = finish(STANDALONE[:-1] + ["ddp.py"], 1)
    assert run.stderr.count("run it as: python ddp.py") == 1
