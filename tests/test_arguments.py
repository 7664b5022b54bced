"""Bad input is refused with exit code 2 and its reason, before anything is started."""

import socket
import sys

import pytest
import torch
from conftest import SCRIPTS

import ddp
import torchrun_ddp

BAD_FLAGS = [
    ("--epochs 0", "--epochs must be finite, and at least 1"),
    ("--epochs 1.5", "--epochs: invalid int value: '1.5'"),
    ("--epochs", "--epochs: expected one argument"),
    ("--batch_size -1", "--batch_size"),
    ("--input_size many", "--input_size"),
    ("--dataset_length 0", "--dataset_length"),
    ("--learning_rate nan", "--learning_rate"),
    ("--learning_rate -0.1", "--learning_rate"),
    ("--learning_rate inf", "--learning_rate"),
    ("--seed -1", "--seed"),
    ("--num_workers -1", "--num_workers"),
    ("--grad_accum_steps 0", "--grad_accum_steps"),
    ("--timeout 0", "--timeout"),
    ("--max_grad_norm -1", "--max_grad_norm must be finite, and at least 0"),
    ("--precision half", "--precision: invalid choice: 'half'"),
    ("--definitions no.py", "no.py is not a file with a name like mine.py"),
    ("--definitions ddp.py.bak", "is not a file with a name like mine.py"),
    ("--backend mpi", "--backend: invalid choice: 'mpi'"),
    ("--nonsense", "--nonsense"),
]


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Let a script parse flags that it refuses; return what it says on stderr."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # device_count() alone may count GPUs that an old driver cannot use.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    def refuse(script, flags):
        monkeypatch.setattr("sys.argv", ["script.py", *flags.split()])
        with pytest.raises(SystemExit) as error:
            script.parse_args()
            if script is ddp:
                script.open_store()
        assert error.value.code == 2
        return capsys.readouterr().err

    return refuse


@pytest.mark.parametrize("flags, says", BAD_FLAGS)
@pytest.mark.parametrize("script", [ddp, torchrun_ddp], ids=["ddp", "torchrun"])
def test_a_bad_flag(refuse, monkeypatch, script, flags, says):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert says in refuse(script, flags)


@pytest.mark.parametrize("script", [ddp, torchrun_ddp], ids=["ddp", "torchrun"])
def test_definitions_that_python_cannot_import(refuse, tmp_path, script):
    for name in ("mine.v2.py", "mine"):
        (tmp_path / name).write_text("MyModel = None")
        says = refuse(script, f"--definitions {tmp_path}/{name}")
        assert f"{name} is not a file with a name like mine.py" in says


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--world_size 0", "--world_size must be finite, and at least 1"),
        ("--world_size two", "--world_size"),
    ],
)
def test_a_bad_flag_of_ddp(refuse, flags, says):
    assert says in refuse(ddp, flags)


def test_bad_flags_of_torchrun_ddp(refuse, monkeypatch):
    assert "start this script with torchrun" in refuse(torchrun_ddp, "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    says = refuse(torchrun_ddp, "--save_every 5")
    assert "--save_every needs --snapshot_path" in says
    assert "--save_every" in refuse(torchrun_ddp, "--snapshot_path a --save_every -1")


def test_nccl_needs_a_gpu_for_each_process(refuse, monkeypatch):
    """Unless NCCL is told to allow it."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    says = "--backend nccl needs a GPU for each process, and there are {}"
    for script in (ddp, torchrun_ddp):  # device_count() is 8, but not one can be used
        assert says.format(0) in refuse(script, "--backend nccl")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert says.format(2) in refuse(ddp, "--backend nccl --world_size 3")
    assert says.format(2) in refuse(torchrun_ddp, "--backend nccl")

    monkeypatch.setattr("sys.argv", ["script.py", "--backend", "nccl"])
    assert ddp.parse_args().world_size == 2  # by default, one process per GPU
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    torchrun_ddp.parse_args()
    monkeypatch.delenv("NCCL_MULTI_RANK_GPU_ENABLE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    torchrun_ddp.parse_args()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr("sys.argv", ["script.py", "--backend", "gloo"])
    torchrun_ddp.parse_args()


def test_restarts_need_a_store_of_their_own(refuse, monkeypatch):
    """Of what torchrun sets: see test_faults.py for the real thing."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in refuse(torchrun_ddp, "")
    monkeypatch.setattr("sys.argv", ["script.py"])
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    torchrun_ddp.parse_args()


# 192.0.2.1 is an address that is kept for examples: no machine has it.
@pytest.mark.parametrize(
    "address, port, says",
    [
        ("localhost", "abc", "MASTER_PORT=abc: invalid literal"),
        ("localhost", "70000", "MASTER_PORT=70000: "),
        ("localhost", "-1", "MASTER_PORT=-1: "),
        ("no-such-host.invalid", "0", "MASTER_ADDR=no-such-host.invalid "),
        ("192.0.2.1", "0", "Cannot assign requested address"),
        ("a..b", "0", "MASTER_ADDR=a..b "),
        ("localhost", "busy", "Address already in use"),
    ],
)
def test_an_address_where_no_store_can_be(refuse, monkeypatch, address, port, says):
    with socket.create_server(("localhost", 0)) as server:
        port = port.replace("busy", str(server.getsockname()[1]))
        monkeypatch.setenv("MASTER_ADDR", address)
        monkeypatch.setenv("MASTER_PORT", port)
        assert says in refuse(ddp, "")


def test_the_store_takes_the_port_that_is_set_and_else_any(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for _ in range(2):
        monkeypatch.delenv("MASTER_PORT", raising=False)
        assert ddp.open_store().port > 0
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert ddp.open_store().port == port


def test_the_store_listens_on_its_address_only(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    store = ddp.open_store()
    socket.create_connection(("127.0.0.1", store.port), timeout=5).close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5)


@pytest.mark.parametrize(
    "text, says", [(b"\xff\xfeA", "'utf-8' codec can't decode"), (b"", "abc: invalid")]
)
def test_the_env_file_of_the_scripts_own_folder(finish, folder, text, says):
    """Not one of a folder above, where MASTER_PORT would be 7; UTF-16 is refused."""
    place = folder / "place"
    place.mkdir()
    (folder / ".env").write_text("MASTER_PORT=7\nCUDA_VISIBLE_DEVICES=9\n")
    (place / ".env").write_bytes(text or b"MASTER_PORT=abc\n")
    (folder / "ddp.py").rename(place / "ddp.py")
    run = finish([sys.executable, "place/ddp.py"], code=2)
    assert says in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_started(finish, folder, name):
    """Python runs a module of this name at every start: it counts the processes."""
    count = "import os\nwith open('starts', 'a') as file:\n    file.write('.')\n"
    (folder / "sitecustomize.py").write_text(count)
    (folder / ".env").write_text("MASTER_PORT=from-the-file\n")
    command = SCRIPTS[name] if name == "ddp" else [sys.executable, "torchrun_ddp.py"]
    run = finish(command, code=2, env={"PYTHONPATH": str(folder)})
    assert run.stdout == "" and "error: " in run.stderr.splitlines()[-1]
    assert (folder / "starts").read_text() == "."
    assert name != "ddp" or "MASTER_PORT=from-the-file" in run.stderr
