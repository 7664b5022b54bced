"""Ranks that die or hang, Ctrl-C, parents that are killed, and an end in good order."""

import os
import signal
import socket
import sys
import time
from contextlib import suppress

import psutil
import pytest
import torch
from conftest import SCRIPTS, TORCHRUN, both_ways, epoch_lines

LONG = "--epochs 1000000 --dataset_length 2000"
both = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture
def training(start):
    """Start a script, with epochs without end; return it when it trains with DDP."""

    def training(name, flags=""):
        run = start(SCRIPTS[name], f"{LONG} {flags}")
        lines = {"ddp": both_ways, "torchrun": epoch_lines}[name]
        run.wait_until(lambda: len(lines(run.stdout)) >= 2)
        return run

    return training


def test_a_killed_rank_ends_the_run(training):
    """For torchrun, see test_restarts_with_a_store_of_their_own."""
    run = training("ddp")
    run.ranks()[1].kill()
    assert run.wait(30) == 1 and run.all_gone()
    assert "SIGKILL" in run.stderr


@both
def test_an_exception_ends_the_run_and_is_shown(finish, define, name):
    flags = f"{LONG} {define({'MyModel': 'FailingModel'})}"
    run = finish(SCRIPTS[name], flags, code=1)
    assert "ValueError: a mistake in the model" in run.stderr
    assert not epoch_lines(run.stdout) and not both_ways(run.stdout)


@pytest.mark.parametrize("when", ["starting", "training"])
def test_ctrl_c_ends_ddp_quietly(start, training, when):
    """A terminal sends Ctrl-C to all processes of the command.

    While processes are being started, one of them may print that it got no arguments.
    """
    if when == "training":
        runs = [training("ddp")]
    else:
        runs = [start(SCRIPTS["ddp"], LONG) for _ in range(4)]
    for number, run in enumerate(runs):
        run.wait_for("PyTorch")
        time.sleep(0.15 * number)
        os.killpg(run.process.pid, signal.SIGINT)
    for run in runs:
        assert run.wait(30) == 130 and run.all_gone()
        assert run.stderr == "" or "Ran out of input" in run.stderr
    assert runs[-1].stderr == ""


def test_ctrl_c_ends_torchrun(training):
    run = training("torchrun")
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait(60) != 0 and run.all_gone()


@both
def test_a_killed_parent_leaves_no_process(training, name):
    """Not even workers, if they are forked: others watch the forkserver, not the rank."""
    forks = torch.multiprocessing.get_start_method() == "fork"
    run = training(name, "--num_workers 1" if forks else "")
    run.process.kill()
    run.wait(30)
    assert run.all_gone(), f"left behind: {run.processes()}"


def test_a_stuck_rank_ends_the_run(training, start, define):
    """In ddp.py, while the rank waits for rank 0, which is training normally."""
    slow = f"{LONG} --timeout 5 {define({'MyDataset': 'SlowSamples'})}"
    runs = [training("torchrun", "--timeout 5"), start(SCRIPTS["ddp"], slow)]
    runs[1].wait_for("DDP is right")
    time.sleep(0.5)  # a normal epoch takes 2 seconds, and comes first
    stuck_ranks = [run.ranks()[1] for run in runs]
    for stuck in stuck_ranks:
        stuck.suspend()
    for run, stuck in zip(runs, stuck_ranks):
        run.wait_until(lambda run=run: len(run.ranks()) < 2)
        with suppress(psutil.NoSuchProcess):  # it may have been killed by now
            stuck.send_signal(signal.SIGCONT)  # or torchrun waits 30 seconds to do it
    for run in runs:
        assert run.wait(60) == 1 and run.all_gone()
        assert "imed out" in run.stderr, run.stderr


def test_a_normal_epoch_may_take_longer_than_the_timeout(finish, define):
    """The other ranks wait at the store, which has no part in --timeout."""
    flags = "--timeout 2 --epochs 1 --dataset_length 3000 --batch_size 100 "
    flags += define({"MyDataset": "SlowSamples"})
    run = finish(SCRIPTS["ddp"], flags)
    # Two processes sleep half as long each: faster, however busy the machine.
    ((normal, ddp),) = both_ways(run.stdout)
    assert ddp["rate"] > 1.3 * normal["rate"]


def test_restarts_with_torchruns_own_store_are_refused(start):
    """Its store survives a restart, with addresses of dead ranks."""
    static = ["--nproc_per_node=2", "--node_rank=0", "--master_addr=127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        static.append(f"--master_port={server.getsockname()[1]}")
    shares = torch.__version__ >= "2.5"  # before, only the static launch
    launches = [["--standalone", "--nproc_per_node=2"]] * shares + [static]
    last = ["--max_restarts=1", "torchrun_ddp.py"]
    for run in [start([*TORCHRUN, *launch, *last]) for launch in launches]:
        assert run.wait() == 1 and run.all_gone()
        assert "needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in run.stderr
        assert "epoch" not in run.stdout


def test_restarts_with_a_store_of_their_own(start):
    """None is counted in vain, and without any left, a killed rank ends the run."""
    launch = "--standalone --nproc_per_node=2 --max_restarts=1 torchrun_ddp.py"
    flags = f"{LONG} --snapshot_path snapshot.pt --timeout 20"
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = start([*TORCHRUN, *launch.split()], flags, own_store)
    run.wait_until(lambda: len(epoch_lines(run.stdout)) >= 2)
    run.ranks()[1].kill()
    run.wait_for("resuming after ")
    run.wait_until(lambda: "\nepoch " in run.stdout.partition("resuming")[2])
    run.ranks()[1].kill()
    assert run.wait(30) == 1 and run.all_gone()
    assert "SIGKILL" in run.stderr


@pytest.mark.timeout(0)
@both
def test_clean_exits(request, start, finish, folder, define, name):
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
    cyclic = define({}, "from models import CyclicDDP as wrap_in_ddp")
    command = SCRIPTS[name], f"--epochs 1 --dataset_length 1000 {cyclic}", env
    runs = [start(*command) for _ in range(2)]  # at once: each finds a free port
    for run in runs:
        assert run.wait() == 0 and run.all_gone(), run.stderr
    for _ in range(request.config.getoption("--clean-exits")):
        runs.append(finish(SCRIPTS[name], "--epochs 1 --dataset_length 1000", env=env))
    assert all(run.stderr == "" or "master_addr is" in run.stderr for run in runs)
    files = list(folder.glob("threads of *"))
    assert len(files) >= 2 or sys.platform != "linux"
    assert all("gloo" not in file.read_text() for file in files)
