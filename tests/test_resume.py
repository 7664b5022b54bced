"""torchrun_ddp.py is killed in all ways, and ends with the weights it always ends with."""

import random
import time

import psutil
import pytest
import torch
from conftest import SCRIPTS, STANDALONE, assert_same_end, load

# About three seconds of training, after about three seconds of starting.
LONG = "--dataset_length 3000 --batch_size 16 --epochs 20"
SAVE = "--snapshot_path snapshot.pt"
RESTARTS = [*STANDALONE, "--max_restarts=3", "torchrun_ddp.py"]


def wait_for_mid_epoch(run, path):
    """Wait until a run has saved a snapshot inside an epoch."""
    run.wait_until(lambda: path.exists() and load(path)["samples"] > 0)


@pytest.mark.timeout(0)
def test_random_kills(request, start, finish, folder, reference):
    """More: `pytest tests -k random_kills --random-kills 100`."""
    for number in range(request.config.getoption("--random-kills")):
        choose = random.Random(number)
        flags = choose.choice([LONG, LONG + " --grad_accum_steps 4 --amp"])
        expected = reference(flags)
        victims = choose.choice(["rank 0", "rank 1", "ranks", "agent", "everything"])
        path = folder / f"{number}.pt"
        # An orphan of the first seconds, while Python still imports, waits for a store
        # that is gone: for up to twice --timeout.
        flags += (
            f" --snapshot_path {path} --save_every {choose.randint(1, 9)} --timeout 9"
        )
        run = start(RESTARTS, flags)
        moment = choose.uniform(0, 8)
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
            finish(RESTARTS, flags)
        try:
            assert_same_end(path, expected)
        except AssertionError as error:
            raise AssertionError(what) from error
        print(what)


def test_a_kill_in_mid_save(start, finish, folder, variant, reference):
    slow = (
        "import os\nsync = os.fsync\nos.fsync = lambda fd: (sync(fd), time.sleep(0.2))"
    )
    run = start(variant("torchrun", slow), f"{LONG} {SAVE}")
    path = folder / "snapshot.pt"
    run.wait_until(lambda: path.exists() and (folder / "snapshot.pt.tmp").exists())
    for process in run.processes():
        process.kill()
    run.wait()
    assert load(path)["epoch"] >= 1
    finish(SCRIPTS["torchrun"], f"{LONG} {SAVE}")
    assert_same_end(path, reference(LONG))


def test_sigterm_to_torchrun(start, finish, folder, reference):
    """What Slurm and Kubernetes send before they take the machine."""
    flags = f"{LONG} {SAVE} --save_every 7"
    path = folder / "snapshot.pt"
    run = start(RESTARTS, flags)
    wait_for_mid_epoch(run, path)
    run.process.terminate()
    assert run.wait(30) != 0 and run.all_gone()
    finish(RESTARTS, flags)
    assert_same_end(path, reference(LONG))
    done = finish(RESTARTS, flags)
    assert "20 epochs and 0 samples done" in done.stdout
    assert "epoch 20/20" not in done.stdout


def test_the_world_size_may_change(start, finish, folder):
    """From 2 to 1 to 3 inside an epoch. test_parts.py counts the samples."""
    path = folder / "snapshot.pt"
    flags = f"--dataset_length 6000 --batch_size 4 --epochs 4 --save_every 7 {SAVE}"
    for ranks in (2, 1):
        command = [*STANDALONE, f"--nproc_per_node={ranks}", "torchrun_ddp.py"]
        run = start(command, flags)
        wait_for_mid_epoch(run, path)
        time.sleep(0.3)
        run.kill_all()
        stopped = load(path)
    run = finish([*STANDALONE, "--nproc_per_node=3", "torchrun_ddp.py"], flags)
    where = f"{stopped['epoch']} epochs and {stopped['samples']} samples done, resuming"
    assert where in run.stdout
    assert load(path)["epoch"] == 4 and load(path)["samples"] == 0


def test_a_kill_during_validation_loses_no_step(start, finish, folder, variant):
    command = variant("torchrun", "script.MyDataset = SlowValidation")
    flags = f"--dataset_length 600 --epochs 2 {SAVE}"
    run = start(command, flags)
    path = folder / "snapshot.pt"
    run.wait_until(path.exists)
    run.kill_all()
    assert "validation" not in run.stdout
    assert load(path)["epoch"] == 1 and load(path)["samples"] == 0
    run = finish(command, flags)
    assert "1 epochs and 0 samples done, resuming" in run.stdout
    assert "epoch 2/2" in run.stdout and "epoch 1/2" not in run.stdout


@pytest.mark.skipif(torch.__version__ < "2.3", reason="a scaler on the CPU is newer")
def test_a_scaler_is_resumed(start, finish, folder, variant):
    """A run in float16 that is killed ends as one that is not, the scale included."""
    flags = "--dataset_length 3000 --batch_size 16 --epochs 9 --amp --snapshot_path"
    # Its scale begins small, and doubles twice in the 846 steps.
    code = """
make_scaler, script.choose_precision = script.make_scaler, float16
def growing(*args):
    scaler = make_scaler(*args)
    scaler.load_state_dict(dict(scaler.state_dict(), scale=4.0, growth_interval=300))
    return scaler
script.make_scaler = growing
"""
    command = variant("torchrun", code)
    run = finish(command, f"{flags} whole.pt")
    assert "backend gloo, float16" in run.stdout
    path = folder / "snapshot.pt"
    run = start(command, f"{flags} snapshot.pt --save_every 7")
    wait_for_mid_epoch(run, path)
    run.kill_all()
    finish(command, f"{flags} snapshot.pt --save_every 7")
    whole = load(folder / "whole.pt")
    assert whole["scaler"]["scale"] == 16
    assert_same_end(path, whole)


def test_all_ranks_compute_in_what_rank_0_chooses(finish, variant):
    code = """
def choose(*_):
    return "float32" if os.environ["RANK"] == "0" else "bfloat16"
script.choose_precision = choose
train_loop = script.train_loop
def note(*args, **options):
    line = f"rank {os.environ['RANK']} computes in {args[5].precision}\\n"
    os.write(1, line.encode())  # at once, so that lines do not mix
    return train_loop(*args, **options)
script.train_loop = note
"""
    run = finish(variant("torchrun", code), "--epochs 1 --amp")
    for rank in (0, 1):
        assert f"rank {rank} computes in float32" in run.stdout
