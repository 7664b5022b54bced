"""torchrun_ddp.py is killed in all ways, and ends with the weights it always ends with."""

import random
import time

import psutil
import pytest
from conftest import SCRIPTS, STANDALONE, assert_same_end, load

# About two seconds of training, after about three seconds of starting.
LONG = "--dataset_length 3000 --batch_size 16 --epochs 12"
SAVE = "--snapshot_path snapshot.pt"
RESTARTS = [*STANDALONE, "--max_restarts=3", "torchrun_ddp.py"]
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def wait_for_mid_epoch(run, path):
    """Wait until a run has saved a snapshot inside an epoch."""
    run.wait_until(lambda: path.exists() and load(path)["samples"] > 0)


@pytest.mark.timeout(0)
def test_random_kills(request, start, finish, folder, reference):
    """More: `pytest tests -k random_kills --random-kills 100`."""
    for number in range(request.config.getoption("--random-kills")):
        choose = random.Random(number)
        flags = choose.choice(
            [LONG, LONG + " --grad_accum_steps 4 --precision bfloat16"]
        )
        expected = reference(flags)
        victims = choose.choice(["rank 0", "rank 1", "ranks", "agent", "everything"])
        path = folder / f"{number}.pt"
        # An orphan of the first seconds, while Python still imports, waits for a store
        # that is gone: for up to twice --timeout.
        flags += (
            f" --snapshot_path {path} --save_every {choose.randint(1, 9)} --timeout 9"
        )
        run = start(RESTARTS, flags, OWN_STORE)
        moment = choose.uniform(0, 7)
        time.sleep(moment)
        what = f"kill {number}: {victims} after {moment:.2f} seconds, {flags}"
        ranks = run.ranks()
        chosen = {"rank 0": ranks[:1], "rank 1": ranks[1:], "ranks": ranks}
        chosen["agent"] = [psutil.Process(run.process.pid)]
        chosen["everything"] = chosen["agent"] + ranks
        for process in chosen[victims]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass  # it had ended by then
        code = run.wait(60)
        assert run.all_gone(40), f"{what}: {run.processes()}"
        if path.exists():
            load(path)  # readable, whatever happened
        if code != 0:
            assert victims in ("agent", "everything"), what + run.stderr
            finish(RESTARTS, flags, env=OWN_STORE)
        try:
            assert_same_end(path, expected)
        except AssertionError as error:
            raise AssertionError(what) from error
        print(what)


def test_a_kill_in_mid_save(start, folder, define):
    slow = "import os, time\nsync = os.fsync\n"
    slow += "os.fsync = lambda fd: (sync(fd), time.sleep(0.2))\n"
    slow += "from torchrun_ddp import MyModel"
    run = start(SCRIPTS["torchrun"], f"{LONG} {SAVE} {define({}, slow)}")
    path = folder / "snapshot.pt"
    run.wait_until(lambda: path.exists() and (folder / "snapshot.pt.tmp").exists())
    for process in run.processes():
        process.kill()
    run.wait()
    assert load(path)["epoch"] >= 1


def test_sigterm_to_torchrun(start, finish, folder, reference):
    """What Slurm and Kubernetes send before they take the machine."""
    flags = f"{LONG} {SAVE} --save_every 7"
    path = folder / "snapshot.pt"
    run = start(RESTARTS, flags, OWN_STORE)
    wait_for_mid_epoch(run, path)
    run.process.terminate()
    assert run.wait(30) != 0 and run.all_gone()
    finish(RESTARTS, flags, env=OWN_STORE)
    assert_same_end(path, reference(LONG))


def test_the_world_size_may_change(start, finish, folder):
    """From 2 to 3 inside an epoch. test_parts.py counts the samples."""
    path = folder / "snapshot.pt"
    flags = f"--dataset_length 3000 --batch_size 4 --epochs 3 --save_every 7 {SAVE}"
    run = start(SCRIPTS["torchrun"], flags)
    wait_for_mid_epoch(run, path)
    time.sleep(0.3)
    run.kill_all()
    stopped = load(path)
    run = finish([*STANDALONE, "--nproc_per_node=3", "torchrun_ddp.py"], flags)
    where = f"{stopped['epoch']} epochs and {stopped['samples']} samples done, resuming"
    assert where in run.stdout
    assert load(path)["epoch"] == 3 and load(path)["samples"] == 0


def test_a_kill_during_validation_loses_no_step(start, finish, folder, define):
    flags = f"--dataset_length 600 --epochs 2 {SAVE} "
    flags += define({"MyDataset": "SlowValidation"})
    run = start(SCRIPTS["torchrun"], flags)
    path = folder / "snapshot.pt"
    run.wait_until(path.exists)
    run.kill_all()
    assert "validation" not in run.stdout
    assert load(path)["epoch"] == 1 and load(path)["samples"] == 0
    run = finish(SCRIPTS["torchrun"], flags)
    assert "1 epochs and 0 samples done, resuming" in run.stdout
    assert "epoch 2/2" in run.stdout and "epoch 1/2" not in run.stdout


def test_all_that_a_step_needs_is_resumed(start, finish, folder, define):
    """A schedule, clipping, groups, and float16's scale, which overflows make smaller."""
    job = {"make_scheduler": "one_cycle", "make_optimizer": "groups"}
    job["compute_loss"] = "overflows_now_and_then"
    flags = "--dataset_length 3000 --batch_size 16 --epochs 7 --max_grad_norm 0.05"
    flags += f" --precision float16 {define(job)} --snapshot_path"
    run = finish(SCRIPTS["torchrun"], f"{flags} whole.pt")
    assert "backend gloo, float16" in run.stdout
    path = folder / "snapshot.pt"
    run = start(SCRIPTS["torchrun"], f"{flags} snapshot.pt --save_every 7")
    wait_for_mid_epoch(run, path)
    run.kill_all()
    stopped = load(path)
    run = finish(SCRIPTS["torchrun"], f"{flags} snapshot.pt --save_every 7")
    assert ", resuming" in run.stdout
    whole = load(folder / "whole.pt")
    assert len(whole["optimizer"]["param_groups"]) == 2
    assert 1 <= whole["scaler"]["scale"] < 2**15
    assert 0 < stopped["scheduler"]["last_epoch"] < whole["scheduler"]["last_epoch"]
    assert whole["scheduler"]["last_epoch"] == 7 * 93  # steps
    assert_same_end(path, whole)
