"""The parts of the scripts that need no process of their own."""

import argparse
import dataclasses
import math
from collections import namedtuple

import pytest
import torch

import ddp


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    owned = []
    monkeypatch.setattr(torch.cuda, "set_device", owned.append)
    return owned


def test_a_rank_owns_a_gpu_before_it_is_used(two_gpus, monkeypatch):
    devices = [ddp.choose_device(local_rank) for local_rank in range(3)]
    assert [str(device) for device in devices] == ["cuda:0", "cuda:1", "cuda:0"]
    assert two_gpus == devices
    # device_count() alone may count GPUs that an old driver cannot use.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(ddp.choose_device(1)) == "cpu"


def test_whatever_a_batch_is_made_of_is_moved_and_not_changed():
    class Tokens(dict):
        """As a tokenizer's batch: it moves itself, and knows no non_blocking."""

        def to(self, device):
            return Tokens({name: value.to(device) for name, value in self.items()})

    @dataclasses.dataclass(frozen=True)
    class Both:
        inputs: torch.Tensor
        others: dict

    @dataclasses.dataclass
    class Slots:
        __slots__ = ("inputs",)
        inputs: torch.Tensor

    Pair = namedtuple("Pair", "first second")
    tensor = torch.ones(3)
    packed = torch.nn.utils.rnn.pack_sequence([tensor])
    batch = {"a": [tensor, (tensor, "text")], "b": Pair(packed, Tokens(ids=tensor))}
    batch.update(c=5, d=Both(tensor, {"x": tensor}), e=Slots(tensor))
    batch.update(f=[Pair(1, tensor)])
    meta = torch.device("meta")
    moved = ddp.to_device(batch, meta, non_blocking=True)
    assert moved["a"][0].device == moved["a"][1][0].device == meta
    assert moved["a"][1][1] == "text" and moved["c"] == 5
    assert type(moved["b"]) is Pair and moved["b"].first.data.device == meta
    assert moved["b"].second["ids"].device == meta
    assert type(moved["b"].second) is Tokens
    assert type(moved["d"]) is Both and moved["d"].inputs.device == meta
    assert moved["d"].others["x"].device == meta
    assert type(moved["e"]) is Slots and moved["e"].inputs.device == meta
    assert moved["f"][0].second.device == meta
    assert batch["a"][0] is tensor and batch["d"].inputs is tensor


def test_a_copy_of_a_view_is_not_the_whole():
    whole = torch.ones(1000, 100)
    copy = ddp.to_device({"rows": whole[5:7]}, "cpu", copy=True)["rows"]
    assert torch.equal(copy, whole[5:7]) and copy.untyped_storage().nbytes() == 800


def test_a_dataset_of_single_samples_and_one_of_batches_are_read_alike():
    dataset = ddp.MyDataset(10, 3)
    whole = ddp.collate(dataset.__getitems__([7, 2]))
    single = ddp.collate([dataset[7], dataset[2]])
    assert all(map(torch.equal, whole, single))
    assert torch.equal(dataset.inputs, ddp.MyDataset(10, 3).inputs)
    assert not torch.equal(dataset.inputs, ddp.MyDataset(10, 3, seed=1).inputs)


def test_the_metrics_keep_nan_and_leave_out_what_has_no_items():
    nan = torch.tensor(float("nan"))
    metrics = ddp.Metrics(torch.device("cpu"))
    metrics.add(nan, {"right": torch.tensor(0)}, 0.0)
    metrics.add(torch.tensor(2.0, requires_grad=True), {"right": torch.tensor(1)}, 2)
    metrics.add(torch.tensor(1.0), {"right": torch.tensor(3), "now and then": 4}, 6)
    means = {"loss": 1.25, "right": 0.5, "now and then": 0.5}
    assert metrics.means(of_all_ranks=False) == (means, [8])
    metrics.add(nan, {}, 1)
    means, _ = metrics.means(of_all_ranks=False)
    assert math.isnan(means["loss"])


def test_a_large_sum_of_float16_is_finite():
    metrics = ddp.Metrics(torch.device("cpu"))
    metrics.add(torch.tensor(8.0, dtype=torch.float16), {}, 100_000)
    assert metrics.means(of_all_ranks=False)[0] == {"loss": 8.0}


def verdict(speedup=1.5, spread=0.1, parts=(1.0, 3.0, 1.0), **changes):
    """Return what is said of 4 epochs, on 4 cores, where parts are data, compute, sync."""
    figures = {
        "speedup": speedup,
        "speedup_range": [speedup - spread, speedup + spread],
    }
    figures["ddp_step_ms"] = dict(zip(["data", "compute", "sync"], parts))
    figures.update(normal_step_ms=7.5, compute_ms_by_rank=[3.0, 3.0])
    flags = {"cores": 4, "threads": 2, "grad_accum_steps": 3, "num_workers": 0}
    flags.update(batch_size=10, world_size=2, epochs=4)
    args = argparse.Namespace(**{k: changes.pop(k, v) for k, v in flags.items()})
    figures.update(changes)
    text = f"{ddp.verdict(figures, args)} {ddp.advice(figures, args)}"
    return " ".join(text.split())  # as print_wrapped does


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, "DDP is faster: 1.50 times the speed of normal training (1.40 to 1.60"),
        ({}, "Normal training used 2 of 4 cores, and batches of 10."),
        ({"speedup": 0.5}, "DDP is slower: 0.50 times"),
        ({"spread": 0.6}, "DDP makes no clear difference: 1.50 times"),
        ({"epochs": 2}, "Too few epochs to tell"),
        ({"world_size": 1}, "With one process, DDP cannot be faster."),
        ({"world_size": 9}, "9 processes share 4 cores: start at most 4."),
        ({"parts": (1, 3, 0.9)}, "The largest part of a step is computing"),
        ({"parts": (1, 3, 4)}, "Without it, the speedup would be 1.9."),  # 7.5 / 4
        ({"parts": (1, 3, 4)}, "as with --grad_accum_steps 12."),
        ({"parts": (1, 6, 40)}, "There is too little work to share"),
        ({"parts": (1, 6, 0.5)}, "There is too little work to share"),
        (
            {"parts": (5, 1, 0.1)},
            "Loading data takes the longest: try --num_workers 2.",
        ),
        (
            {"compute_ms_by_rank": [3, 6]},
            "Rank 1 computes 2.0 times as long as a typ",
        ),
    ],
)
def test_the_verdict(changes, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert says in verdict(**changes)


def test_one_gpu_may_be_faster_with_larger_batches(two_gpus):
    says = "compare these samples/s with those of --world_size 1 --batch_size 20."
    assert says in verdict()
