"""The snapshot file: whole, damaged, of another run, on a full disk."""

import argparse
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from conftest import load, same

import torchrun_ddp

FLAGS = {"input_size": 5, "batch_size": 4, "learning_rate": 0.1, "epochs": 3}
FLAGS.update(grad_accum_steps=1, max_grad_norm=0.0, dataset_length=40, seed=0)
DONE = (2, 12)  # epochs, samples


@pytest.fixture
def args(tmp_path):
    """The arguments of a run, in a process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    path = str(tmp_path / "snapshot.pt")
    yield argparse.Namespace(snapshot_path=path, precision="float32", **FLAGS)
    if dist.is_initialized():
        torchrun_ddp.leave_group()


def untrained(optimizer=torch.optim.Adam, float16=False, cycle=False):
    """Return a model and its training."""
    model = torchrun_ddp.MyModel(5)
    optimizer = optimizer(model.parameters(), lr=0.1)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    scheduler = one_cycle(optimizer, 0.1, total_steps=9) if cycle else None
    scaler = torch.amp.GradScaler("cpu", enabled=float16)
    return model, torchrun_ddp.Training(optimizer, scheduler, scaler)


def trained(**options):
    """Return the same, after a step."""
    model, training = untrained(**options)
    model(torch.ones(3, 5)).sum().backward()
    training.optimizer.step()
    return model, training


def save(args, parts, done=DONE):
    torchrun_ddp.save_snapshot(args, *parts, *done)


def test_what_is_saved_is_loaded(args):
    parts = trained()
    save(args, parts)
    saved = load(args.snapshot_path)
    assert saved["model"].keys() == torchrun_ddp.MyModel(5).state_dict().keys()
    args.epochs, args.precision = 9, "float16"  # these may change
    others = untrained()
    assert torchrun_ddp.load_snapshot(args, *others) == DONE
    assert same(others[0].state_dict(), parts[0].state_dict())
    states = [training.optimizer.state_dict() for _, training in (parts, others)]
    assert same(*states)
    assert os.listdir(os.path.dirname(args.snapshot_path)) == ["snapshot.pt"]


def test_without_a_file_training_starts(args):
    assert torchrun_ddp.load_snapshot(args, *untrained()) == (0, 0)
    args.snapshot_path = None
    assert torchrun_ddp.load_snapshot(args, *untrained()) == (0, 0)


@pytest.mark.parametrize("before", [True, False])
def test_a_scaler_may_come_and_go(args, before):
    """A run can move to GPUs of another kind."""
    save(args, trained(float16=before))
    assert bool(load(args.snapshot_path)["scaler"]) == before
    others = untrained(float16=not before)
    state = others[1].scaler.state_dict()
    assert torchrun_ddp.load_snapshot(args, *others) == DONE
    assert others[1].scaler.state_dict() == state


def test_a_schedule_is_kept_and_does_not_come_and_go(args, capfd):
    parts = trained(cycle=True)
    parts[1].scheduler.step()
    save(args, parts)
    others = untrained(cycle=True)
    assert torchrun_ddp.load_snapshot(args, *others) == DONE
    assert others[1].scheduler.last_epoch == 1
    args.epochs = 4  # another plan
    with pytest.raises(SystemExit):
        torchrun_ddp.load_snapshot(args, *untrained(cycle=True))
    assert "it was made with --epochs 3" in capfd.readouterr().err


def test_weights_that_are_not_finite_replace_nothing(args):
    model, training = trained()
    save(args, (model, training))
    before = Path(args.snapshot_path).read_bytes()
    with torch.no_grad():
        model.linear.bias[1] = float("nan")
    with pytest.raises(SystemExit) as error:
        save(args, (model, training), (3, 0))
    assert "not finite any more: the last snapshot is kept" in str(error.value.code)
    assert Path(args.snapshot_path).read_bytes() == before


def test_what_could_not_be_loaded_again_replaces_nothing(args):
    """A learning rate that is a number of NumPy."""
    save(args, trained())
    before = Path(args.snapshot_path).read_bytes()
    model, training = trained()
    training.optimizer.param_groups[0]["lr"] = numpy.float64(0.1)
    with pytest.raises(pickle.UnpicklingError):
        save(args, (model, training))
    assert Path(args.snapshot_path).read_bytes() == before


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
        ({"settings": {"dropout": 0.1}}, "KeyError('dropout')"),
        ({"settings": {}, "model": {"other": torch.ones(1)}}, "Error(s) in loading"),
        ("another optimizer", "parameter group"),
    ],
)
def test_a_file_that_does_not_fit(args, capfd, monkeypatch, tmp_path, bad, reason):
    monkeypatch.chdir(tmp_path)
    parts = trained()
    path = tmp_path / "snapshot.pt"
    if bad == "directory":
        path.mkdir()
    elif bad == "another optimizer":
        model, training = trained()
        two = torch.optim.Adam([{"params": [p]} for p in model.parameters()])
        save(args, (model, training._replace(optimizer=two)))
    elif bad == "truncated":
        save(args, parts)
        path.write_bytes(path.read_bytes()[:-200])
    elif isinstance(bad, bytes):
        path.write_bytes(bad)
    else:
        torch.save(bad, str(path))
    before = None if bad == "directory" else path.read_bytes()
    with pytest.raises(SystemExit) as error:
        torchrun_ddp.load_snapshot(args, *parts)
    says = capfd.readouterr().err
    assert error.value.code == 1
    lines = [line for line in says.splitlines() if "cannot resume" in line]
    assert len(lines) == 1 and f"cannot resume from {path}: " in lines[0]
    assert reason in lines[0]
    assert before is None or path.read_bytes() == before
    assert os.listdir(str(tmp_path)) == ["snapshot.pt"]  # nothing was executed


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
    args.snapshot_path = str(small_disk / "snapshot.pt")
    save(args, trained(), (1, 0))
    with open(str(small_disk / "filler"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass
    with pytest.raises((OSError, RuntimeError)):
        save(args, trained(), (2, 0))
    assert load(args.snapshot_path)["epoch"] == 1


def test_a_path_that_cannot_be_written_shows_at_once(args):
    args.snapshot_path = "no/such/folder/a.pt"
    with pytest.raises(FileNotFoundError, match="no/such/folder/a.pt.tmp"):
        torchrun_ddp.load_snapshot(args, *untrained())
