"""The documented commands, and what people change: each run is checked for all it shows."""

import json
import re

import pytest
import torch
from conftest import SCRIPTS, TORCHRUN, epoch_lines, load


def assert_quiet(run):
    """Check that stderr is empty, but for a remark of torchrun of PyTorch 2.0."""
    assert all("master_addr is" in line for line in run.stderr.splitlines()), run.stderr


def pairs_of_lines(output):
    """Check that epoch lines come in pairs with equal metrics; return how many pairs."""
    lines = epoch_lines(output)
    for normal, ddp in zip(lines[::2], lines[1::2]):
        assert ddp == (
            pytest.approx(normal[0], abs=2e-4),
            pytest.approx(normal[1], abs=0.2),
        )
    return len(lines) / 2


def test_the_documented_ddp_command(finish):
    flags = (
        "--backend gloo --epochs 10 --batch_size 128 --input_size 200 --world_size 2"
    )
    run = finish(SCRIPTS["ddp"], flags)
    assert_quiet(run)
    assert run.stdout.startswith(f"PyTorch {torch.__version__} on cpu with gloo\n")
    assert "world size 2, global batch 256, CPU threads" in run.stdout
    assert "\nDDP is right: its gradients are normal training's" in run.stdout
    assert pairs_of_lines(run.stdout) == 10
    for name in ("Normal", "DDP"):
        assert re.search(
            rf"^{name} training time: [\d.]+ seconds$", run.stdout, re.MULTILINE
        )
    assert max(map(len, run.stdout.splitlines())) <= 80


def test_ddp_alone_with_several_world_sizes_and_json(finish, folder):
    """With ranks that do not divide the samples, shorter last steps, and bfloat16."""
    flags = "--world_size 3 1 1 --dataset_length 1001 --batch_size 7 --epochs 2"
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
    assert [run["world_size"] for run in figures["runs"]] == [3, 1, 1]
    for result in figures["runs"]:
        n = result["world_size"]
        assert result["global_batch_size"] == 7 * n
        for way in ("normal", "ddp"):
            samples = result[way]["seconds"] * result[way]["samples_per_second"]
            assert samples == pytest.approx(2 * -(-1001 // n) * n)
            assert (
                0.6 < result[way]["loss"] < 0.9 and 0.4 < result[way]["accuracy"] < 0.6
            )
        speedup = result["normal"]["seconds"] / result["ddp"]["seconds"]
        low, high = result["speedup_range"]
        assert low <= result["speedup"] <= high
        assert result["speedup"] == pytest.approx(speedup)
        assert result["efficiency"] == pytest.approx(speedup / n)
        assert result["same_gradients"] and 0 <= result["gradient_difference"] < 0.2
        assert result["max_weight_difference"] < 0.5 and result["gradient_bytes"] == 808
        assert set(result["ddp_step_ms"]) == {"data", "compute", "sync"}
        assert min(result["ddp_step_ms"].values()) >= 0
        row = rf"^ +{n} +{7 * n} .* {result['speedup']:.2f} .* yes$"
        assert re.search(row, run.stdout, re.MULTILINE)


def test_ddp_reads_dotenv_and_the_environment_wins(finish, folder):
    (folder / ".env").write_text("MASTER_ADDR=127.0.0.1\nMASTER_PORT=not-a-port\n")
    assert "MASTER_PORT=not-a-port" in finish(SCRIPTS["ddp"], code=2).stderr
    finish(SCRIPTS["ddp"], "--epochs 1", env={"MASTER_PORT": "0"})


def test_the_documented_torchrun_command(finish, folder):
    launch = "--nproc_per_node=2 --nnodes=1 --node_rank=0 --master_addr=127.0.0.1"
    flags = "--backend gloo --epochs 5 --batch_size 64 --input_size 100"
    before = sorted(folder.iterdir())
    launch += f" --master_port=29500 torchrun_ddp.py {flags}"
    run = finish([*TORCHRUN, *launch.split()])
    assert_quiet(run)
    lines = run.stdout.splitlines()
    assert re.match(r"\S+: 2 of 2 processes on cpu, backend gloo$", lines[0])
    assert len(epoch_lines(run.stdout)) == 5 and len(lines) == 7, run.stdout
    assert re.match(r"DDP training time: [\d.]+ seconds$", lines[-1])
    written = [p for p in folder.iterdir() if p not in before]
    assert {p.name for p in written} <= {"stdout", "stderr", "__pycache__"}


def test_both_scripts_train_the_same_model(finish, folder):
    """The metrics of torchrun_ddp.py are over all ranks: those of normal training."""
    flags = "--dataset_length 501 --batch_size 9 --grad_accum_steps 2 --epochs 3"
    one = finish(SCRIPTS["torchrun"], f"{flags} --snapshot_path snapshot.pt").stdout
    other = finish(SCRIPTS["ddp"], flags).stdout
    assert epoch_lines(one) == epoch_lines(other)[1::2]
    assert pairs_of_lines(other) == 3
    assert load(folder / "snapshot.pt")["epoch"] == 3


def test_ranks_have_the_same_data_in_disjoint_shards_anew_each_epoch(
    finish, variant, folder
):
    code = "script.MyDataset = RecordedSamples"
    finish(variant("torchrun", code), "--dataset_length 400 --epochs 2")
    read = [(folder / f"samples of rank {r}").read_text().split() for r in (0, 1)]
    assert len(set(read[0][1::2] + read[1][1::2])) == 1  # checksums
    epochs = [[list(map(int, r[:400:2])) for r in read]]
    epochs += [[list(map(int, r[400::2])) for r in read]]
    for shard, other in epochs:
        assert sorted(shard + other) == list(range(400))
    assert sorted(epochs[0][0]) != sorted(epochs[1][0])
    assert epochs[0][0] != sorted(epochs[0][0])  # shuffled


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("workers", [0, 1])
def test_another_model_and_dataset(finish, variant, name, workers):
    """An ordinary dataset, without __getitems__, and a CNN with BatchNorm."""
    code = "script.MyModel, script.MyDataset = BatchNormCNN, Images"
    flags = f"--dataset_length 1000 --batch_size 32 --epochs 3 --num_workers {workers}"
    run = finish(variant(name, code), flags)
    assert_quiet(run)
    losses = [loss for loss, _ in epoch_lines(run.stdout)]
    assert losses[-1] < losses[0] / 2, run.stdout
    if name == "ddp":
        assert "DDP is right: without BatchNorm2d" in " ".join(run.stdout.split())
