"""The parts of the scripts that need no process of their own."""

import argparse
import dataclasses
from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DistributedSampler

import ddp
import torchrun_ddp


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

    class Typed(dict):
        language = None

    @dataclasses.dataclass(frozen=True)
    class Both:
        inputs: torch.Tensor
        others: dict

    Pair = namedtuple("Pair", "first second")
    tensor = torch.ones(3)
    packed = torch.nn.utils.rnn.pack_sequence([tensor])
    typed = Typed(to=tensor)
    typed.language = "en"
    batch = {"a": [tensor, (tensor, "text")], "b": Pair(packed, Tokens(ids=tensor))}
    batch.update(c=5, d=Both(tensor, {"x": tensor}), e=typed, f=[Pair(1, tensor)])
    meta = torch.device("meta")
    moved = ddp.to_device(batch, meta)
    assert moved["a"][0].device == moved["a"][1][0].device == meta
    assert moved["a"][1][1] == "text" and moved["c"] == 5
    assert type(moved["b"]) is Pair and moved["b"].first.data.device == meta
    assert moved["b"].second["ids"].device == meta
    assert type(moved["b"].second) is Tokens
    assert type(moved["d"]) is Both and moved["d"].inputs.device == meta
    assert moved["d"].others["x"].device == meta
    assert type(moved["e"]) is Typed and moved["e"].language == "en"
    assert moved["e"]["to"].device == meta and moved["f"][0].second.device == meta
    assert batch["a"][0] is tensor and batch["e"]["to"] is tensor
    assert batch["d"].inputs is tensor


def test_a_dataset_of_single_samples_and_one_of_batches_are_read_alike():
    dataset = ddp.MyDataset(10, 3)
    whole = ddp.collate(dataset.__getitems__([7, 2]))
    single = ddp.collate([dataset[7], dataset[2]])
    assert all(map(torch.equal, whole, single))
    assert torch.equal(dataset.inputs, ddp.MyDataset(10, 3).inputs)
    others = ddp.MyDataset(10, 3, seed=1), ddp.MyDataset(10, 3, train=False)
    assert not any(torch.equal(dataset.inputs, other.inputs) for other in others)


def test_adam_is_fused_where_that_is_possible():
    args = argparse.Namespace(learning_rate=0.1)
    assert ddp.make_optimizer(ddp.MyModel(3), args).defaults["fused"] is True
    model = torch.nn.Linear(3, 3, dtype=torch.complex64)
    assert ddp.make_optimizer(model, args).defaults["fused"] is False


def test_the_metrics_keep_nan_and_leave_out_what_has_no_items():
    metrics = ddp.Metrics(torch.device("cpu"))
    metrics.add(torch.tensor(float("nan")), torch.tensor(0), 0.0)
    metrics.add(torch.tensor(2.0, requires_grad=True), torch.tensor(1), 2)
    metrics.add(torch.tensor(1.0), torch.tensor(3), 6)
    assert metrics.means(False) == [1.25, 0.5] and metrics.items == 8.0
    metrics.add(torch.tensor(float("nan")), torch.tensor(0), 1)
    assert metrics.means(False)[0] != metrics.means(False)[0]


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(1, 60),
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    done=st.integers(0, 10),
    batch_size=st.integers(1, 6),
)
def test_no_sample_is_left_out_by_a_resume(length, before, after, done, batch_size):
    """As `train` resumes: all but what makes no full batch of all ranks is read."""

    def draw(world_size, skip):
        shards = []
        for rank in range(world_size):
            options = {"num_replicas": world_size, "rank": rank, "drop_last": True}
            sampler = DistributedSampler(range(length), **options)
            sampler.set_epoch(2)
            batches = list(BatchSampler(sampler, batch_size, drop_last=True))
            shards.append(batches[skip:])
        assert len({len(shard) for shard in shards}) == 1  # or they get out of step
        return shards

    whole = draw(before, 0)
    done = min(done, len(whole[0]))
    seen = [i for shard in whole for batch in shard[:done] for i in batch]
    skip = done * batch_size * before // (batch_size * after)
    rest = [i for shard in draw(after, skip) for batch in shard for i in batch]
    if before == after:
        assert rest == [i for shard in whole for batch in shard[done:] for i in batch]
    assert len(set(seen) & set(rest)) < batch_size * after
    left_out = set(range(length)) - set(seen) - set(rest)
    assert len(left_out) < batch_size * after


def verdict(ratios=3, cores=4, world_size=2, **figures):
    known = {"speedup": 1.5, "speedup_range": [1.4, 1.6], "normal_step_ms": 7.5}
    known["ddp_step_ms"] = {"data": 1.0, "compute": 3.0, "sync": 1.0}
    flags = {"cores": cores, "grad_accum_steps": 3, "num_workers": 0, "batch_size": 10}
    args = argparse.Namespace(**flags, world_size=world_size)
    return ddp.verdict({**known, **figures}, ratios, args)


def step(data, compute, sync):
    return {"ddp_step_ms": {"data": data, "compute": compute, "sync": sync}}


FASTER = "DDP is faster: 1.50 times the speed of normal training (1.40 to 1.60 in"
LITTLE = "There is too little work to share"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({}, FASTER),
        ({"speedup": 0.5, "speedup_range": [0.4, 0.6]}, "DDP is slower: 0.50 times"),
        ({"speedup_range": [0.9, 1.8]}, "DDP makes no clear difference: 1.50 times"),
        ({"speedup": 1.08, "speedup_range": [1.01, 1.14]}, "no clear difference"),
        ({"ratios": 1}, "Too few epochs to tell: 1.50 times the speed"),
        ({"world_size": 1}, "no clear difference: 1.50 times"),
        ({"world_size": 1}, "One process cannot be faster."),
        ({"world_size": 9}, "9 processes share 4 cores: start no more."),
        # No advice where synchronising costs a quarter of the rest, at most.
        ({}, "where 2 would be ideal."),
        (step(1, 3, 0.9), "where 2 would be ideal."),
        # 2 x 4 >= 4 x 2: (2 x 7.5) / (2 x 4 + 2)
        (step(1, 3, 2), "About 1.5 with --grad_accum_steps 6 or, if it fits,"),
        (step(1, 3, 2), "--batch_size 20: the global batch becomes 2 times as large"),
        # 4 x 4 >= 4 x 4: (4 x 7.5) / (4 x 4 + 4)
        (step(1, 3, 4), "About 1.5 with --grad_accum_steps 12 or"),
        # 8 x 4 >= 4 x 8: (8 x 7.5) / (8 x 4 + 8)
        (step(1, 3, 8), "About 1.5 with --grad_accum_steps 24 or"),
        (step(1, 3, 8.1), LITTLE),
        # Without synchronising, it would be 5 / 4 = 1.25: too little to share.
        (dict(step(1, 3, 2), normal_step_ms=5.0), LITTLE),
        (step(5, 1, 0.1), "Loading costs most: try --num_workers 2."),
    ],
)
def test_the_verdict(changes, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = verdict(**changes)
    assert says in text and len(text) <= 4 * 76
    if says.endswith("ideal."):
        assert text.endswith(says)


def test_what_is_printed_has_80_columns(capsys):
    result = ddp.EpochResult(123.4567, 1.0, 98765432, 1.0)
    figures = {"ddp_step_ms": {"data": 1e5, "compute": 3e5, "sync": 1e5}}
    figures.update(normal_step_ms=5e5, gradient_bytes=10**10, large_batch_step_ms=1e6)
    flags = {"cores": 8, "grad_accum_steps": 3, "num_workers": 0, "batch_size": 10**6}
    args = argparse.Namespace(**flags, world_size=16)
    ddp.print_epoch(0, 1000, result, result)
    ddp.print_epoch(999, 1000, result, result)
    ddp.report({"normal": [result] * 3, "ddp": [result] * 3}, figures, args)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert any(
        line.startswith("One device, with batches of 16,000,000:") for line in lines
    )


def test_the_schedule_and_the_epochs_are_fixed_together():
    model = torchrun_ddp.MyModel(3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    names = "epochs batch_size grad_accum_steps learning_rate max_grad_norm"
    names += " dataset_length input_size seed"
    args = argparse.Namespace(**dict.fromkeys(names.split(), 1))
    for scheduler, epochs in ((schedule, 1), (None, None)):
        training = torchrun_ddp.Training(optimizer, scheduler, None)
        assert torchrun_ddp.fixed_settings(args, training)["epochs"] == epochs
