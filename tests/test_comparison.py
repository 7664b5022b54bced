"""The comparison of ddp.py: is DDP right, and where does a step's time go?"""

import math
import random

import pytest
import torch
from conftest import SCRIPTS
from models import CNN_JOB, JOBS, PAIR_JOB, PARTLY, TEXT_JOB

AUGMENTED = {"MyDataset": "TorchAugmented"}
# Jobs that are right.
RIGHT = {
    "the toy": {},
    "noise": dict(AUGMENTED, MyModel="NoisyCNN"),
    "spectral norm": dict(AUGMENTED, MyModel="SpectralCNN"),
    "bias before BatchNorm": dict(AUGMENTED, MyModel="ConvBiasNorm"),
    "teacher": dict(AUGMENTED, MyModel="TeacherCNN"),
    "deep": dict(AUGMENTED, MyModel="DeepMLP"),
    "transformer": dict(AUGMENTED, MyModel="Transformer"),
    "LSTM": dict(AUGMENTED, MyModel="DropoutLSTM"),
    "hook": dict(AUGMENTED, MyModel="HookedCNN"),
    "no evaluation": dict(AUGMENTED, MyModel="TrainingOnlyCNN"),
    "tiny layer": dict(AUGMENTED, MyModel="TinyLayer"),
    "turned buffer": dict(AUGMENTED, MyModel="TurnedBuffer"),
    "pairs": {**CNN_JOB, **PAIR_JOB},
    "augmented batches": {"MyDataset": "AugmentedBatches"},
    "no targets": PARTLY,
    "class weights": {
        "compute_loss": "weighted_loss",
        "count_items": "weight_count",
        "COUNTS_DIFFER": "YES",
    },
    "sparse or complex": dict(
        TEXT_JOB, MyModel="SparseOrComplex", make_optimizer="sgd"
    ),
    "masking": dict(JOBS["tokens"], collate="mask_and_pad"),
    "mixup": dict(CNN_JOB, collate="mixup"),
    "siamese": dict(AUGMENTED, MyModel="BatchNormCNN", compute_loss="siamese_loss"),
    "own generator": {**CNN_JOB, "MyDataset": "OwnGenerator"},
    "two metrics": {**CNN_JOB, "compute_loss": "two_metrics"},
    "no metrics": {**CNN_JOB, "compute_loss": "no_metrics"},
    "no validation": {**CNN_JOB, "make_datasets": "no_validation"},
    **JOBS,
}
if torch.__version__ < "2.13":  # older DDP with BatchNorm cannot be called twice
    del RIGHT["siamese"]
NO_HALF = {"LSTM", "sparse or complex"}  # PyTorch has no float16 of these on a CPU
EXPERTS = {**AUGMENTED, "MyModel": "Experts", "wrap_in_ddp": "wrap_unused"}

DIFFICULT = {**AUGMENTED, "MyModel": "SpectralCNN"}  # BatchNorm, dropout
WRONG = {
    "not wrapped": {**DIFFICULT, "DistributedDataParallel": "NoDDP"},
    "no_sync left on": {**DIFFICULT, "DistributedDataParallel": "UnsynchronisedDDP"},
    "divided twice": {**DIFFICULT, "DistributedDataParallel": "TwiceDividedDDP"},
    "one small parameter": {
        **AUGMENTED,
        "MyModel": "TinyLayer",
        "wrap_in_ddp": "wrap_without_tiny",
    },
    "past the wrapper": {
        **AUGMENTED,
        "MyModel": "PastTheWrapper",
        "compute_loss": "past_the_wrapper",
    },
    "tokens": dict(JOBS["tokens"], COUNTS_DIFFER="NO"),
    "NaN with DDP alone": {**CNN_JOB, "wrap_in_ddp": "wrap_nan"},
    "NaN in one parameter": {**CNN_JOB, "wrap_in_ddp": "wrap_nan_in_first"},
}
UNKNOWN = {
    "counted calls": {**CNN_JOB, "MyModel": "CountingCNN"},
    "growing noise": {**CNN_JOB, "MyModel": "GrowingCNN"},
    "NaN": {"MyModel": "NaNModel"},
}
FLAGS = {
    1: ["--batch_size 5"],
    2: ["", "--precision float16 --dataset_length 61 --batch_size 5"],
    3: ["--precision bfloat16 --dataset_length 61 --batch_size 5 --grad_accum_steps 3"],
}
EXAMPLES = 10  # random sizes, for each number of processes
TIMED = {
    "toy": {},
    "slow data": {"MyDataset": "SlowSamples"},
    "slow model": {"MyModel": "SlowModel"},
    "slow rank": {"MyModel": "SlowOnRank1"},
    "slow rank, counts exchanged": {"MyModel": "SlowOnRank1", "COUNTS_DIFFER": "YES"},
}


def cases_of(world_size):
    cases = {}
    for flags in FLAGS[world_size]:
        for name, job in RIGHT.items():
            if "float16" not in flags or name not in NO_HALF or "bfloat16" in flags:
                cases[f"{name} {flags}"] = {"run": "check", "flags": flags, **job}
    choose = random.Random(world_size).randint
    template = "--dataset_length {} --batch_size {} --grad_accum_steps {} --seed {}"
    for number in range(EXAMPLES):
        batch_size = choose(1, 12)
        length = choose(world_size * batch_size, world_size * batch_size + 60)
        flags = template.format(length, batch_size, choose(1, 6), choose(0, 99))
        job = {} if number % 2 else dict(AUGMENTED, MyModel="DropoutCNN")
        cases[f"random {number}"] = {"run": "check", "flags": flags, **job}
    return cases


CASES = {world_size: cases_of(world_size) for world_size in FLAGS}
for name, job in {**WRONG, **UNKNOWN}.items():
    CASES[2][name] = {"run": "check", **job}
    flags = "--grad_accum_steps 3 --dataset_length 75"
    CASES[3][name] = {"run": "check", "flags": flags, **job}
CASES[2]["other data"] = {"run": "check", **DIFFICULT, "MyDataset": "UnseededImages"}
CASES[2]["albumentations"] = {
    "run": "check",
    **CNN_JOB,
    "MyDataset": "UnseededAugmented",
}
CASES[2]["drift"] = {"run": "check", **CNN_JOB, "compute_loss": "second_optimizer"}
CASES[2]["experts"] = {"run": "compare", "flags": "--epochs 3", **EXPERTS}
CASES[2]["schedule"] = {"run": "compare", "make_scheduler": "one_cycle"}
CASES[2]["schedule"]["make_optimizer"] = "groups"  # it gets the plain model
for name, job in TIMED.items():
    flags = "--dataset_length 300 --batch_size 30 --epochs 2"
    CASES[2][f"timed: {name}"] = {"run": "compare", "flags": flags, **job}


@pytest.mark.parametrize("world_size", FLAGS)
def test_right_is_right(results, world_size):
    """Whatever the job, in all precisions."""
    for flags in FLAGS[world_size]:
        for name in RIGHT:
            result = results[world_size].get(f"{name} {flags}")
            assert result or name in NO_HALF, name
            if result:
                assert_right(name, result)


def assert_right(name, result):
    assert result["same_gradients"] is True and result["same_weights"], (name, result)
    assert result["gradient_difference"] < 1e-6, (name, result)
    assert "DDP is right: on one batch per rank" in result["says"], (name, result)
    assert "WARNING" not in result["says"], (name, result)
    assert result["result"] is True, (name, result)


def test_data_that_differs_is_warned_of_and_compared_all_the_same(results):
    """As normal training takes the very batches that DDP takes."""
    for name in ("other data", "albumentations"):
        result = results[2][name]
        assert result["same_gradients"] is True and result["gradient_difference"] < 1e-6
        assert "WARNING: the ranks read different samples" in result["says"]


def test_a_model_at_module_level_is_refused(finish, define):
    flags = define({"MyModel": "ConstantModel", "MyDataset": "Images"})
    run = finish(SCRIPTS["ddp"], flags, code=1)
    says = "make_model has to return a new model on each call\n"
    assert run.stderr.startswith(says) and "Traceback" not in run.stderr


@pytest.mark.parametrize("world_size", FLAGS)
def test_random_sizes_are_right(results, world_size):
    for number in range(EXAMPLES):
        assert_right(number, results[world_size][f"random {number}"])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_is_wrong(results, world_size, name):
    result = results[world_size][name]
    assert result["result"] is False, result
    if name == "one small parameter":  # too small to be told from rounding
        assert result["same_weights"] is False, result
        return
    assert result["same_gradients"] is False, result
    if "NaN" not in name and name != "tokens":
        assert result["gradient_difference"] > 0.05, result
    assert "DDP is WRONG: its gradients differ from" in result["says"], result
    if name == "NaN in one parameter":
        assert ' in 0.weight. See "Wrong" in the README.' in result["says"], result


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_repeated_is_not_called_wrong(results, world_size, name):
    result = results[world_size][name]
    assert result["same_gradients"] is None, result
    assert "Cannot tell if DDP is right" in result["says"], result
    assert result["result"] is True
    loss = result["ddp"][-1]["means"]["loss"]
    assert math.isnan(loss) == (name == "NaN")


def test_weights_that_drift_apart_are_wrong(results):
    result = results[2]["drift"]
    assert result["same_weights"] is False and result["result"] is False
    assert "WARNING: the weights of the ranks differ:" in result["says"]


def test_counts_that_differ_are_warned_of(results):
    says = "WARNING: the ranks' item counts differ: set COUNTS_DIFFER = True"
    assert says in results[2]["tokens"]["says"]


@pytest.mark.parametrize("name", ["experts", "schedule"])
def test_steps_are_timed(results, name):
    """Of models that leave out parameters, and with a schedule that has ended."""
    result = results[2][name]
    assert result["same_gradients"] is True and "A step takes" in result["says"]


def test_the_parts_of_a_step(results):
    """What takes most of it shows up in the part where it is."""
    shares = {}
    for name in TIMED:
        parts = results[2][f"timed: {name}"]["ddp_step_ms"]
        assert min(parts.values()) >= 0
        total = sum(parts.values())
        shares[name] = {part: ms / total for part, ms in parts.items()}
    assert shares["slow data"]["data"] > 0.5 and shares["slow model"]["compute"] > 0.5
    assert shares["slow rank"]["sync"] > 0.5  # rank 0's, which waits
    slow = results[2]["timed: slow rank"]
    assert slow["compute_ms_by_rank"][1] > 2 * slow["compute_ms_by_rank"][0]
    assert (
        "Rank 1 computes" in slow["says"]
        and "and the others wait for it" in slow["says"]
    )
    counted = results[2]["timed: slow rank, counts exchanged"]["compute_ms_by_rank"]
    assert counted[1] > 2 * counted[0]


def test_figures_of_one_screen_agree(results):
    """In the JSON and in what is printed."""
    result = results[2]["experts"]
    low, high = result["speedup_range"]
    ddp_ms = sum(result["ddp_step_ms"].values())
    assert result["speedup"] == pytest.approx(result["normal_step_ms"] / ddp_ms)
    assert f"A step takes {result['normal_step_ms']:.2f} ms normally" in result["says"]
    assert f"{result['speedup']:.2f} times the speed" in result["says"]
    assert f"({low:.2f} to {high:.2f} per epoch)" in result["says"]
    for way, name in (("normal", "Normal"), ("ddp", "DDP")):
        epochs = result[way]
        assert {epoch["samples"] for epoch in epochs} == {32} and len(epochs) == 3
        seconds = sum(epoch["seconds"] for epoch in epochs)
        assert f"{name} training time: {seconds:.2f} seconds" in result["says"]


@pytest.mark.slow
def test_sync_batchnorm_is_refused(finish, define):
    """On a CPU, by DDP itself."""
    flags = define({"MyModel": "SyncBatchNormCNN", "MyDataset": "Images"})
    assert "SyncBatchNorm" in finish(SCRIPTS["ddp"], flags, 1).stderr


def test_with_workers_the_check_reads_in_a_worker(finish, define):
    """As training does: of a file that is opened at the first read; also a lambda."""
    flags = define({"MyModel": "CNN", "MyDataset": "OpenedLate"})
    flags += " --num_workers 1 --epochs 2 --dataset_length 200 --batch_size 10"
    assert "DDP is right" in finish(SCRIPTS["ddp"], flags).stdout
