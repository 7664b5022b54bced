"""The comparison of ddp.py: is DDP right, and where does a step's time go?"""

import random

import pytest
import torch
from conftest import SCRIPTS
from models import CNN_JOB, JOBS, PAIR_JOB, PARTLY, TEXT_JOB

AUGMENTED = {"MyDataset": "TorchAugmented"}
# Jobs that are right, and whether a batch's samples affect each other (None: unknown).
RIGHT = {
    "the toy": ({}, False),
    "noise": (dict(AUGMENTED, MyModel="NoisyCNN"), None),
    "spectral norm": (dict(AUGMENTED, MyModel="SpectralCNN"), True),
    "bias before BatchNorm": (dict(AUGMENTED, MyModel="ConvBiasNorm"), True),
    "teacher": (dict(AUGMENTED, MyModel="TeacherCNN"), False),
    "deep": (dict(AUGMENTED, MyModel="DeepMLP"), False),
    "transformer": (dict(AUGMENTED, MyModel="Transformer"), False),
    "LSTM": (dict(AUGMENTED, MyModel="DropoutLSTM"), False),
    "hook": (dict(AUGMENTED, MyModel="HookedCNN"), False),
    "no evaluation": (dict(AUGMENTED, MyModel="TrainingOnlyCNN"), None),
    "tiny layer": (dict(AUGMENTED, MyModel="TinyLayer"), False),
    "observers": (dict(AUGMENTED, MyModel="Observed"), False),
    "odd buffers": (dict(AUGMENTED, MyModel="OddBuffers"), False),
    "pairs": ({**CNN_JOB, **PAIR_JOB}, False),
    "augmented batches": ({"MyDataset": "AugmentedBatches"}, None),
    "no targets": (PARTLY, False),
    "class weights": (
        {"compute_loss": "weighted_loss", "count_items": "weight_count"},
        False,
    ),
    "sparse and complex": (
        dict(TEXT_JOB, MyModel="Sparse", make_optimizer="sgd"),
        False,
    ),
    "masking": (
        dict(JOBS["tokens"], collate="mask_and_pad"),
        None,
    ),
    "mixup": (dict(CNN_JOB, collate="mixup"), None),
    "siamese": (
        dict(AUGMENTED, MyModel="BatchNormCNN", compute_loss="siamese_loss"),
        True,
    ),
}
if torch.__version__ < "2.13":  # older DDP with BatchNorm cannot be called twice
    del RIGHT["siamese"]
MIXED = {"augmented": True, "contrastive": True}
RIGHT.update({name: (job, MIXED.get(name, False)) for name, job in JOBS.items()})
NO_HALF = {"LSTM", "sparse and complex"}  # PyTorch has no float16 of these on a CPU
EXPERTS = {**AUGMENTED, "MyModel": "Experts", "wrap": "wrap_unused"}

DIFFICULT = {**AUGMENTED, "MyModel": "SpectralCNN"}  # BatchNorm, dropout
WRONG = {
    "other data": {**DIFFICULT, "MyDataset": "UnseededImages"},
    "not wrapped": {**DIFFICULT, "DistributedDataParallel": "NoDDP"},
    "no_sync left on": {**DIFFICULT, "DistributedDataParallel": "UnsynchronisedDDP"},
    "divided twice": {**DIFFICULT, "DistributedDataParallel": "TwiceDividedDDP"},
    "one small parameter": {
        **AUGMENTED,
        "MyModel": "TinyLayer",
        "wrap": "wrap_without_tiny",
    },
    "past the wrapper": {
        **AUGMENTED,
        "MyModel": "PastTheWrapper",
        "compute_loss": "past_the_wrapper",
    },
    "tokens as an int": dict(JOBS["tokens"], count_items="token_int"),
    "NaN with DDP alone": {**CNN_JOB, "wrap": "wrap_nan"},
}
UNKNOWN = {
    "own generator": {**CNN_JOB, "MyDataset": "OwnGenerator"},
    "counted calls": {**CNN_JOB, "MyModel": "CountingCNN"},
    "NaN": {"MyModel": "NaNModel"},
}
FLAGS = {
    1: ["--batch_size 5"],
    2: ["", "--precision float16 --dataset_length 61 --batch_size 5"],
    3: ["--precision bfloat16 --dataset_length 61 --batch_size 5 --grad_accum_steps 3"],
}
EXAMPLES = 10  # random sizes, for each number of processes
TIMED = {"toy": {}, "slow data": {"MyDataset": "SlowSamples"}}
TIMED.update(
    {"slow model": {"MyModel": "SlowModel"}, "slow sync": {"MyModel": "SlowOnRank1"}}
)


def cases_of(world_size):
    cases = {}
    for flags in FLAGS[world_size]:
        for name, (job, _) in RIGHT.items():
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
CASES[2]["drift"] = {"run": "check", **CNN_JOB, "compute_loss": "second_optimizer"}
CASES[2]["experts"] = {"run": "compare", "flags": "--epochs 3", **EXPERTS}
CASES[2]["schedule"] = {"run": "compare", "make_scheduler": "one_cycle"}
CASES[2]["schedule"]["make_optimizer"] = "groups"  # it gets the plain model
for name, job in TIMED.items():
    flags = "--dataset_length 300 --batch_size 30 --epochs 2"
    CASES[2][f"timed: {name}"] = {"run": "compare", "flags": flags, **job}


@pytest.mark.parametrize("world_size", FLAGS)
def test_right_is_right(results, world_size):
    """Whatever the job, in all precisions; its samples are mixed, or not."""
    for flags in FLAGS[world_size]:
        for name, (_, mixes) in RIGHT.items():
            result = results[world_size].get(f"{name} {flags}")
            assert result or name in NO_HALF, name
            if result:
                assert_right(name, result)
                assert result["mixes_samples"] is mixes, (name, result)
                says = "affect each other" in result["says"]
                assert says == bool(mixes), (name, result)


def assert_right(name, result):
    assert result["same_gradients"] is True and result["same_weights"], (name, result)
    assert result["gradient_difference"] < 1e-5, (name, result)
    assert "DDP is right: its gradients are" in result["says"], (name, result)
    assert "WARNING" not in result["says"], (name, result)
    assert result["result"] is True, (name, result)


@pytest.mark.parametrize("world_size", FLAGS)
def test_random_sizes_are_right(results, world_size):
    for number in range(EXAMPLES):
        assert_right(number, results[world_size][f"random {number}"])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_is_wrong(results, world_size, name):
    result = results[world_size][name]
    assert result["same_gradients"] is False and result["result"] is False, result
    if "NaN" not in name and "int" not in name:
        assert result["gradient_difference"] > 0.2, result
    assert "DDP is WRONG: its gradients are not" in result["says"], result
    warned = "WARNING: the ranks read different samples" in result["says"]
    assert warned == (name == "other data"), result


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_repeated_is_not_called_wrong(results, world_size, name):
    result = results[world_size][name]
    assert result["same_gradients"] is None, result
    assert "Cannot tell if DDP is right" in result["says"], result
    assert result["result"] is True
    assert (result["ddp"]["loss"] is None) == (name == "NaN")  # no NaN in JSON


def test_weights_that_drift_apart_are_wrong(results):
    result = results[2]["drift"]
    assert result["same_weights"] is False and result["result"] is False
    assert "WARNING: the ranks' weights differ." in result["says"]


def test_an_int_that_is_not_the_same_is_warned_of(results):
    assert "WARNING: count_items' ints differ" in results[2]["tokens as an int"]["says"]


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
    assert shares["slow sync"]["sync"] > 0.5


def test_figures_of_one_screen_agree(results):
    """In the JSON and in what is printed."""
    result = results[2]["experts"]
    low, high = result["speedup_range"]
    ddp_ms = sum(result["ddp_step_ms"].values())
    assert result["speedup"] == pytest.approx(result["normal_step_ms"] / ddp_ms)
    assert f"A step takes {result['normal_step_ms']:.2f} ms normally" in result["says"]
    assert f"{result['speedup']:.2f} times the speed" in result["says"]
    assert f"({low:.2f} to {high:.2f} in single epochs)" in result["says"]
    for way in ("normal", "ddp"):
        assert result[way]["samples"] == 32 and 0 < result[way]["loss"] < 5
        assert result[f"{way}_seconds"] > result[way]["seconds"]


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
