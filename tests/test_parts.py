"""The parts of the scripts that need no process of their own."""

import argparse

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import ddp
import torchrun_ddp


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    owned = []
    monkeypatch.setattr(torch.cuda, "set_device", owned.append)
    return owned


def test_a_rank_owns_a_gpu_before_it_is_used(two_gpus, monkeypatch):
    devices = [ddp.choose_device(local_rank) for local_rank in range(3)]
    assert [str(device) for device in devices] == ["cuda:0", "cuda:1", "cuda:0"]
    assert two_gpus == devices
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(ddp.choose_device(1)) == "cpu"


def test_nccl_where_each_rank_has_a_gpu_to_itself(two_gpus, monkeypatch):
    chosen = [ddp.choose_backend(None, n, pytest.fail) for n in (1, 2, 3)]
    assert chosen == ["nccl", "nccl", "gloo"]
    assert ddp.choose_backend("gloo", 1, pytest.fail) == "gloo"
    assert ddp.choose_backend("nccl", 3, pytest.fail) == "nccl"  # NCCL says if not
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ddp.choose_backend(None, 1, pytest.fail) == "gloo"


def test_a_dataset_of_single_samples_and_one_of_batches_are_read_alike():
    dataset = ddp.MyDataset(10, 3)
    whole = ddp.collate(dataset.__getitems__([7, 2]))
    single = ddp.collate([dataset[7], dataset[2]])
    assert all(map(torch.equal, whole, single))
    assert torch.equal(dataset.inputs, ddp.MyDataset(10, 3).inputs)
    assert not torch.equal(dataset.inputs, ddp.MyDataset(10, 3, seed=1).inputs)


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 60),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    steps=st.integers(0, 10),
    batch_size=st.integers(1, 6),
)
def test_no_sample_is_left_out_by_a_resume(length, before, after, steps, batch_size):
    def draw(world_size, done):
        shards = []
        for rank in range(world_size):
            sampler = torchrun_ddp.ResumableSampler(range(length), world_size, rank)
            sampler.start = done // world_size
            sampler.set_epoch(2)
            shards.append(list(sampler))
            assert len(shards[-1]) == len(sampler) > 0
        return shards

    shards = draw(before, 0)
    steps = min(steps, (len(shards[0]) - 1) // batch_size)
    seen = [i for shard in shards for i in shard[: steps * batch_size]]
    rest = draw(after, len(seen))
    assert len({len(shard) for shard in rest}) == 1  # or ranks would get out of step
    if before == after:
        assert rest == [shard[steps * batch_size :] for shard in shards]
    drawn = [i for shard in rest for i in shard]
    assert set(seen) | set(drawn) == set(range(length))
    padding = -length % after
    assert len(seen) + len(drawn) <= length + padding + after - 1


def a_run(**changes):
    """Return the figures of a run, as `verdict` gets them."""
    run = {"world_size": 2, "speedup": 1.5, "speedup_range": [1.4, 1.6]}
    run.update(
        gradient_bytes=808,
        normal_step_ms=4.0,
        ddp_step_ms={"data": 1.0, "compute": 3.0, "sync": 2.0},
    )
    run.update(changes)
    return dict(run, efficiency=run["speedup"] / run["world_size"])


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, "DDP is faster: 1.50 times the speed of normal training"),
        ({"speedup": 0.5, "speedup_range": [0.4, 0.6]}, "DDP is slower: 0.50 times"),
        ({"speedup_range": [0.9, 1.8]}, "DDP makes no clear difference: 1.50 times"),
        ({"speedup": 1.08, "speedup_range": [1.01, 1.14]}, "no clear difference"),
        ({"world_size": 1}, "With one process, no speedup is possible."),
        ({"world_size": 9}, "9 processes share 4 devices"),
        ({"speedup": 1.9, "speedup_range": [1.8, 2.0]}, "where 2 would be ideal."),
        ({}, "Synchronising 808 bytes of gradients takes 2.00 of 6.00 ms"),
        ({}, "--grad_accum_steps 6 "),
        (
            {"ddp_step_ms": {"data": 5.0, "compute": 1.0, "sync": 0.1}},
            "--num_workers 2",
        ),
        (
            {"ddp_step_ms": {"data": 1.0, "compute": 5.0, "sync": 0.1}},
            "--batch_size 20",
        ),
    ],
)
def test_the_verdict(changes, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    flags = {"cores": 4, "grad_accum_steps": 3, "num_workers": 0, "batch_size": 10}
    text = ddp.verdict(a_run(**changes), argparse.Namespace(**flags))
    assert says in text and len(text) <= 3 * 76
    if says.endswith("ideal."):
        assert text.endswith(says)


def test_the_report_has_80_columns(capsys):
    figures = {"global_batch_size": 131072, "same_gradients": True}
    for way, seconds in (("normal", 1234.5), ("ddp", 2345.6)):
        figures[way] = {"seconds": seconds}
    flags = {"cores": 4, "grad_accum_steps": 3, "num_workers": 0, "batch_size": 10}
    runs = [a_run(world_size=n, **figures) for n in (1, 2, 16)]
    ddp.print_report(runs, argparse.Namespace(**flags))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[3:6]] == ["1", "2", "16"]
