"""The comparison of ddp.py: are gradients the same, and where does a step's time go?"""

import json
import random
import shutil
import sys

import pytest
from conftest import ROOT

MODELS = ("MyModel", "CNN", "DeepMLP", "Transformer")
MISTAKES = (
    {"MyDataset": "UnseededSamples"},
    {"DistributedSampler": "OverlappingSampler"},
    {"DistributedDataParallel": "UnsynchronisedDDP"},
    {"DistributedDataParallel": "TwiceDividedDDP"},
)


def images(model):
    """Return what a case needs to try `model`."""
    return {} if model == "MyModel" else {"MyModel": model, "MyDataset": "Images"}


@pytest.fixture
def run_cases(finish, folder):
    """Run cases of cases.py in one start of some processes; return their results."""
    shutil.copy(str(ROOT / "tests" / "cases.py"), str(folder))

    def run_cases(world_size, cases):
        command = [sys.executable, "cases.py", str(world_size), json.dumps(cases)]
        run = finish(command)
        results = [json.loads(line) for line in run.stdout.splitlines()]
        assert len(results) == len(cases)
        return list(zip(cases, results))

    return run_cases


def test_right_models_have_the_same_gradients(run_cases):
    """In float32 and bfloat16; with a shorter last batch, and a shorter last step."""
    flags = ("", "--amp", "--dataset_length 61 --batch_size 5 --grad_accum_steps 3")
    cases = [
        {"run": "check", "flags": flag, **images(model)}
        for model in MODELS
        for flag in flags
    ]
    for case, result in run_cases(2, cases):
        assert result["same_gradients"] and result["right"], (case, result)
        limit = 0.2 if "--amp" in case["flags"] else 1e-5
        assert result["gradient_difference"] < limit, (case, result)
        assert result["unchanged"], case


def test_mistakes_are_seen(run_cases):
    cases = [
        {"run": "check", "flags": flags, **mistake}
        for mistake in MISTAKES
        for flags in ("", "--amp", "--grad_accum_steps 3")
    ]
    for case, result in run_cases(2, cases):
        assert not result["same_gradients"] and not result["right"], (case, result)
        assert result["gradient_difference"] > 0.3, (case, result)


def test_batchnorm_and_dropout_are_no_mistakes(run_cases):
    models = ("BatchNormCNN", "DropoutCNN", "DropoutLSTM")
    cases = [{"run": "check", **images(model)} for model in models]
    for case, result in run_cases(2, cases):
        assert not result["same_gradients"] and result["right"], (case, result)
        assert result["unchanged"], case
    cases = [dict(case, DistributedDataParallel="UnsynchronisedDDP") for case in cases]
    for case, result in run_cases(2, cases):
        assert not result["right"], (case, result)


def test_a_step_that_is_scaled_wrongly_is_seen(finish, folder):
    """The last step of an epoch has fewer samples: divided by too many, it is wrong."""
    script = folder / "ddp.py"
    right = "in_step = min(step_size, samples - seen // step_size * step_size)"
    text = script.read_text()
    assert text.count(right) == 1
    wrong = "in_step = step_size if hasattr(model, 'module') else " + right[10:]
    script.write_text(text.replace(right, wrong))
    flags = "--dataset_length 70 --batch_size 8 --grad_accum_steps 3 --epochs 1"
    run = finish([sys.executable, "ddp.py"], flags, code=1)
    assert "DDP is WRONG: gradients are not" in run.stdout
    assert run.stdout.splitlines()[-1].strip()  # all else is still shown


def test_a_model_that_is_nan_is_no_success(finish, folder, variant):
    flags = "--dataset_length 300 --epochs 2 --json figures.json"
    run = finish(variant("ddp", "script.MyModel = NaNModel"), flags, code=1)
    assert "The gradients are not finite" in run.stdout
    figures = json.loads((folder / "figures.json").read_text())["runs"][0]
    assert figures["ddp"]["loss"] is None and figures["same_gradients"] is False


@pytest.mark.parametrize("world_size", [2, 3])
def test_random_combinations_have_the_same_gradients(request, run_cases, world_size):
    """More: `pytest tests -k random_combinations --examples 1000`."""
    choose = random.Random(world_size).randint
    template = "--dataset_length {} --batch_size {} --grad_accum_steps {} --seed {}"
    cases = [
        {
            "run": "check",
            "flags": template.format(
                choose(1, 60), choose(1, 12), choose(1, 6), choose(0, 99)
            ),
        }
        for _ in range(request.config.getoption("--examples"))
    ]
    for case, result in run_cases(world_size, cases):
        assert result["same_gradients"] and result["unchanged"], (case, result)


def test_the_check_changes_no_training(run_cases):
    """Also of models with dropout and BatchNorm, to the last bit."""
    cases = []
    for model in ("MyModel", "DropoutCNN", "BatchNormCNN"):
        case = {"run": "weights", "flags": "--epochs 2", **images(model)}
        cases += [case, {**case, "check_gradients": "no_check"}]
    results = [result for _, result in run_cases(2, cases)]
    assert results[::2] == results[1::2]


def test_gradients_are_synchronised_once_per_optimizer_step(run_cases):
    flags = "--dataset_length 161 --batch_size 8 --grad_accum_steps {}"
    cases = [{"run": "synchronisations", "flags": flags.format(n)} for n in (1, 3, 20)]
    assert [result for _, result in run_cases(2, cases)] == [11, 4, 1]


def test_the_parts_of_a_step(run_cases):
    """What takes 30 ms and more shows up in the part where it is."""
    flags = "--dataset_length 2000 --batch_size 30"
    cases = [
        {"run": "step", "flags": flags},
        {"run": "step", "flags": flags, "MyDataset": "SlowSamples"},
        {"run": "step", "flags": flags, "MyModel": "SlowModel"},
        {"run": "step", "flags": flags, "MyModel": "LargeModel"},
    ]
    (_, small), (_, slow_data), (_, slow_model), (_, large) = run_cases(2, cases)
    for parts in (small, slow_data, slow_model, large):
        assert min(parts.values()) >= 0
    assert max(slow_data, key=slow_data.get) == "data" and slow_data["data"] > 20
    assert max(slow_model, key=slow_model.get) == "compute"
    assert slow_model["compute"] > 20
    assert large["sync"] > 3 * small["sync"]


def test_a_slow_ddp_is_said_to_be_slower(finish, variant):
    code = "script.DistributedDataParallel = SlowDDP"
    run = finish(variant("ddp", code), "--dataset_length 4000 --epochs 3")
    assert "DDP is slower" in run.stdout
