"""Ranks that differ are ended, or warned of: nobody else would see it."""

import pytest
from conftest import SCRIPTS, epoch_lines
from models import CNN_JOB, JOBS

DATA = 'WARNING: the ranks read different samples: see "Different data" in the README'
WEIGHTS = (
    'WARNING: the weights of the ranks differ: see "Different weights" in the README'
)
COUNTS = "WARNING: the ranks' item counts differ: set COUNTS_DIFFER = True"
MISTAKES = {
    "classes from a set": ({**CNN_JOB, "MyDataset": "ClassesFromSet"}, DATA),
    "unseeded": ({"MyDataset": "Unseeded"}, DATA),
    "past the wrapper": (
        {**CNN_JOB, "MyModel": "PastTheWrapper", "compute_loss": "past_the_wrapper"},
        WEIGHTS,
    ),
    "a second optimizer": ({**CNN_JOB, "compute_loss": "second_optimizer"}, WEIGHTS),
    "unequal counts": (dict(JOBS["tokens"], COUNTS_DIFFER="NO"), COUNTS),
    "black border": ({**CNN_JOB, "MyDataset": "BlackBorder"}, DATA),
}
RIGHT = {
    "torch": {**CNN_JOB, "MyDataset": "TorchAugmented"},
    "random and NumPy": {**CNN_JOB, "MyDataset": "OtherwiseAugmented"},
    "batches": {"MyDataset": "AugmentedBatches"},
}
FLAGS = "--dataset_length 200 --epochs 2"
CASES = {2: {}}
for run in ("train", "check"):
    for name, (job, _) in MISTAKES.items():
        CASES[2][f"{run}: {name}"] = {"run": run, "flags": FLAGS, **job}
    for name, job in RIGHT.items():
        CASES[2][f"{run}: {name}"] = {"run": run, "flags": FLAGS, **job}
CASES[2]["other snapshots"] = {"run": "other_snapshots"}
few = "--dataset_length 100 --batch_size 64"
CASES[2]["few samples"] = {"run": "train", "flags": few}


@pytest.mark.parametrize("run", ["train", "check"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_warned_of(results, run, name):
    result = results[2][f"{run}: {name}"]
    says = " ".join(result) if run == "train" else result["says"]
    for warning in (DATA, WEIGHTS, COUNTS):
        # What drifts apart in ddp.py may have been found before.
        assert (warning in says) == (warning == MISTAKES[name][1]), says


@pytest.mark.parametrize("run", ["train", "check"])
@pytest.mark.parametrize("name", RIGHT)
def test_augmentation_is_not(results, run, name):
    result = results[2][f"{run}: {name}"]
    assert "WARNING" not in str(result)


def test_unequal_lengths_end_all(finish, define):
    run = finish(SCRIPTS["torchrun"], define({"MyDataset": "Unequal"}), code=1)
    assert 'the ranks have [20000, 20100] samples: see "Different data"' in run.stderr
    assert not epoch_lines(run.stdout) and "SIGABRT" not in run.stderr
    assert run.stderr.count("Traceback") == 1  # torchrun's own


def test_other_snapshots_end_all(results):
    """Each rank has a folder of its own, as on machines that share none."""
    says = "snapshot of rank 0.pt is not the same on all machines: use a shared folder"
    assert results[2]["other snapshots"][1:] == [says]


def test_fewer_samples_than_a_batch(results):
    says = "100 samples are too few for a batch of 64 per rank"
    assert results[2]["few samples"] == [says]
