"""torchrun_ddp.py is killed in all ways, and ends with the weights it always ends with."""

import importlib.util
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, TORCHRUN, edit
from hypothesis import given, settings
from hypothesis import strategies as st

spec = importlib.util.spec_from_file_location(
    "torchrun_ddp", str(ROOT / "torchrun_ddp.py")
)
torchrun_ddp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(torchrun_ddp)

# About three seconds of training, after about three seconds of starting.
LONG = "--dataset_length 3000 --batch_size 16 --epochs 30"
RESTARTS = "--standalone --nproc_per_node=2 --max_restarts=3 torchrun_ddp.py"
ALONE = {  # what torchrun would set for a single rank
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}


def load(path):
    return torch.load(str(path), map_location="cpu", weights_only=True)


def same(one, other):
    """Return whether two (nested) values are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def assert_same_end(path, reference):
    for key in ("model", "optimizer", "epoch", "step"):
        assert same(load(path)[key], reference[key]), f"{key} differs"


def wait_for_step(run, path):
    """Wait until a run has saved a snapshot from inside an epoch."""
    end = time.monotonic() + 60
    while not path.exists() or load(path)["step"] == 0:
        assert run.process.poll() is None and time.monotonic() < end, run.stderr
        time.sleep(0.01)


@pytest.mark.timeout(0)
def test_random_kills(request, start, finish, folder, reference):
    """`pytest tests -k random_kills --random-kills 100` kills as often as one likes."""
    for number in range(request.config.getoption("--random-kills")):
        choose = random.Random(number)
        save, more = choose.choice([(7, ""), (5, "--grad_accum_steps 4 --amp")])
        flags = f"{LONG} {more}"
        expected = reference(flags)
        victims = choose.choice(
            ["rank 0", "rank 1", "both ranks", "agent", "everything"]
        )
        path = folder / f"{number}.pt"
        command = [*TORCHRUN, *RESTARTS.split(), *flags.split()]
        command += ["--snapshot_path", str(path), "--save_every", str(save)]
        run = start(command)
        moment = choose.uniform(0, 8)
        time.sleep(moment)
        what = f"kill {number}: {victims} after {moment:.2f} seconds, {flags}"
        ranks = run.ranks()
        chosen = {"rank 0": ranks[:1], "rank 1": ranks[1:], "both ranks": ranks}
        chosen["agent"] = [psutil.Process(run.process.pid)]
        chosen["everything"] = chosen["agent"] + ranks
        for process in chosen[victims]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass  # it had ended by then
        code = run.wait(60)
        assert run.all_gone(10), f"{what}: {run.processes()}"
        if path.exists():
            load(path)  # readable, whatever happened
        if code != 0:
            assert victims in ("agent", "everything"), what + run.stderr
            finish(command)
        try:
            assert_same_end(path, expected)
        except AssertionError as error:
            raise AssertionError(what) from error
        print(what)


def test_a_kill_in_mid_save(start, finish, folder, reference):
    expected = reference(LONG)
    slow = "            os.fsync(file.fileno())\n"
    edit(folder / "torchrun_ddp.py", (slow, slow + "            time.sleep(0.3)\n"))
    path = folder / "snapshot.pt"
    command = (
        TORCHRUN + RESTARTS.split() + LONG.split() + ["--snapshot_path", str(path)]
    )
    run = start(command)
    run.wait_for("epoch 2/")
    while not (path.exists() and (folder / "snapshot.pt.tmp").exists()):
        time.sleep(0.001)
    for process in run.processes():
        process.kill()
    assert load(path)["epoch"] >= 1
    run.wait()
    finish(command)
    assert_same_end(path, expected)


def test_sigterm_to_torchrun(start, finish, folder, reference):
    """What Slurm and Kubernetes send before they take the machine."""
    flags = LONG + " --save_every 7"
    path = folder / "snapshot.pt"
    command = (
        TORCHRUN + RESTARTS.split() + flags.split() + ["--snapshot_path", str(path)]
    )
    run = start(command)
    wait_for_step(run, path)
    run.process.terminate()
    assert run.wait(30) != 0
    assert run.all_gone()
    finish(command)
    assert_same_end(path, reference(LONG))
    done = finish(command)
    assert "30 epochs, 0 batches done; nothing is left to train" in done.stdout
    assert "epoch 30/30" not in done.stdout


def test_an_orphan_writes_no_snapshot(start, folder):
    """Even one that does not notice that it is one."""
    edit(folder / "torchrun_ddp.py", ("    end_with_parent()\n", ""))
    path = folder / "snapshot.pt"
    flags = [*LONG.split(), "--epochs", "100000", "--snapshot_path", str(path)]
    run = start(TORCHRUN + RESTARTS.split() + flags)
    run.wait_for("epoch 3/")
    run.process.kill()
    run.process.wait()
    before, printed = load(path)["epoch"], run.stdout
    time.sleep(2)
    assert len(run.stdout) > len(printed), "the orphans do not train"
    assert load(path)["epoch"] == before


def test_the_world_size_may_change(start, finish, folder):
    """2 to 1 to 3 in the middle of an epoch, then 3 to 2 after its end."""
    path = folder / "snapshot.pt"
    flags = (
        f"--dataset_length 6000 --batch_size 4 --save_every 7 --snapshot_path {path}"
    )
    for ranks in (2, 1):
        launch = f"--standalone --nproc_per_node={ranks} torchrun_ddp.py --epochs 4"
        run = start(TORCHRUN + launch.split() + flags.split())
        wait_for_step(run, path)
        time.sleep(0.3)
        run.kill_all()
        stopped = load(path)
        assert stopped["step"] > 0
    for ranks, epochs in ((3, 4), (2, 5)):
        launch = (
            f"--standalone --nproc_per_node={ranks} torchrun_ddp.py --epochs {epochs}"
        )
        run = finish(TORCHRUN + launch.split() + flags.split())
        if ranks == 3:
            where = (
                f"{stopped['epoch']} epochs, {stopped['step']} batches done; resuming"
            )
            assert where in run.stdout
        assert load(path)["epoch"] == epochs and load(path)["step"] == 0


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 60),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    steps=st.integers(0, 10),
    batch_size=st.integers(1, 6),
)
def test_no_sample_is_left_out_by_a_resume(length, before, after, steps, batch_size):
    dataset = range(length)

    def draw(world_size, trained):
        shards = []
        for rank in range(world_size):
            sampler = torchrun_ddp.ResumingSampler.__new__(torchrun_ddp.ResumingSampler)
            torch.utils.data.DistributedSampler.__init__(
                sampler, dataset, world_size, rank, seed=3
            )
            sampler.interrupted_epoch, sampler.trained = 2, trained // world_size
            sampler.set_epoch(2)
            shards.append(list(sampler))
            assert len(shards[-1]) == len(sampler)
            sampler.set_epoch(3)
            assert len(list(sampler)) == sampler.num_samples  # all of the next epoch
        return shards

    shards = draw(before, 0)
    steps = min(steps, (len(shards[0]) - 1) // batch_size)
    seen = [i for shard in shards for i in shard[: steps * batch_size]]
    rest = draw(after, len(seen))
    assert (
        len({len(shard) for shard in rest}) == 1
    )  # or the ranks would get out of step
    if before == after:
        assert rest == [shard[steps * batch_size :] for shard in shards]
    drawn = [i for shard in rest for i in shard]
    assert set(seen) | set(drawn) == set(dataset)
    padding = -length % after
    assert len(seen) + len(drawn) <= length + padding + after - 1


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    "bad, reason",
    [
        ("truncated", ""),
        ("garbage", ""),
        ("empty", "EOFError"),
        ("directory", "IsADirectoryError"),
        ("pickle that runs code", "UnpicklingError"),
        ("weights alone", "KeyError: 'settings'"),
        ("other input_size", "it was made with --input_size 7"),
        ("other model", "Error(s) in loading state_dict"),
    ],
)
def test_a_file_that_is_no_snapshot_of_this_run(finish, folder, bad, reason):
    path = folder / "snapshot.pt"
    model = torchrun_ddp.MyModel(100).state_dict()
    flags = {"batch_size": 64, "input_size": 100, "dataset_length": 1000}
    flags.update(learning_rate=0.01, seed=0, grad_accum_steps=1, amp=False)
    good = {"model": model, "optimizer": {}, "epoch": 1, "step": 0, "trained": 0}
    good["settings"] = flags
    if bad == "directory":
        path.mkdir()
    elif bad == "garbage":
        path.write_bytes(bytes(range(256)) * 10)
    elif bad == "empty":
        path.write_bytes(b"")
    elif bad == "pickle that runs code":
        path.write_bytes(pickle.dumps(Evil()))
    elif bad == "weights alone":
        torch.save(model, str(path))
    elif bad == "other input_size":
        torch.save(dict(good, settings=dict(flags, input_size=7)), str(path))
    elif bad == "other model":
        torch.save(dict(good, model={"other": torch.zeros(1)}), str(path))
    else:
        torch.save(good, str(path))
        path.write_bytes(path.read_bytes()[:-200])
    before = None if bad == "directory" else path.read_bytes()
    command = [sys.executable, "torchrun_ddp.py", "--snapshot_path", "snapshot.pt"]
    run = finish(command, 2, ALONE)
    assert run.stdout == "" and run.stderr.count("\n") == 1, run.stderr
    assert "--snapshot_path: cannot resume from snapshot.pt: " in run.stderr
    assert reason in run.stderr
    assert before is None or path.read_bytes() == before
    assert not (folder / "executed").exists()
    assert not (folder / "snapshot.pt.tmp").exists()


def test_under_torchrun_a_bad_snapshot_is_named_once(finish, folder):
    (folder / "snapshot.pt").write_bytes(b"garbage")
    command = TORCHRUN + RESTARTS.replace("--max_restarts=3 ", "").split()
    run = finish([*command, "--snapshot_path", "snapshot.pt"], 1)
    assert run.stderr.count("cannot resume from snapshot.pt") == 1


def test_a_folder_that_cannot_be_written(finish):
    command = [sys.executable, "torchrun_ddp.py", "--snapshot_path", "none/here.pt"]
    run = finish(command, 2, ALONE)
    assert "none/here.pt.tmp: No such file" in run.stderr
    assert run.stdout == "" and run.stderr.count("\n") == 1


@pytest.fixture
def small_disk(folder):
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(finish, small_disk):
    command = TORCHRUN + RESTARTS.replace("3", "0").split()
    command += ["--snapshot_path", str(small_disk / "snapshot.pt"), "--epochs"]
    finish([*command, "2"])
    before = (small_disk / "snapshot.pt").read_bytes()
    with open(str(small_disk / "filler"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass
    run = finish([*command, "2000"], 1)
    assert "cannot save" in run.stderr and "No space left on device" in run.stderr
    assert (small_disk / "snapshot.pt").read_bytes() == before


def test_a_slow_disk_holds_nobody_up(finish, folder, reference):
    expected = reference("--epochs 20")
    slow = "            os.fsync(file.fileno())\n"
    edit(folder / "torchrun_ddp.py", (slow, slow + "            time.sleep(4)\n"))
    flags = "--epochs 20 --timeout 2 --snapshot_path snapshot.pt"
    finish(TORCHRUN + RESTARTS.split() + flags.split())
    assert_same_end(folder / "snapshot.pt", expected)


def test_a_stuck_rank_is_noticed(start):
    flags = "--timeout 6 --epochs 1000000"
    run = start(TORCHRUN + RESTARTS.replace("3", "0").split() + flags.split())
    run.wait_for("epoch 3/")
    stuck = run.ranks()[1]
    stuck.suspend()
    end = time.monotonic() + 40
    while len(run.ranks()) == 2:
        assert time.monotonic() < end, "nobody noticed"
        time.sleep(0.1)
    stuck.send_signal(signal.SIGCONT)  # or torchrun waits 30 seconds before it kills it
    assert run.wait(60) == 1
    assert "lost another rank: it died" in run.stderr and "(--timeout)" in run.stderr


def test_without_the_flag_nothing_is_written(finish, folder):
    before = sorted(folder.iterdir())
    finish(TORCHRUN + RESTARTS.split())
    assert [p for p in folder.iterdir() if p not in before and p.suffix == ".pt"] == []
