"""The comparison of ddp.py: is DDP right, and where does a step's time go?"""

import json
import random
import sys

import pytest
import torch
from models import CNN_JOB, JOBS, TEXT_JOB

AUGMENTED = {"MyDataset": "TorchAugmented"}
# Jobs that are right, and whether a batch's samples affect each other (None: unknown).
RIGHT = {
    "the toy": ({}, False),
    "noise": (dict(AUGMENTED, MyModel="NoisyCNN"), None),
    "spectral norm": (dict(AUGMENTED, MyModel="SpectralCNN"), True),
    "teacher": (dict(AUGMENTED, MyModel="TeacherCNN"), False),
    "deep": (dict(AUGMENTED, MyModel="DeepMLP"), False),
    "transformer": (dict(AUGMENTED, MyModel="Transformer"), False),
    "LSTM": (dict(AUGMENTED, MyModel="DropoutLSTM"), False),
    "hook": (dict(AUGMENTED, MyModel="HookedCNN"), False),
    "no evaluation": (dict(AUGMENTED, MyModel="TrainingOnlyCNN"), None),
    "masking": (
        dict(TEXT_JOB, collate="mask_and_pad", compute_loss="token_loss"),
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
MIXED = {"augmented": True, "tied weights": True, "contrastive": True}
RIGHT.update({name: (job, MIXED.get(name, False)) for name, job in JOBS.items()})
DIFFICULT = {"MyModel": "SpectralCNN"}  # BatchNorm, dropout
MISTAKES = (
    {"MyDataset": "UnseededImages"},
    {"DistributedSampler": "OverlappingSampler"},
    {"DistributedDataParallel": "NoDDP"},
    {"DistributedDataParallel": "UnsynchronisedDDP"},
    {"DistributedDataParallel": "TwiceDividedDDP"},
)


def assert_right(case, result, limit):
    assert result["same_gradients"] is True, (case, result)
    assert result["gradient_difference"] < limit, (case, result)
    assert result["says"].startswith("DDP is right: its gradients are"), result
    assert result["unchanged"], case


@pytest.mark.parametrize("world_size", [2, 3])
def test_right_is_right(run_cases, world_size):
    """Whatever the job, in float32 and bfloat16, with a shorter last step and batch."""
    flags = ("", "--amp --dataset_length 61 --batch_size 5 --grad_accum_steps 3")
    names = [name for name in RIGHT for _ in flags]
    cases = [
        {"run": "check", "flags": flag, **job}
        for job, _ in RIGHT.values()
        for flag in flags
    ]
    for name, (case, result) in zip(names, run_cases(world_size, cases)):
        assert_right((name, case), result, 1e-5)
        mixed = RIGHT[name][1]
        assert result["mixes_samples"] is mixed, (name, case, result)
        assert ("affect each other" in result["says"]) == bool(mixed)


def test_wrong_is_wrong(run_cases):
    cases = [
        {"run": "check", "flags": flags, **DIFFICULT, **AUGMENTED, **mistake}
        for mistake in MISTAKES
        for flags in ("", "--amp", "--grad_accum_steps 3")
    ]
    for case, result in run_cases(2, cases):
        assert result["same_gradients"] is False, (case, result)
        assert result["gradient_difference"] > 0.3, (case, result)
        assert result["says"].startswith("DDP is WRONG"), result


def test_what_cannot_be_repeated_is_not_called_wrong(run_cases):
    jobs = {"MyDataset": "OwnGenerator"}, {"MyModel": "CountingCNN"}
    cases = [{"run": "check", **CNN_JOB, **job} for job in jobs]
    for case, result in run_cases(2, cases):
        assert result["same_gradients"] is None, (case, result)
        assert "Cannot tell if DDP is right" in result["says"], (case, result)


def test_samples_that_do_not_divide_are_not_mixed(run_cases):
    flags = "--dataset_length {} --batch_size {}"
    sizes = (2, 2), (3, 2), (5, 1), (7, 3), (20, 64), (33, 64)
    cases = [
        {"run": "check", "flags": flags.format(*size), **CNN_JOB} for size in sizes
    ]
    for case, result in run_cases(3, cases):
        assert result["mixes_samples"] is False, (case, result)


def test_a_step_that_is_scaled_wrongly_is_seen(finish, folder):
    """The last step of an epoch has fewer samples: divided by too many, it is wrong."""
    script = folder / "ddp.py"
    right = "step_samples = min(accum * batch_size, length - (number - 1) * batch_size)"
    text = script.read_text()
    assert text.count(right) == 1
    wrong = f"{right}\n            if world_size > 1: step_samples = accum * batch_size"
    script.write_text(text.replace(right, wrong))
    flags = "--dataset_length 70 --batch_size 8 --grad_accum_steps 3 --epochs 1"
    run = finish([sys.executable, "ddp.py"], flags, code=1)
    assert "DDP is WRONG: its gradients are not" in run.stdout
    assert "DDP training time" in run.stdout  # all else is still shown


def test_another_number_of_steps_is_seen(finish, variant):
    code = """
whole = script.make_batch_samplers
def fewer(length, args):
    return whole(length, args)[0], whole(length // 2, args)[1]
script.make_batch_samplers = fewer
"""
    run = finish(variant("ddp", code), "--epochs 1", code=1)
    assert "DDP is WRONG" in run.stdout


def test_a_model_that_is_nan_is_no_success(finish, folder, variant):
    flags = "--dataset_length 300 --epochs 2 --json NaN.json"
    run = finish(variant("ddp", "script.MyModel = NaNModel"), flags, code=1)
    assert "The gradients are not finite" in run.stdout
    figures = json.loads((folder / "NaN.json").read_text())
    assert figures["json"] == "NaN.json"
    result = figures["runs"][0]
    assert result["ddp"]["loss"] is None and result["same_gradients"] is False


def test_sync_batchnorm_is_refused(finish, variant):
    run = finish(variant("ddp", "script.MyModel = SyncBatchNormCNN"), code=1)
    assert run.stderr.count("SyncBatchNorm needs all ranks") == 1
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("world_size", [2, 4])
def test_random_combinations_are_right(request, run_cases, world_size):
    """More: `pytest tests -k random_combinations --examples 1000`."""
    choose = random.Random(world_size).randint
    template = "--dataset_length {} --batch_size {} --grad_accum_steps {} --seed {}"
    cases = []
    for number in range(request.config.getoption("--examples")):
        sizes = choose(1, 60), choose(1, 12), choose(1, 6), choose(0, 99)
        job = {} if number % 2 else dict(AUGMENTED, MyModel="DropoutCNN")
        cases.append({"run": "check", "flags": template.format(*sizes), **job})
    orders = [{"run": "order", "flags": case["flags"]} for case in cases]
    results = run_cases(world_size, cases + orders)
    for case, result in results[: len(cases)]:
        assert_right(case, result, 1e-5)
    for case, (normal, length, ranks) in results[len(cases) :]:
        in_turn = [batch for batches in zip(*ranks) for batch in batches]
        assert normal == in_turn and length == len(normal), case


def test_the_check_changes_no_training(run_cases):
    """Also of models with dropout and BatchNorm, to the last bit."""
    jobs = {}, {"MyModel": "SpectralCNN", "MyDataset": "OtherwiseAugmented"}
    cases = []
    for job in (*jobs, JOBS["contrastive"]):
        case = {"run": "weights", "flags": "--epochs 2", **job}
        cases += [case, {**case, "check": "no_check"}]
    results = [result for _, result in run_cases(2, cases)]
    # `random` and NumPy go on where the check found them, which a training cannot show.
    assert results[0] == results[1] and results[4] == results[5]
    assert [len(weights) for weights in results] == [2] * 6


def test_gradients_are_synchronised_once_per_optimizer_step(run_cases):
    flags = "--dataset_length 161 --batch_size 8 --grad_accum_steps {}"
    cases = [{"run": "synchronisations", "flags": flags.format(n)} for n in (1, 3, 20)]
    assert [result for _, result in run_cases(2, cases)] == [11, 4, 1]


def test_the_parts_of_a_step(run_cases):
    """What takes most of it shows up in the part where it is."""
    case = {"run": "step", "flags": "--dataset_length 600 --batch_size 30"}
    slow_data, slow_model = {"MyDataset": "SlowSamples"}, {"MyModel": "SlowModel"}
    more = {}, slow_data, slow_model, {"MyModel": "LargeModel"}
    results = run_cases(2, [{**case, **parts} for parts in more])
    (_, small), (_, slow_data), (_, slow_model), (_, large) = results
    for parts in (small, slow_data, slow_model, large):
        assert min(parts.values()) >= 0
    assert slow_data["data"] > 0.5 and slow_model["compute"] > 0.5
    assert large["sync"] > 2 * max(slow_data["sync"], slow_model["sync"])
    assert max(small["data"], slow_model["data"], large["data"]) < 0.5


@pytest.mark.skipif(torch.__version__ < "2.9", reason="a newer setting")
def test_the_newer_setting_of_tf32(finish, variant):
    code = "import torch\ntorch.backends.fp32_precision = 'tf32'"
    run = finish(variant("ddp", code), "--epochs 1 --dataset_length 500")
    assert "DDP is right" in run.stdout
