"""Ranks that die, Ctrl-C, parents that are killed, and the end of a run that went well."""

import os
import signal
import sys
import time

import pytest
from conftest import DDP, STANDALONE, edit, training

LONG = ["--epochs", "1000000"]
FORWARD = "        return self.linear(inputs)"
RAISE = """        if dist.is_initialized() and dist.get_rank() == 1:
            raise ValueError("a mistake in the model")
"""
# Record the names of the threads at the very end, when Python is about to shut down.
RECORD_THREADS = """
import atexit, os
def record():
    if "torch.distributed" in __import__("sys").modules:
        names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
        open(f"threads of {os.getpid()}", "w").writelines(names)
atexit.register(record)
"""


def test_a_killed_rank_ends_the_run(start, command):
    run = start(command + LONG)
    training(run, command)
    rank_1 = run.ranks()[1]
    rank_1.kill()
    assert run.wait(30) == 1
    assert run.all_gone()
    assert (
        "SIGKILL" in run.stderr
        or f"Signal 9 (SIGKILL) received by PID {rank_1.pid}" in run.stderr
    )


def test_an_exception_ends_the_run_with_one_traceback(finish, folder, command):
    script = folder / command[-1]
    edit(script, (FORWARD, RAISE + FORWARD))
    run = finish(command + LONG, 1)
    assert run.stderr.count("ValueError: a mistake in the model") == 1, run.stderr


@pytest.mark.parametrize("to_all", [False, True], ids=["to the parent", "to all"])
def test_ctrl_c(start, command, to_all):
    """A terminal sends Ctrl-C to all processes of the command; kill -INT, to one."""
    run = start(command + LONG)
    training(run, command)
    if to_all:
        os.killpg(run.process.pid, signal.SIGINT)
    else:
        run.process.send_signal(signal.SIGINT)
    code = run.wait(60)
    assert run.all_gone()
    if command == DDP:
        assert code == 130 and run.stderr == ""
    else:
        # torchrun has an exit code and a traceback of its own; the ranks add nothing.
        assert code != 0 and "KeyboardInterrupt" not in run.stderr


def test_ctrl_c_while_the_processes_start(start):
    run = start(DDP)
    run.wait_for("Normal training:")
    time.sleep(0.5)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.wait(30) == 130
    assert run.all_gone() and run.stderr == ""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_parent_leaves_no_process(start, command, how):
    run = start(command + LONG + ["--num_workers", "1"])
    training(run, command)
    run.process.send_signal(how)
    run.wait(30)
    assert run.all_gone(), f"left behind: {run.processes()}"


def test_two_runs_at_the_same_moment(start):
    runs = [start(DDP), start(DDP)]
    assert [run.wait() for run in runs] == [0, 0], runs[0].stderr + runs[1].stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_no_thread_of_gloo_outlives_the_process_group(finish, folder, command):
    """Such a thread is what aborts a process in its last moment, now and then."""
    (folder / "sitecustomize.py").write_text(RECORD_THREADS)
    flags = ["--backend", "gloo", "--epochs", "1"]
    finish(command + flags, env={"PYTHONPATH": str(folder)})
    files = list(folder.glob("threads of *"))
    assert len(files) >= 2
    for file in files:
        assert "gloo" not in file.read_text()


def test_clean_exits(request, finish, folder):
    """Hand-run: `pytest tests -k clean_exits --clean-exits 100`."""
    times = request.config.getoption("--clean-exits")
    if not times:
        pytest.skip("runs by hand, with --clean-exits N")
    for _ in range(times):
        for command in (DDP, STANDALONE):
            finish(command + ["--epochs", "2"])
