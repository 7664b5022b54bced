"""The snapshot file: whole, damaged, of another run, on a full disk."""

import argparse
import gc
import os
import pickle
import shutil
import subprocess

import pytest
import torch
import torch.distributed as dist
from conftest import SCRIPTS, load, same

import torchrun_ddp

FLAGS = {"input_size": 5, "batch_size": 4, "learning_rate": 0.1, "epochs": 3}
DONE = {"epoch": 2, "samples": 12}


@pytest.fixture
def args(tmp_path):
    """The arguments of a run, in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    path = str(tmp_path / "snapshot.pt")
    yield argparse.Namespace(snapshot_path=path, precision="float32", **FLAGS)
    if dist.is_initialized():
        gc.collect()  # PyTorch 2.0 can hang if its thread is still freeing a message
        dist.destroy_process_group()


CPU = torch.device("cpu")


def untrained():
    """Return a model, its optimizer, and a scaler that does nothing."""
    model = torchrun_ddp.MyModel(5)
    optimizer = torchrun_ddp.make_optimizer(model, 0.1)
    return model, optimizer, torchrun_ddp.make_scaler("float32", CPU)


def trained():
    """Return the same, after a step."""
    model, optimizer, scaler = untrained()
    model(torch.ones(3, 5)).sum().backward()
    optimizer.step()
    return model, optimizer, scaler


def test_what_is_saved_is_loaded(args):
    model, optimizer, scaler = trained()
    torchrun_ddp.save_snapshot(args, model, optimizer, scaler, *DONE.values())
    saved = load(args.snapshot_path)
    assert saved["model"].keys() == torchrun_ddp.MyModel(5).state_dict().keys()
    args.epochs, args.precision = 9, "float16"  # these may change
    other, other_optimizer, scaler = untrained()
    where = torchrun_ddp.load_snapshot(args, other, other_optimizer, scaler)
    assert where == tuple(DONE.values())
    assert same(other.state_dict(), model.state_dict())
    assert same(other_optimizer.state_dict(), optimizer.state_dict())
    assert os.listdir(os.path.dirname(args.snapshot_path)) == ["snapshot.pt"]


def test_without_a_file_training_starts(args):
    parts = untrained()
    assert torchrun_ddp.load_snapshot(args, *parts) == (0, 0)
    args.snapshot_path = None
    assert torchrun_ddp.load_snapshot(args, *parts) == (0, 0)


@pytest.mark.skipif(torch.__version__ < "2.3", reason="a scaler on the CPU is newer")
@pytest.mark.parametrize(
    "precisions", [("float16", "bfloat16"), ("bfloat16", "float16")]
)
def test_a_scaler_may_come_and_go(args, precisions):
    """A run can move to GPUs of another kind."""
    model, optimizer, _ = trained()
    scalers = [torchrun_ddp.make_scaler(precision, CPU) for precision in precisions]
    before = scalers[1].state_dict()
    torchrun_ddp.save_snapshot(args, model, optimizer, scalers[0], *DONE.values())
    assert bool(load(args.snapshot_path)["scaler"]) == (precisions[0] == "float16")
    where = torchrun_ddp.load_snapshot(args, *untrained()[:2], scalers[1])
    assert where == tuple(DONE.values()) and scalers[1].state_dict() == before


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    "bad, reason",
    [
        (b"garbage" * 100, ""),
        (b"", "EOFError"),
        (pickle.dumps(Evil(), protocol=2), "UnpicklingError"),
        ("truncated", ""),
        ("directory", "IsADirectoryError"),
        ({"weight": torch.ones(2)}, "KeyError('settings')"),
        ({"settings": dict(FLAGS, batch_size=7)}, "it was made with --batch_size 7"),
        ({"settings": {"dropout": 0.1}}, "it was made with --dropout 0.1"),
        ({"settings": {}, "model": {"other": torch.ones(1)}}, "Error(s) in loading"),
        ("another optimizer", "parameter group"),
    ],
)
def test_a_file_that_does_not_fit(args, capfd, monkeypatch, tmp_path, bad, reason):
    monkeypatch.chdir(tmp_path)
    model, optimizer, scaler = trained()
    path = tmp_path / "snapshot.pt"
    if bad == "directory":
        path.mkdir()
    elif bad == "another optimizer":
        two = [{"params": [weight]} for weight in model.parameters()]
        other = torch.optim.Adam(two)
        torchrun_ddp.save_snapshot(args, model, other, scaler, 1, 0)
    elif bad == "truncated":
        torchrun_ddp.save_snapshot(args, model, optimizer, scaler, 1, 0)
        path.write_bytes(path.read_bytes()[:-200])
    elif isinstance(bad, bytes):
        path.write_bytes(bad)
    else:
        torch.save(bad, str(path))
    before = None if bad == "directory" else path.read_bytes()
    with pytest.raises(SystemExit) as error:
        torchrun_ddp.load_snapshot(args, model, optimizer, scaler)
    says = capfd.readouterr().err
    assert error.value.code == 1
    lines = [line for line in says.splitlines() if "cannot resume" in line]
    assert len(lines) == 1 and f"cannot resume from {path}: " in lines[0]
    assert reason in lines[0]
    assert before is None or path.read_bytes() == before
    assert os.listdir(str(tmp_path)) == ["snapshot.pt"]  # nothing was executed


def test_under_torchrun_a_bad_snapshot_is_named_once(finish, folder):
    (folder / "snapshot.pt").write_bytes(b"garbage")
    run = finish(SCRIPTS["torchrun"], "--snapshot_path snapshot.pt", code=1)
    assert run.stderr.count("cannot resume from snapshot.pt: ") == 1
    assert (folder / "snapshot.pt").read_bytes() == b"garbage"
    assert "epoch" not in run.stdout and "closed by peer" not in run.stderr


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_the_old_file(args, small_disk):
    model, optimizer, scaler = trained()
    args.snapshot_path = str(small_disk / "snapshot.pt")
    torchrun_ddp.save_snapshot(args, model, optimizer, scaler, 1, 0)
    with open(str(small_disk / "filler"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass
    with pytest.raises((OSError, RuntimeError)):
        torchrun_ddp.save_snapshot(args, model, optimizer, scaler, 2, 0)
    assert load(args.snapshot_path)["epoch"] == 1
