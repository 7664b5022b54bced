"""What the documented commands do, and whether normal and DDP training are the same."""

import importlib.util
import math
import re

import pytest
import torch
from conftest import DDP, ROOT, STANDALONE, TORCHRUN, edit, epoch_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

spec = importlib.util.spec_from_file_location("ddp", str(ROOT / "ddp.py"))
ddp = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ddp)

RECORDING_DATASET = """
    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)
        self.rank = os.environ["RANK"]
        with open("checksums", "a") as file:
            file.write(f"{self.inputs.sum().item()}\\n")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        with open(f"samples of rank {self.rank}", "a") as file:
            file.write(f"{index}\\n")
        return self.inputs[index], self.labels[index]
"""


def replace_body(path, name, body):
    """Replace everything in a class of a script but its first line."""
    text = path.read_text()
    head = re.search(rf"^class {name}\(.*\):\n", text, re.MULTILINE).group()
    start = text.index(head) + len(head)
    end = re.compile(r"^\S", re.MULTILINE).search(text, start).start()
    path.write_text(text[:start] + body.lstrip("\n") + "\n\n" + text[end:])


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--backend gloo --epochs 10 --batch_size 128 --input_size 200 --world_size 2",
        "--world_size 1 3",  # 1000 samples do not divide evenly by 3
        "--world_size 3 --dataset_length 1001 --batch_size 7 --grad-accum-steps=3",
        "--world_size 3 --dataset_length 2 --batch_size 3",  # more ranks than samples
        "--num_workers 1",
        "--amp --grad_accum_steps 2",
    ],
)
def test_ddp_trains_the_same_model_and_says_so(finish, flags):
    run = finish(DDP + flags.split())
    assert run.stderr == ""
    trainings, table = run.stdout.split("           global ")
    assert " yes " in table and " NO " not in table, table
    trainings = trainings.split("DDP training time: ")[:-1]
    assert len(trainings) == (2 if "1 3" in flags else 1)
    for training in trainings:
        normal, distributed = training.split("Normal training time: ")
        assert re.match(r"\d+\.\d\d seconds\n", distributed)
        # Each epoch's metrics are over all ranks, so they are those of normal training.
        assert len(epoch_lines(normal)) == (10 if "--epochs" in flags else 5)
        assert len(epoch_lines(distributed)) == len(epoch_lines(normal))
        for one, other in zip(epoch_lines(normal), epoch_lines(distributed)):
            close = 0.02 if "--amp" in flags else 0.0002
            assert float(one[0]) == pytest.approx(float(other[0]), abs=close)
            assert float(one[1]) == pytest.approx(float(other[1]), abs=100 * close)


@pytest.mark.parametrize(
    "launch",
    [
        (
            "--nproc_per_node=2 --nnodes=1 --node_rank=0 --master_addr=127.0.0.1"
            " --master_port=29500 torchrun_ddp.py"
            " --epochs 5 --batch_size 64 --input_size 100"
        ),
        "--standalone --nproc_per_node=2 torchrun_ddp.py",
        "--standalone --nproc_per_node=3 torchrun_ddp.py --num_workers=1 --amp",
    ],
)
def test_torchrun_trains_and_prints_one_line_per_epoch(finish, launch):
    run = finish(TORCHRUN + launch.split())
    # torchrun of PyTorch 2.0 has a remark of its own on --standalone.
    assert [
        line for line in run.stderr.splitlines() if "master_addr is" not in line
    ] == []
    lines = run.stdout.splitlines()
    assert "gloo" in lines[0] or "nccl" in lines[0]
    assert len(epoch_lines(run.stdout)) == 5 and len(lines) == 7, run.stdout
    assert re.match(r"DDP training time: \d+\.\d\d seconds$", lines[-1])


def test_both_scripts_train_the_same_model(finish):
    flags = ["--dataset_length=501", "--batch_size=9", "--grad_accum_steps=2"]
    one = finish(STANDALONE + flags).stdout
    assert epoch_lines(one) == epoch_lines(finish(DDP + flags).stdout)[5:]


def test_ranks_have_the_same_data_in_disjoint_shards_anew_each_epoch(finish, folder):
    replace_body(folder / "torchrun_ddp.py", "MyDataset", RECORDING_DATASET)
    finish(STANDALONE + ["--dataset_length", "100", "--epochs", "2"])
    assert len(set((folder / "checksums").read_text().split())) == 1
    epochs = []
    shards = [(folder / f"samples of rank {r}").read_text().split() for r in (0, 1)]
    for part in (slice(0, 50), slice(50, 100)):
        epochs.append([list(map(int, shard[part])) for shard in shards])
    for shard, other in epochs:
        assert sorted(shard + other) == list(range(100))
    assert epochs[0] != epochs[1] and sorted(epochs[0][0]) != sorted(epochs[1][0])
    assert epochs[0][0] != sorted(epochs[0][0])  # shuffled


def test_progress_inside_a_long_epoch(finish, folder):
    edit(
        folder / "torchrun_ddp.py",
        (
            '        rows = torch.frombuffer(array("q", indices), dtype=torch.int64)',
            "        time.sleep(1)\n        rows = torch.tensor(indices)",
        ),
    )
    run = finish(STANDALONE + ["--epochs", "1"])
    line = r"  batch \d/8  loss on rank 0 \d\.\d{4}  [\d,]+ samples/s  \d+ s left\n"
    assert re.search(line, run.stdout), run.stdout


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 60),
    world_size=st.integers(1, 9),
    batch_size=st.integers(1, 20),
    epoch=st.integers(0, 3),
)
def test_the_global_sampler_draws_what_all_ranks_draw(
    length, world_size, batch_size, epoch
):
    dataset = range(length)
    everything = ddp.GlobalSampler(dataset, world_size, 7)
    everything.set_epoch(epoch)
    shards = []
    for rank in range(world_size):
        sampler = DistributedSampler(dataset, world_size, rank, seed=7)
        sampler.set_epoch(epoch)
        shards.append(list(sampler))
    drawn = list(everything)
    assert len(drawn) == len(everything)
    size = batch_size * world_size
    for step in range(math.ceil(len(shards[0]) / batch_size)):
        seen = [i for shard in shards for i in shard[step * batch_size :][:batch_size]]
        assert sorted(drawn[step * size :][:size]) == sorted(seen)


def test_a_dataset_of_single_samples_and_one_of_batches_are_read_alike():
    dataset = ddp.MyDataset(10, 3)
    inputs, labels = ddp.collate(dataset.__getitems__([7, 2]))
    other_inputs, other_labels = ddp.collate([dataset[7], dataset[2]])
    assert torch.equal(inputs, other_inputs) and torch.equal(labels, other_labels)


@pytest.mark.parametrize(
    "backend, ranks, gpus, share, chosen",
    [
        (None, 2, 0, "", "gloo"),
        (None, 2, 1, "", "gloo"),
        (None, 2, 2, "", "nccl"),
        ("gloo", 2, 2, "", "gloo"),
        ("nccl", 2, 2, "", "nccl"),
        ("nccl", 2, 1, "1", "nccl"),
        ("nccl", 2, 1, "", None),
        ("nccl", 1, 0, "", None),
    ],
)
def test_the_backend_rule(monkeypatch, backend, ranks, gpus, share, chosen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(ddp.dist, "is_nccl_available", lambda: True)
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", share)
    if chosen:
        assert ddp.choose_backend(backend, ranks) == chosen
    else:
        with pytest.raises(ValueError, match="--backend gloo"):
            ddp.choose_backend(backend, ranks)


@pytest.mark.parametrize(
    "gpus, devices", [(0, "cpu cpu cpu"), (2, "cuda:0 cuda:1 cuda:0")]
)
def test_the_device_rule(monkeypatch, gpus, devices):
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    owned = [ddp.own_device(local_rank) for local_rank in range(3)]
    assert [str(device) for device in owned] == devices.split()
    assert current == (owned if gpus else [])
