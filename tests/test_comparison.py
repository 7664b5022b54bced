"""What ddp.py says of its comparison: the table, the step, the verdict, the JSON."""

import io
import json
import re
import shutil
import sys

import pytest
from conftest import DDP, ROOT, edit
from test_copier import DATASET, MODEL
from test_training import ddp, replace_body

UNSHARDED = (
    "DistributedSampler(dataset, seed=args.seed)",
    "DistributedSampler(dataset, seed=rank)",
)
NO_SYNC_LEFT_ON = ("contextlib.nullcontext() if group_ends else no_sync()", "no_sync()")
OWN_DATA = ("args.input_size, args.seed)", "args.input_size, args.seed + rank)")
NO_PROBE = (
    "trained, dataset, optimizer, device, args, seconds / steps",
    "trained, dataset, optimizer, device, args, 1e9",
)


@pytest.fixture
def compare(finish, folder):
    """Run ddp.py with some flags; return what it printed, and the JSON."""

    def compare(flags="", code=0, env=None):
        run = finish(DDP + flags.split() + ["--json", "figures.json"], code, env)
        return run.stdout, json.loads((folder / "figures.json").read_text())

    return compare


def test_table_step_and_json_for_several_world_sizes(compare):
    output, figures = compare("--world_size 2 1 --batch_size 32")
    assert {k: type(v) for k, v in figures.items()} == {
        "torch": str,
        "python": str,
        "device": str,
        "backend": str,
        "dataset_length": int,
        "input_size": int,
        "batch_size": int,
        "epochs": int,
        "runs": list,
    }
    report = output[output.index("           global") :]
    assert max(map(len, report.splitlines())) <= 80
    for run, n in zip(figures["runs"], (2, 1)):
        assert run["world_size"] == n and run["global_batch_size"] == 32 * n
        for how in ("normal", "ddp"):
            samples = run[how]["seconds"] * run[how]["samples_per_second"]
            assert samples == pytest.approx(5 * 1000)
            assert 0.6 < run[how]["loss"] < 0.8 and 0.4 < run[how]["accuracy"] < 0.7
        speedup = run["normal"]["seconds"] / run["ddp"]["seconds"]
        assert run["speedup"] == pytest.approx(speedup)
        assert run["efficiency"] == pytest.approx(speedup / n)
        assert run["same_model"] is True and run["max_weight_difference"] < 1e-6
        row = re.search(rf"^ +{n} +{32 * n} .*$", report, re.MULTILINE).group().split()
        assert row[6:9] == [f"{speedup:.2f}x", f"{speedup / n:.0%}", "yes"]
        step = run["ddp_step_ms"]
        for part in ("data", "compute", "sync"):
            assert f"  {part:7} {step[part]:8.2f} ms" in report
        assert sum(step.values()) > 0
        how = (
            "faster" if speedup > 1.05 else "slower" if speedup < 0.95 else "no faster"
        )
        assert re.search(
            rf"DDP in {n} process(es)? is {how}: {speedup:.2f} times", report
        )


@pytest.mark.parametrize("encoding, bar", [("ascii", "#"), ("utf-8", "\u2588")])
def test_the_bar_is_ascii_where_the_terminal_is(monkeypatch, encoding, bar):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    step = {"data": 1.0, "compute": 2.0, "sync": 2.0}
    ddp.print_step({"world_size": 2, "ddp_step_ms": step})
    terminal.seek(0)
    bars = [line.split(" ")[-1] for line in terminal.read().splitlines()]
    assert bars == ["ms", bar * 10, bar * 20, bar * 20]


def test_following_the_advice_raises_the_efficiency(compare):
    output, before = compare("--dataset_length 8000 --batch_size 16")
    advice = re.search(r"(--grad_accum_steps|--batch_size)\s(\d+)", output)
    output, after = compare(
        "--dataset_length 8000 --batch_size 16 " + " ".join(advice.groups())
    )
    assert after["runs"][0]["efficiency"] > before["runs"][0]["efficiency"]


@pytest.mark.skipif(not shutil.which("taskset"), reason="needs taskset")
def test_more_processes_than_cores_are_said_to_be_so(finish):
    run = finish(["taskset", "-c", "0"] + DDP + ["--epochs", "1"])
    assert "They share 1 core(s) and take turns" in " ".join(run.stdout.split())


def test_the_probe_changes_nothing_else(compare, folder):
    with_probe = compare()[1]["runs"][0]
    edit(folder / "ddp.py", NO_PROBE)
    output, figures = compare()
    without = figures["runs"][0]
    assert "takes too long" in output and without["ddp_step_ms"] is None
    for key in ("loss", "accuracy"):
        assert with_probe["ddp"][key] == without["ddp"][key]
    assert with_probe["max_weight_difference"] == without["max_weight_difference"]


@pytest.mark.parametrize(
    "mistake, flags",
    [
        (UNSHARDED, ""),
        (OWN_DATA, ""),
        (NO_SYNC_LEFT_ON, "--learning_rate 1e-5"),
        (NO_SYNC_LEFT_ON, "--learning_rate 1e-5 --amp"),
    ],
    ids=["shards overlap", "data drawn per rank", "no_sync left on", "with --amp"],
)
def test_a_broken_ddp_is_seen(compare, folder, mistake, flags):
    edit(folder / "ddp.py", mistake, NO_PROBE)
    output, figures = compare(flags, code=1)
    assert figures["runs"][0]["same_model"] is False
    assert "DDP training is not right" in " ".join(output.split())


def test_models_with_batchnorm_may_differ(compare, folder):
    replace_body(folder / "ddp.py", "MyModel", MODEL)
    replace_body(folder / "ddp.py", "MyDataset", DATASET)
    edit(folder / "ddp.py", NO_PROBE)
    output, figures = compare("--epochs 1")
    assert figures["runs"][0]["same_model"] is False
    assert "as they have to with BatchNorm or dropout" in " ".join(output.split())


def test_a_model_that_becomes_nan_is_no_success(compare, folder):
    forward = "return self.linear(inputs)"
    edit(folder / "ddp.py", (forward, forward + " * float('nan')"), NO_PROBE)
    _, figures = compare("--epochs 1", code=1)
    assert figures["runs"][0]["same_model"] is False
    assert figures["runs"][0]["ddp"]["loss"] is None  # JSON has no NaN


@pytest.mark.parametrize("world_size", ["2", "3"])
def test_the_same_model_for_random_combinations(finish, folder, world_size):
    shutil.copy(str(ROOT / "tests" / "property_driver.py"), str(folder))
    run = finish([sys.executable, "property_driver.py", world_size, "60", "1"])
    assert (
        run.stderr == ""
        and run.stdout == f"60 combinations in {world_size} processes\n"
    )


@pytest.mark.parametrize("path", ["no/such/folder.json", ".", "/dev/null"])
def test_a_json_file_that_cannot_be_written(finish, folder, path):
    run = finish(DDP + ["--json", path], 2)
    assert run.stdout == "" and run.stderr.count("\n") == 1
    assert f"--json: cannot write {path}" in run.stderr
    assert not list(folder.glob("*.tmp"))
