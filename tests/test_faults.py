"""Ranks that die or hang, Ctrl-C, parents that are killed, and an end in good order."""

import os
import re
import signal
import socket
import sys
import time

import pytest
import torch
from conftest import SCRIPTS, TORCHRUN, epoch_lines, side_by_side

LONG = "--epochs 1000000 --dataset_length 2000"
both = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture
def training(start):
    """Start a script, with epochs without end; return it when it trains with DDP."""

    def training(name, flags=""):
        run = start(SCRIPTS[name], f"{LONG} {flags}")
        lines = {"ddp": side_by_side, "torchrun": epoch_lines}[name]
        run.wait_until(lambda: len(lines(run.stdout)) >= 6)
        return run

    return training


@both
def test_a_killed_rank_ends_the_run(training, name):
    run = training(name)
    run.ranks()[1].kill()
    assert run.wait(30) == 1 and run.all_gone()
    assert "SIGKILL" in run.stderr


@both
def test_an_exception_ends_the_run_and_is_shown(finish, define, name):
    flags = f"{LONG} {define({'MyModel': 'FailingModel'})}"
    run = finish(SCRIPTS[name], flags, code=1)
    assert "ValueError: a mistake in the model" in run.stderr
    assert not epoch_lines(run.stdout) and not side_by_side(run.stdout)


@pytest.mark.parametrize("when", ["starting", "training"])
def test_ctrl_c_ends_ddp_quietly(start, training, when):
    """A terminal sends Ctrl-C to all processes of the command."""
    if when == "training":
        run = training("ddp")
    else:
        run = start(SCRIPTS["ddp"])
        run.wait_for("PyTorch")
        time.sleep(0.5)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait(30) == 130
    assert run.all_gone() and run.stderr == ""


def test_ctrl_c_ends_torchrun(training):
    run = training("torchrun")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait(60) != 0 and run.all_gone()


@pytest.mark.parametrize(
    "name, how",
    [
        ("ddp", signal.SIGTERM),
        ("ddp", signal.SIGKILL),
        ("torchrun", signal.SIGKILL),
    ],
)
def test_a_killed_parent_leaves_no_process(training, name, how):
    run = training(name, "--num_workers 1" if how == signal.SIGKILL else "")
    run.process.send_signal(how)
    run.wait(30)
    assert run.all_gone(), f"left behind: {run.processes()}"


@both
def test_a_stuck_rank_ends_the_run(training, name):
    run = training(name, "--timeout 5")
    stuck = run.ranks()[1]
    stuck.suspend()
    run.wait_until(lambda: len(run.ranks()) < 2)
    stuck.send_signal(signal.SIGCONT)  # or torchrun waits 30 seconds to kill it
    assert run.wait(60) == 1 and run.all_gone()
    assert "Timed out" in run.stderr or "timed out" in run.stderr


def test_a_normal_epoch_may_take_longer_than_the_timeout(finish, define):
    """The other ranks wait at the store, which has no part in --timeout."""
    flags = "--timeout 2 --epochs 1 --dataset_length 5500 --batch_size 100 "
    flags += define({"MyDataset": "SlowSamples"})
    run = finish(SCRIPTS["ddp"], flags)
    progress = r"^  batch \d+/\d+  loss of rank 0 [\d.]+  [\d,.]+ samples/s$"
    assert re.search(progress, run.stdout, re.MULTILINE)  # after five seconds
    # Two processes sleep half as long each: faster, however busy the machine.
    assert side_by_side(run.stdout)[0][-1] > 1.3


def test_restarts_with_torchruns_own_store_are_refused(finish):
    """Its store survives a restart, with addresses of dead ranks."""
    static = ["--nproc_per_node=2", "--node_rank=0", "--master_addr=127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        static.append(f"--master_port={server.getsockname()[1]}")
    shares = torch.__version__ >= "2.5"  # before, only the static launch
    for launch in [["--standalone", "--nproc_per_node=2"]] * shares + [static]:
        command = [*TORCHRUN, *launch, "--max_restarts=1", "torchrun_ddp.py"]
        run = finish(command, code=1)
        assert "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in run.stderr
        assert "epoch" not in run.stdout


def test_a_restart_with_a_store_of_its_own(start, folder, define):
    """It is not counted in vain: one restart is enough."""
    launch = "--standalone --nproc_per_node=2 --max_restarts=1 torchrun_ddp.py"
    flags = "--epochs 60 --dataset_length 6000 --snapshot_path snapshot.pt --timeout 20"
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = start([*TORCHRUN, *launch.split()], flags, own_store)
    run.wait_for("epoch 3/")
    run.ranks()[1].kill()
    assert run.wait() == 0, run.stderr
    assert ", resuming" in run.stdout


def test_two_runs_at_the_same_moment(start):
    runs = [start(SCRIPTS["ddp"], "--epochs 1") for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr


@both
def test_clean_exits(request, finish, folder, define, name):
    """No thread of Gloo is left at the end: it is what aborts a process now and then.

    Not even if something refers to the DDP model until the garbage is collected.

    More: `pytest tests -k clean_exits --clean-exits 50`.
    """
    record = """
import atexit, os, sys
def record():
    if "torch.distributed" in sys.modules:
        threads = os.listdir("/proc/self/task")
        names = [open(f"/proc/self/task/{thread}/comm").read() for thread in threads]
        with open(f"threads of {os.getpid()}", "w") as file:
            file.writelines(names)
atexit.register(record)
"""
    if sys.platform == "linux":
        (folder / "sitecustomize.py").write_text(record)
    env = {"PYTHONPATH": str(folder)}
    cyclic = define({}, "from models import CyclicDDP as wrap")
    times = request.config.getoption("--clean-exits")
    for flags in [cyclic] + [""] * times:
        run = finish(
            SCRIPTS[name], f"--epochs 1 --dataset_length 1000 {flags}", env=env
        )
        assert run.stderr == "" or "master_addr is" in run.stderr
    files = list(folder.glob("threads of *"))
    assert len(files) >= 2 or sys.platform != "linux"
    assert all("gloo" not in file.read_text() for file in files)
