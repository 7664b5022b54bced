"""The documented commands, and what people bring: each run is checked for all it shows."""

import json
import re

import pytest
import torch
from conftest import (
    SCRIPTS,
    TORCHRUN,
    epoch_lines,
    load,
    side_by_side,
    validation_lines,
)
from models import JOBS


def assert_quiet(run):
    """Check that stderr is empty, but for a remark of torchrun of PyTorch 2.0."""
    assert all("master_addr is" in line for line in run.stderr.splitlines()), run.stderr


def assert_equal_columns(rows):
    """Check that normal training and DDP have the same metrics in each epoch."""
    for loss, accuracy, ddp_loss, ddp_accuracy, _ in rows:
        assert ddp_loss == pytest.approx(loss, abs=2e-4)
        assert ddp_accuracy == pytest.approx(accuracy, abs=0.2)


def test_the_documented_ddp_command(finish, folder):
    """Also, it reads .env, but the environment wins."""
    (folder / ".env").write_text("MASTER_ADDR=127.0.0.1\nMASTER_PORT=not-a-port\n")
    assert "MASTER_PORT=not-a-port" in finish(SCRIPTS["ddp"], code=2).stderr
    flags = (
        "--backend gloo --epochs 10 --batch_size 128 --input_size 200 --world_size 2"
    )
    run = finish(SCRIPTS["ddp"], flags, env={"MASTER_PORT": "0"})
    assert_quiet(run)
    assert not re.search(r"^ world", run.stdout, re.MULTILINE)  # of one size: no table
    assert run.stdout.startswith(f"PyTorch {torch.__version__} on cpu with gloo\n")
    assert "\nworld size 2, global batch 256, float32\n" in run.stdout
    assert "Each process stands for a device, with " in run.stdout
    assert "\nDDP is right: its gradients are normal training's (" in run.stdout
    rows = side_by_side(run.stdout)
    assert len(rows) == 10
    assert_equal_columns(rows)
    for name in ("Normal", "DDP"):
        assert re.search(
            rf"^{name} training time: [\d.]+ seconds$", run.stdout, re.MULTILINE
        )
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_ddp_alone_with_several_world_sizes_and_json(finish, folder):
    """With ranks that do not divide the samples, shorter last steps, and bfloat16."""
    flags = "--world_size 3 1 --dataset_length 1001 --batch_size 7 --epochs 2"
    flags += " --grad_accum_steps 3 --amp --json figures.json"
    run = finish(SCRIPTS["ddp"], flags)
    assert_quiet(run)
    figures = json.loads((folder / "figures.json").read_text())
    types = {key: type(value) for key, value in figures.items()}
    for keys, kind in (
        ("torch python device backend", str),
        ("dataset_length input_size batch_size epochs", int),
        ("runs", list),
    ):
        assert {types[key] for key in keys.split()} == {kind}
    assert [run["world_size"] for run in figures["runs"]] == [3, 1]
    blocks = run.stdout.split("\nworld size ")[1:]
    for result, block in zip(figures["runs"], blocks):
        n = result["world_size"]
        assert result["global_batch_size"] == 7 * n * 3
        assert result["precision"] == "bfloat16" and result["backend"] == "gloo"
        for way in ("normal", "ddp"):
            samples = result[way]["seconds"] * result[way]["samples_per_second"]
            assert samples == pytest.approx(2 * -(-1001 // n) * n)
            assert (
                0.6 < result[way]["loss"] < 0.9 and 0.4 < result[way]["accuracy"] < 0.65
            )
        speedup = result["normal"]["seconds"] / result["ddp"]["seconds"]
        low, high = result["speedup_range"]
        assert low <= result["speedup"] <= high
        assert result["speedup"] == pytest.approx(speedup)
        assert result["efficiency"] == pytest.approx(speedup / n)
        assert result["same_gradients"] is True
        assert 0 <= result["gradient_difference"] < 1e-5
        assert result["mixes_samples"] is (False if n > 1 else None)
        assert result["max_weight_difference"] < 0.5 and result["gradient_bytes"] == 808
        parts = result["ddp_step_ms"]
        assert set(parts) == {"data", "compute", "sync"} and min(parts.values()) >= 0
        # Figures on one screen agree.
        ratio = result["normal_step_ms"] / sum(parts.values())
        assert ratio == pytest.approx(result["speedup"])
        assert f"{result['normal_step_ms']:.2f} ms normally" in block
        rows = side_by_side(block)
        assert_equal_columns(rows)
        assert [min(r[-1] for r in rows), max(r[-1] for r in rows)] == [
            pytest.approx(low, abs=0.006),
            pytest.approx(high, abs=0.006),
        ]
        row = rf"^ +{n} +{7 * n * 3} .* {result['speedup']:.2f} .*%$"
        assert re.search(row, run.stdout, re.MULTILINE)


def test_the_documented_torchrun_command(finish, folder):
    launch = "--nproc_per_node=2 --nnodes=1 --node_rank=0 --master_addr=127.0.0.1"
    flags = "--backend gloo --epochs 5 --batch_size 64 --input_size 100"
    before = sorted(folder.iterdir())
    launch += f" --master_port=29500 torchrun_ddp.py {flags}"
    run = finish([*TORCHRUN, *launch.split()])
    assert_quiet(run)
    lines = run.stdout.splitlines()
    assert re.match(r"\S+: 2 of 2 processes on cpu, backend gloo, float32$", lines[0])
    assert len(epoch_lines(run.stdout)) == len(validation_lines(run.stdout)) == 5
    assert len(lines) == 12 and max(map(len, lines[1:])) <= 80, run.stdout
    assert re.match(r"DDP training time: [\d.]+ seconds$", lines[-1])
    written = [p for p in folder.iterdir() if p not in before]
    assert {p.name for p in written} <= {"stdout", "stderr", "__pycache__"}


def test_both_scripts_train_the_same_model(finish, folder):
    """The metrics of torchrun_ddp.py are over all ranks: those of normal training."""
    flags = "--dataset_length 501 --batch_size 9 --grad_accum_steps 2 --epochs 3"
    one = finish(SCRIPTS["torchrun"], f"{flags} --snapshot_path snapshot.pt").stdout
    other = finish(SCRIPTS["ddp"], flags).stdout
    rows = side_by_side(other)
    assert epoch_lines(one) == [row[2:4] for row in rows] and len(rows) == 3
    assert_equal_columns(rows)
    snapshot = load(folder / "snapshot.pt")
    assert snapshot["epoch"] == 3
    assert list(snapshot["model"]) == ["linear.weight", "linear.bias"]  # no "module."


def test_ranks_have_the_same_data_in_disjoint_shards_anew_each_epoch(
    finish, variant, folder
):
    """The validation samples, too, and each of these just once."""
    code = "script.MyDataset = RecordedSamples"
    finish(variant("torchrun", code), "--dataset_length 410 --epochs 2")
    read = [(folder / f"samples of rank {r}").read_text().split() for r in (0, 1)]
    assert len(set(read[0][1::2] + read[1][1::2])) == 1  # checksums
    epochs = [[list(map(int, r[:410:2])) for r in read]]
    epochs += [[list(map(int, r[410::2])) for r in read]]
    for shard, other in epochs:
        assert sorted(shard + other) == list(range(410))
    assert sorted(epochs[0][0]) != sorted(epochs[1][0])
    assert epochs[0][0] != sorted(epochs[0][0])  # shuffled
    others = [(folder / f"validation of rank {r}").read_text().split() for r in (0, 1)]
    assert sorted(map(int, others[0][::2] + others[1][::2])) == sorted([*range(41)] * 2)
    assert set(others[0][1::2] + others[1][1::2]).isdisjoint(read[0][1::2])


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_model_and_dataset(finish, variant, name):
    """A CNN with BatchNorm, random augmentation, and workers."""
    code = "script.MyModel, script.MyDataset = BatchNormCNN, TorchAugmented"
    flags = "--dataset_length 1000 --batch_size 32 --epochs 3 --num_workers 1"
    run = finish(variant(name, code), flags)
    assert_quiet(run)
    if name == "ddp":
        losses = [row[0] for row in side_by_side(run.stdout)]
        says = " ".join(run.stdout.split())
        assert "DDP is right" in says and "Samples of a batch affect each other" in says
    else:
        losses = [loss for loss, _ in epoch_lines(run.stdout)]
        assert validation_lines(run.stdout)[-1][1] > 95
    assert losses[-1] < losses[0] / 2, run.stdout


def test_whatever_people_bring_trains_in_both_scripts(run_cases):
    """Three definitions are replaced, or four, and nothing else."""
    flags = "--dataset_length 400 --epochs 3 --learning_rate 0.01"
    cases = [
        {"run": run, "flags": flags, **job}
        for job in JOBS.values()
        for run in ("train", "compare")
    ]
    results = run_cases(2, cases)
    for name, (_, lines), (_, figures) in zip(JOBS, results[::2], results[1::2]):
        output = "\n".join(lines["lines"])
        losses = [loss for loss, _ in epoch_lines(output)]
        assert len(losses) == 3 and losses[-1] < losses[0], (name, output)
        assert len(validation_lines(output)) == 3 and lines["equal"], (name, output)
        assert figures["same_gradients"] is True, (name, figures)
        assert figures["max_weight_difference"] < 1, (name, figures)
        assert figures["ddp"]["loss"] < losses[0], (name, figures)


@pytest.mark.parametrize(
    "size, says", [(64, "must count samples, not tokens"), (9000, "")]
)
def test_tokens_in_place_of_samples_are_an_error(finish, variant, size, says):
    """At the first batch or, where it is small, at the end of the first epoch."""
    code = "script.MyDataset, script.MyModel = PaddedTexts, TextModel\n"
    code += "script.compute_loss = tokens_counted"
    flags = f"--dataset_length 500 --batch_size {size}"
    run = finish(variant("torchrun", code), flags, code=1)
    assert (says or "compute_loss counted 5000 samples instead of 250") in run.stderr
    assert "epoch 1" not in run.stdout


def test_validation_is_the_same_on_each_world_size(run_cases):
    """To the last digit, of untrained weights; also where ranks have none."""
    found = []
    flags = "--learning_rate 0 --epochs 2 --dataset_length {} --batch_size 7"
    for world_size in (1, 3):
        case = {"run": "train", "MyDataset": "Images", "MyModel": "CNN"}
        cases = [dict(case, flags=flags.format(length)) for length in (10, 430)]
        more = {"MyModel": "BatchNormCNN", "flags": flags.format(150)}  # 15 samples
        results = run_cases(world_size, [*cases, dict(case, **more)])
        outputs = ["\n".join(result["lines"]) for _, result in results]
        found.append([validation_lines(output) for output in outputs[:2]])
        assert len(validation_lines(outputs[2])) == 2
    assert found[0] == found[1]
    assert [len(lines) for lines in found[0]] == [2, 2]
    assert found[0][1][0] == found[0][1][1]  # one loader for both epochs


def test_float16_with_a_scaler(run_cases):
    """It learns, and an overflow on one rank alone lets both skip the step."""
    case = {"run": "train", "MyDataset": "Images", "MyModel": "CNN"}
    case.update(
        flags="--dataset_length 400 --epochs 4 --amp", choose_precision="float16"
    )
    if torch.__version__ < "2.3":
        pytest.skip("before PyTorch 2.3, only GPUs have a scaler")
    cases = [case, dict(case, compute_loss="infinite_on_rank_1")]
    for case, result in run_cases(2, cases):
        lines = epoch_lines("\n".join(result["lines"]))
        assert lines[-1][0] < 0.2 and lines[-1][1] > 95, (case, result)
        assert result["equal"], case
