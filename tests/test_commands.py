"""The documented commands: each run is checked for all it shows."""

import json
import re

import pytest
import torch
from conftest import (
    SCRIPTS,
    STANDALONE,
    TORCHRUN,
    both_ways,
    epoch_lines,
    load,
    validation_lines,
)

RECORDED = {"run": "train", "MyDataset": "RecordedSamples"}
RECORDED["flags"] = "--dataset_length 410 --epochs 2 --batch_size 5"
CASES = {2: {"recorded": RECORDED}}


def assert_equal_columns(rows):
    """Check that normal training and DDP have the same metrics in each epoch."""
    for normal, ddp in rows:
        assert list(normal) == list(ddp) == ["loss", "accuracy", "rate"]
        assert ddp["loss"] == pytest.approx(normal["loss"], abs=2e-4)
        assert ddp["accuracy"] == pytest.approx(normal["accuracy"], abs=0.002)


def leave_only(name, folder):
    """Delete the other files: each script runs where it is alone."""
    for path in folder.iterdir():
        if path.name != name:
            path.unlink()


def test_the_documented_ddp_command(finish, folder):
    """Also, it reads .env, but the environment wins."""
    leave_only("ddp.py", folder)
    (folder / ".env").write_text("MASTER_ADDR=127.0.0.1\nMASTER_PORT=not-a-port\n")
    assert "MASTER_PORT=not-a-port" in finish(SCRIPTS["ddp"], code=2).stderr
    flags = "--epochs 10 --batch_size 128 --input_size 200 --world_size 2"
    run = finish(SCRIPTS["ddp"], f"--backend gloo {flags}", env={"MASTER_PORT": "0"})
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[0] == f"PyTorch {torch.__version__} on cpu, gloo, float32"
    assert re.match(r"world size 2, global batch 256, \d+ cores$", lines[1])
    right = "DDP is right: on one batch per rank, its gradients match those of normal"
    assert lines[2:4] == [right, "training (largest relative difference: 0)."]
    rows = both_ways(run.stdout)
    assert len(rows) == 10
    assert_equal_columns(rows)
    for name in ("Normal", "DDP"):
        pattern = rf"^{name} training time: [\d.]+ seconds$"
        assert re.search(pattern, run.stdout, re.MULTILINE)
    assert max(map(len, lines)) <= 80


def test_the_json_and_that_both_train_the_same_model(finish, folder, world_size=3):
    """With ranks that do not divide the samples, and a last step of fewer batches."""
    flags = f"--world_size {world_size} --dataset_length 1001 --batch_size 7 --epochs 2"
    flags += " --grad_accum_steps 3 --precision bfloat16 --json figures.json"
    run = finish(SCRIPTS["ddp"], flags)
    assert run.stderr == ""
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["world_size"] == world_size and figures["epochs"] == 2
    assert figures["precision"] == "bfloat16" and figures["backend"] == "gloo"
    samples = 1001 // world_size // 7 * 7 * world_size
    assert figures["torch"] == torch.__version__ and figures["device"] == "cpu"
    assert len(figures["compute_ms_by_rank"]) == world_size
    for way in ("normal", "ddp"):
        assert len(figures[way]) == 2  # epochs
        for result in figures[way]:
            assert result["samples"] == samples and result["seconds"] > 0
            means = result["means"]
            assert 0.6 < means["loss"] < 0.9 and 0.4 < means["accuracy"] < 0.65
    assert figures["same_gradients"] is True and figures["same_weights"] is True
    assert 0 <= figures["gradient_difference"] < 1e-5
    assert figures["gradient_bytes"] == 808
    assert set(figures["ddp_step_ms"]) == {"data", "compute", "sync"}
    rows = both_ways(run.stdout)
    assert_equal_columns(rows)
    # torchrun_ddp.py has the same metrics: over all ranks.
    command = [*STANDALONE, f"--nproc_per_node={world_size}", "torchrun_ddp.py"]
    flags = f"{flags.partition('--json')[0]} --snapshot_path snapshot.pt"
    flags = flags.replace(f"--world_size {world_size}", "")
    for (_, ddp), there in zip(rows, epoch_lines(finish(command, flags).stdout)):
        assert ddp["loss"] == pytest.approx(there["loss"], abs=0.01)  # of more samples
    snapshot = load(folder / "snapshot.pt")
    assert snapshot["epochs_done"] == len(rows) == 2
    assert list(snapshot["model"]) == ["linear.weight", "linear.bias"]  # no "module."


def test_the_documented_torchrun_command(finish, folder):
    launch = "--nproc_per_node=2 --nnodes=1 --node_rank=0 --master_addr=127.0.0.1"
    flags = "--backend gloo --epochs 5 --batch_size 64 --input_size 100"
    leave_only("torchrun_ddp.py", folder)
    launch += f" --master_port=29500 torchrun_ddp.py {flags}"
    run = finish([*TORCHRUN, *launch.split()])
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[0] == "world size 2 on cpu, gloo, float32"
    assert len(epoch_lines(run.stdout)) == len(validation_lines(run.stdout)) == 5
    assert len(lines) == 12 and max(map(len, lines[1:])) <= 80, run.stdout
    assert re.match(r"DDP training time: [\d.]+ seconds$", lines[-1])
    written = {path.name.split()[0] for path in folder.iterdir()}
    assert written == {"torchrun_ddp.py", "stdout", "stderr"}


def test_ranks_have_the_same_data_in_disjoint_shards_anew_each_epoch(results):
    """The validation samples, too, and each of these just once."""

    def read(use):
        paths = [results["folder"] / f"{use} of rank {rank}" for rank in (0, 1)]
        return [path.read_text().split() for path in paths]

    samples, others = read("samples"), read("validation")
    assert len(set(samples[0][1::2] + samples[1][1::2])) == 1  # checksums
    # The first five are the ones that the ranks compare.
    shards = [list(map(int, each[::2])) for each in samples]
    assert shards[0][:5] == shards[1][:5] and len(shards[0]) == 5 + 2 * 205
    epochs = [[s[5:210] for s in shards], [s[210:] for s in shards]]
    for shard, other in epochs:
        assert sorted(shard + other) == list(range(410))
    assert sorted(epochs[0][0]) != sorted(epochs[1][0])
    assert epochs[0][0] != sorted(epochs[0][0])  # shuffled
    assert sorted(map(int, others[0][::2] + others[1][::2])) == sorted([*range(41)] * 2)
    assert set(others[0][1::2] + others[1][1::2]).isdisjoint(samples[0][1::2])
