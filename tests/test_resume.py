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
# A schedule, clipping, groups, BatchNorm, and float16's scale.
ALL = {"run": "train", "make_scheduler": "one_cycle", "make_optimizer": "groups"}
ALL.update(MyDataset="Images", MyModel="BatchNormCNN")
ALL["compute_loss"] = "overflows_now_and_then"
ALL["flags"] = f"{FLAGS.format(16, 7)} --max_grad_norm 0.05 --precision float16"
ALL["flags"] = ALL["flags"].replace("3000", "600")
ALL["args"] = {"snapshot_path": "stopped.pt", "save_every": 7}
# Schedules of 300 steps: 50 in each epoch, of two processes that take 2 samples each.
PLAN = {"run": "rates", "flags": "--dataset_length 200 --batch_size 2 --epochs 6"}
# An epoch that three numbers of processes share.
CHANGES = {"run": "interrupted", "flags": FLAGS.format(4, 1)}
CHANGES["MyDataset"] = "ChangedSamples"
CHANGES["args"] = {"snapshot_path": "changes.pt", "save_every": 7, "steps": 100}


def stopped(case, steps):
    return {**case, "run": "interrupted", "args": {**case["args"], "steps": steps}}


def with_flags(case, flags):
    return {**case, "flags": f"{case['flags']} {flags}"}


# The cases of two processes run first, then those of one.
CASES = {
    2: {
        "fewer ranks": stopped(RANKS, 20),
        "in validation": {**VALIDATION, "run": "killed_in_validation"},
        "after validation": VALIDATION,
        "all": {**ALL, "args": {"snapshot_path": "whole.pt"}},
        "all, stopped": stopped(ALL, 3 * 18 + 11),
        "all, resumed": ALL,
        "changes": CHANGES,
    },
    1: {"changes": CHANGES},
    3: {
        "more ranks": {**RANKS, "MyDataset": "ResumedSamples"},
        "changes": {**CHANGES, "run": "train"},
    },
}
for name in ("one_cycle", "cosine"):
    plan = {**PLAN, "make_scheduler": name}
    CASES[2][f"{name}, whole"] = plan
    plan["args"] = {"snapshot_path": f"{name}.pt", "save_every": 7}
    CASES[2][f"{name}, stopped"] = stopped(plan, 120)
    CASES[2][f"{name}, grown"] = with_flags(plan, "--dataset_length 204")
    CASES[1][f"{name}, refused"] = plan
    CASES[1][f"{name}, resumed"] = with_flags(plan, "--grad_accum_steps 2")
    CASES[2][f"{name}, whole"] = {**plan, "args": {}}
for name, optimizer in ("decay", "groups"), ("more decay", "decaying"):
    args = {"snapshot_path": "decay.pt", "save_every": 7, "steps": 120}
    CASES[2][name] = {**PLAN, "make_optimizer": optimizer, "args": args}
    CASES[2][name]["run"] = "interrupted"


def wait_for_mid_epoch(run, path):
    """Wait until a run has saved a snapshot inside an epoch."""
    run.wait_until(lambda: path.exists() and load(path)["samples_done"] > 0)


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
        since, moment = "the start", choose.uniform(0, 7)
        if number % 5 >= 2:  # 60 of 100: while snapshots are being saved
            since, moment = "the first snapshot", choose.uniform(0, 2)
            run.wait_until(path.exists)
        time.sleep(moment)
        what = f"kill {number}: {victims} {moment:.2f} seconds after {since}, {flags}"
        ranks = run.ranks()
        chosen = {"rank 0": ranks[:1], "rank 1": ranks[1:], "ranks": ranks}
        chosen["agent"] = [psutil.Process(run.process.pid)]
        chosen["everything"] = chosen["agent"] + ranks
        for process in chosen[victims]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass  # it had ended by then
        code = run.wait(200)  # it may save after every step
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
    assert load(path)["epochs_done"] >= 1


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
    """From 2 to 3 inside an epoch: less than a global batch is read twice."""
    resumes, batch, *epochs = results[3]["more ranks"]
    # Saved after 14 of 375 steps, of 8 samples. Rounded down to 9 batches of 12.
    assert resumes == "resuming after 0 epochs and 108 samples"
    assert batch == "the global batch changes from 8 to 12; the learning rate does not"
    assert len(epoch_lines("\n".join(epochs))) == 2
    snapshot = load(results["folder"] / "ranks.pt")
    assert snapshot["epochs_done"] == 2 and snapshot["samples_done"] == 0
    rest = []
    for rank in range(3):
        read = samples(results, f"resumed samples of rank {rank}")
        rest += read[4:-1000]  # without those that are compared, and the next epoch's
    assert sorted(rest) == sorted(order()[108:])


def order():
    """Return the order of the samples in the first epoch."""
    return torch.randperm(3000, generator=torch.Generator().manual_seed(0)).tolist()


def samples(results, name):
    lines = (results["folder"] / name).read_text()
    return [int(index) for index in lines.split()[::2]]


def test_two_changes_of_the_world_size_inside_one_epoch(results):
    """No sample is skipped: 2 processes, then 1, then 3, with batches of 4 samples."""
    read = [samples(results, f"changed samples of rank {rank}") for rank in range(3)]
    # Each start compares 4 samples. The first two end after 100 steps, with the next
    # batch read; their last snapshot is that of step 98.
    first = read[0][4:408] + read[1][4:408]
    second = read[0][412:816]
    third = read[0][820:] + read[1][412:] + read[2][4:]
    assert sorted(first) == sorted(order()[:808])
    assert second == order()[784 : 784 + 404]
    assert sorted(third) == sorted(order()[784 + 392 :])


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
def test_a_schedule_goes_on_only_if_it_has_as_many_steps(results, name):
    """From two processes to one: with twice the accumulation, the rates are the same."""
    _, (refused,) = results[1][f"{name}, refused"]
    assert refused.endswith("ValueError: steps of the scheduler was 300, now 600")
    _, (grown,) = results[2][f"{name}, grown"]
    assert "length of the dataset was 200, now 204; steps of the scheduler" in grown
    whole, _ = results[2][f"{name}, whole"]
    rates, lines = results[1][f"{name}, resumed"]
    assert lines[0] == "resuming after 2 epochs and 56 samples"
    assert len(whole) == 300 and rates == pytest.approx(whole[114:], rel=1e-9)


def test_an_edited_optimizer_is_refused(results):
    (refused,) = results[2]["more decay"]
    says = "ValueError: weight_decay of parameter group 0 was 0.1, now 0.2"
    assert refused.endswith(says)


def test_a_kill_during_validation_loses_no_step(results):
    assert "epoch 1/2" in results[2]["in validation"][-1]
    resumes, epoch, *_ = results[2]["after validation"]
    assert resumes == "resuming after 1 epochs and 0 samples"
    assert epoch.startswith("epoch 2/2")


def test_all_that_a_step_needs_is_resumed(results):
    """BatchNorm, clipping, groups, a schedule, float16's scale, which overflows reduce."""
    resumes = results[2]["all, resumed"][0]
    assert resumes == "resuming after 3 epochs and 224 samples"
    whole = load(results["folder"] / "whole.pt")
    assert len(whole["optimizer"]["param_groups"]) == 2
    assert 0 < whole["scaler"]["scale"] < 2**15
    assert whole["scheduler"]["last_epoch"] == 7 * 18  # steps
    assert whole["model"]["1.num_batches_tracked"] == 7 * 18
    assert_same_end(results["folder"] / "stopped.pt", whole)


def test_a_second_training_with_the_same_path_stops(start, folder):
    """It does not replace what the first one has saved, and the first one goes on."""
    flags = f"{LONG} --epochs 1000000 {SAVE}"
    first = start(SCRIPTS["torchrun"], flags + " --save_every 7")
    second = start(SCRIPTS["torchrun"], flags)
    # Whichever saves first, the other one ends, and says why.
    end = time.monotonic() + 90
    while first.process.poll() is None and second.process.poll() is None:
        assert time.monotonic() < end, first.stdout + second.stdout
        time.sleep(0.1)
    ended = second if first.process.poll() is None else first
    assert ended.wait(60) == 1 and ended.all_gone()
    # Or its ranks have seen the first snapshot appear: rank 1 has, and rank 0 has not.
    stops = "another run has saved to snapshot.pt, so this one stops"
    assert stops in ended.stderr or "is not the same on all machines" in ended.stderr
    assert load(folder / "snapshot.pt")["epochs_done"] >= 1
