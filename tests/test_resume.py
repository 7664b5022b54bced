"""torchrun_ddp.py is killed in all ways, and ends with the weights it always ends with."""

import random
import time

import psutil
import pytest
import torch
from conftest import SCRIPTS, STANDALONE, assert_same_end, epoch_lines, load

# About two seconds of training, after about three seconds of starting.
LONG = "--dataset_length 3000 --batch_size 16 --epochs 12"
SAVE = "--snapshot_path snapshot.pt"
RESTARTS = [*STANDALONE, "--max_restarts=3", "torchrun_ddp.py"]
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# What is not a matter of processes: trainings that end after some steps.
FLAGS = "--dataset_length 3000 --batch_size {} --epochs {}"
RANKS = {"run": "train", "flags": FLAGS.format(4, 2)}
RANKS["args"] = {"snapshot_path": "ranks.pt", "save_every": 7}
VALIDATION = {"run": "train", "flags": "--epochs 2"}
VALIDATION["args"] = {"snapshot_path": "validation.pt"}
ALL = {"run": "train", "make_scheduler": "one_cycle", "make_optimizer": "groups"}
ALL["compute_loss"] = "overflows_now_and_then"
ALL["flags"] = f"{FLAGS.format(16, 7)} --max_grad_norm 0.05 --precision float16"
ALL["args"] = {"snapshot_path": "stopped.pt", "save_every": 7}


def stopped(case, steps):
    return {**case, "run": "interrupted", "args": {**case["args"], "steps": steps}}


CASES = {
    2: {
        "fewer ranks": stopped(RANKS, 20),
        "in validation": {**VALIDATION, "evaluate": "killed"},
        "after validation": VALIDATION,
        "all": {**ALL, "args": {"snapshot_path": "whole.pt"}},
        "all, stopped": stopped(ALL, 3 * 93 + 23),
        "all, resumed": ALL,
    },
    3: {"more ranks": {**RANKS, "MyDataset": "ResumedSamples"}},
}


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


def test_the_world_size_may_change(results):
    """From 2 to 3 inside an epoch: less than a global batch is read twice, or not at all."""
    (resumes, *epochs) = results[3]["more ranks"]
    # Saved after 14 of 375 steps, of 8 samples.
    assert resumes == "ranks.pt: 0 epochs and 112 samples done, resuming"
    assert len(epoch_lines("\n".join(epochs))) == 2
    snapshot = load(results["folder"] / "ranks.pt")
    assert snapshot["epoch"] == 2 and snapshot["samples"] == 0
    # The epoch's order, whose first 112 samples two ranks have read.
    generator = torch.Generator().manual_seed(0)
    done = torch.randperm(3000, generator=generator)[:112].tolist()
    rest = []
    for rank in range(3):
        lines = (results["folder"] / f"resumed samples of rank {rank}").read_text()
        read = [int(index) for index in lines.split()[::2]]
        rest += read[8 : len(read) - 1000]  # without check_data's, and the next epoch's
    assert len(set(rest)) == len(rest) and len(set(rest) & set(done)) < 12
    assert len(set(rest + done)) > 3000 - 12


def test_a_kill_during_validation_loses_no_step(results):
    assert "epoch 1/2" in results[2]["in validation"][-1]
    resumes, epoch, *_ = results[2]["after validation"]
    assert resumes == "validation.pt: 1 epochs and 0 samples done, resuming"
    assert epoch.startswith("epoch 2/2")


def test_all_that_a_step_needs_is_resumed(results):
    """A schedule, clipping, groups, and float16's scale, which overflows make smaller."""
    resumes = results[2]["all, resumed"][0]
    assert resumes == "stopped.pt: 3 epochs and 672 samples done, resuming"
    whole = load(results["folder"] / "whole.pt")
    assert len(whole["optimizer"]["param_groups"]) == 2
    assert 1 <= whole["scaler"]["scale"] < 2**15
    assert whole["scheduler"]["last_epoch"] == 7 * 93  # steps
    assert_same_end(results["folder"] / "stopped.pt", whole)
