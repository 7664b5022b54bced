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
FLAGS.update(precision="float32", num_workers=0, save_every=0, snapshot_path=None)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The path of a snapshot, in a process group of one."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    leave_group = torchrun_ddp.leave_group
    monkeypatch.setattr(
        torchrun_ddp, "leave_group", lambda: None
    )  # what refuses calls it
    yield str(tmp_path / "snapshot.pt")
    leave_group()


def untrained(**flags):
    return torchrun_ddp.Trainer(
        argparse.Namespace(**{**FLAGS, **flags}), torch.device("cpu")
    )


def trained(**flags):
    """Return a trainer after 2 epochs and 3 steps."""
    trainer = untrained(**flags)
    batch = trainer.dataset[:4]
    trainer.train_step([batch], torchrun_ddp.Metrics(trainer.device))
    trainer.epochs_done, trainer.batches_done = 2, 3
    return trainer


def saved(path, **flags):
    trainer = trained(**flags)
    torchrun_ddp.save_snapshot(trainer, path)
    return trainer


@pytest.fixture
def one_cycle(monkeypatch):
    def make_scheduler(optimizer, total_steps, args):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps)

    monkeypatch.setattr(torchrun_ddp, "make_scheduler", make_scheduler)


def refused(capfd, path, **flags):
    """Return why a snapshot is refused: one line, with the path."""
    before = Path(path).read_bytes() if os.path.isfile(path) else None
    with pytest.raises(SystemExit) as error:
        untrained(snapshot_path=path, **flags)
    assert error.value.code == 1
    assert before is None or Path(path).read_bytes() == before
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"--snapshot_path {path}: ")
    return line


def test_what_is_saved_is_loaded(path):
    one = saved(path)
    assert load(path)["model"].keys() == torchrun_ddp.MyModel(5).state_dict().keys()
    # These may change.
    other = untrained(snapshot_path=path, epochs=9, precision="bfloat16")
    assert (other.epochs_done, other.batches_done) == (2, 3)
    assert same(other.model.state_dict(), one.model.state_dict())
    assert same(other.optimizer.state_dict(), one.optimizer.state_dict())
    torchrun_ddp.save_snapshot(other, path)
    assert os.listdir(os.path.dirname(path)) == ["snapshot.pt"]


def test_without_a_file_training_starts(path):
    trainer = untrained(snapshot_path=path)
    assert (trainer.epochs_done, trainer.batches_done) == (0, 0)


@pytest.mark.parametrize("before", ["float16", "float32"])
def test_a_scaler_may_come_and_go(path, before):
    """A run can move to GPUs of another kind."""
    saved(path, precision=before)
    assert bool(load(path)["scaler"]) == (before == "float16")
    after = "float32" if before == "float16" else "float16"
    assert untrained(snapshot_path=path, precision=after).epochs_done == 2


def test_a_schedule_is_kept(path, one_cycle):
    saved(path)
    assert untrained(snapshot_path=path).scheduler.last_epoch == 1


def test_a_schedule_has_to_have_as_many_steps(path, one_cycle, capfd):
    saved(path)
    line = refused(capfd, path, epochs=4)
    assert line.endswith("steps of the scheduler was 30, now 40")


@pytest.mark.parametrize("flags", [{"seed": 1}, {"max_grad_norm": 1.0}])
def test_only_what_has_changed_is_named(path, capfd, flags):
    ((name, value),) = flags.items()
    saved(path)
    line = refused(capfd, path, **flags)
    assert line.endswith(f"ValueError: {name} was {FLAGS[name]}, now {value}")


def test_data_that_has_grown_is_refused(path, capfd):
    saved(path)
    line = refused(capfd, path, dataset_length=44)
    assert line.endswith("length of the dataset was 40, now 44")


def test_an_edited_optimizer_is_refused_and_named(path, capfd, monkeypatch):
    saved(path)
    line = refused(capfd, path, learning_rate=0.2)
    assert line.endswith("lr of parameter group 0 was 0.1, now 0.2")

    def make_optimizer(model, args):
        return torch.optim.Adam(model.parameters(), 0.1, weight_decay=0.3)

    monkeypatch.setattr(torchrun_ddp, "make_optimizer", make_optimizer)
    assert "weight_decay of parameter group 0 was 0" in refused(capfd, path)


def test_another_global_batch_is_only_mentioned(path, capfd):
    saved(path)
    trainer = untrained(snapshot_path=path, batch_size=8)
    assert trainer.batches_done == 1  # of 12 samples, rounded down
    says = "the global batch changes from 4 to 8; the learning rate does not"
    assert says in capfd.readouterr().out
    untrained(snapshot_path=path, batch_size=2, grad_accum_steps=2)
    assert "global batch" not in capfd.readouterr().out


def test_a_snapshot_of_another_training_is_not_replaced(path):
    """Whichever of two trainings with one path saves last stops."""
    one, other = (untrained(snapshot_path=path) for _ in range(2))
    torchrun_ddp.save_snapshot(one, path)
    torchrun_ddp.save_snapshot(one, path)
    before = Path(path).read_bytes()
    with pytest.raises(SystemExit) as error:
        torchrun_ddp.save_snapshot(other, path)
    assert f"another run has saved to {path}, so this one stops" in str(
        error.value.code
    )
    assert Path(path).read_bytes() == before
    third = untrained(snapshot_path=path)
    torchrun_ddp.save_snapshot(third, path)
    with pytest.raises(SystemExit):
        torchrun_ddp.save_snapshot(one, path)


def test_weights_that_are_not_finite_replace_nothing(path):
    trainer = saved(path)
    before = Path(path).read_bytes()
    with torch.no_grad():
        trainer.model.linear.bias[1] = float("nan")
    with pytest.raises(SystemExit) as error:
        torchrun_ddp.save_snapshot(trainer, path)
    assert "no longer finite, so no snapshot is saved" in str(error.value.code)
    assert Path(path).read_bytes() == before


def test_what_could_not_be_loaded_again_replaces_nothing(path):
    """A learning rate that is a number of NumPy."""
    trainer = saved(path)
    before = Path(path).read_bytes()
    trainer.optimizer.param_groups[0]["lr"] = numpy.float64(0.1)
    with pytest.raises(pickle.UnpicklingError):
        torchrun_ddp.save_snapshot(trainer, path)
    assert Path(path).read_bytes() == before


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
        ({"weight": torch.ones(2)}, "KeyError: 'settings'"),
        ({"settings": {}, "model": {"other": torch.ones(1)}}, "Error(s) in loading"),
        ("another optimizer", "parameter group"),
    ],
)
def test_a_file_that_does_not_fit(path, capfd, monkeypatch, tmp_path, bad, reason):
    monkeypatch.chdir(tmp_path)
    if bad == "directory":
        os.mkdir(path)
    elif bad == "another optimizer":
        trainer = trained()
        groups = [{"params": [p]} for p in trainer.model.parameters()]
        trainer.optimizer = torch.optim.Adam(groups)
        torchrun_ddp.save_snapshot(trainer, path)
    elif bad == "truncated":
        saved(path)
        Path(path).write_bytes(Path(path).read_bytes()[:-200])
    elif isinstance(bad, bytes):
        Path(path).write_bytes(bad)
    else:
        torch.save(bad, path)
    assert reason in refused(capfd, path)
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_leaves_the_old_file(path, small_disk):
    path = str(small_disk / "snapshot.pt")
    trainer = saved(path)
    with open(str(small_disk / "filler"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass
    trainer.epochs_done = 3
    with pytest.raises((OSError, RuntimeError)):
        torchrun_ddp.save_snapshot(trainer, path)
    assert load(path)["epochs_done"] == 2


def test_a_path_that_cannot_be_written_shows_at_once(path, capfd):
    line = refused(capfd, "no/such/folder/a.pt")
    assert "FileNotFoundError" in line and "no/such/folder/a.pt.tmp" in line
