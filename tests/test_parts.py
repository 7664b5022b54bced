"""The parts of the scripts that need no process of their own."""

import argparse
from collections import namedtuple

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


def test_gpus_that_do_not_work_are_not_used(monkeypatch):
    """device_count() alone may count GPUs that an old driver cannot use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr("sys.argv", ["ddp.py"])
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert str(ddp.choose_device(1)) == "cpu"
    assert ddp.choose_backend(None, 1, pytest.fail) == "gloo"
    args, backends, _ = ddp.parse_args()
    assert args.world_size == [2] and backends == ["gloo"]
    refused = []
    ddp.choose_backend("nccl", 1, refused.append)
    assert refused == ["--backend nccl needs a CUDA GPU; use --backend gloo"]


def test_each_world_size_has_its_backend(two_gpus, monkeypatch):
    monkeypatch.setattr("sys.argv", ["ddp.py", "--world_size", "1", "2", "3"])
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert ddp.parse_args()[1] == ["nccl", "nccl", "gloo"]


def test_float16_where_bfloat16_is_emulated(monkeypatch):
    """A T4 is of compute capability 7.5, an A100 of 8.0."""
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    for capability, precision in (((7, 5), "float16"), ((8, 0), "bfloat16")):
        get = {"get_device_capability": lambda _, found=capability: found}
        monkeypatch.setattr(torch.cuda, "get_device_capability", *get.values())
        assert ddp.choose_precision(True, gpu) == precision
        assert ddp.choose_precision(False, gpu) == "float32"
    assert ddp.choose_precision(True, cpu) == "bfloat16"


def test_whatever_a_batch_is_made_of_is_moved_and_not_changed():
    class Tokens(dict):
        """As a tokenizer's batch: it moves itself."""

        def to(self, device):
            for name in self:
                self[name] = self[name].to(device)
            return self

    Pair = namedtuple("Pair", "first second")
    tensor = torch.ones(3)
    packed = torch.nn.utils.rnn.pack_sequence([tensor])
    tokens = Tokens(ids=tensor)
    batch = {"a": [tensor, (tensor, "text")], "b": Pair(packed, tokens), "c": 5}
    meta = torch.device("meta")
    moved = ddp.to_device(batch, meta)
    assert moved["a"][0].device == moved["a"][1][0].device == meta
    assert type(moved["b"]) is Pair and moved["b"].first.data.device == meta
    assert moved["b"].second["ids"].device == meta and moved["c"] == 5
    assert moved["a"][1][1] == "text" and type(moved["b"].second) is Tokens
    assert batch["a"][0] is tensor and tokens["ids"] is tensor


def test_rates_have_three_digits():
    assert ddp.format_rate(10, 1.9120) == "5.23"
    assert ddp.format_rate(77436, 1) == "77,436"


def test_a_dataset_of_single_samples_and_one_of_batches_are_read_alike():
    dataset = ddp.MyDataset(10, 3)
    whole = ddp.collate(dataset.__getitems__([7, 2]))
    single = ddp.collate([dataset[7], dataset[2]])
    assert all(map(torch.equal, whole, single))
    assert torch.equal(dataset.inputs, ddp.MyDataset(10, 3).inputs)
    others = ddp.MyDataset(10, 3, seed=1), ddp.MyDataset(10, 3, train=False)
    assert not any(torch.equal(dataset.inputs, other.inputs) for other in others)


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
            sampler.skip = done // world_size
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
        normal_step_ms=7.5, ddp_step_ms={"data": 1.0, "compute": 3.0, "sync": 1.0}
    )
    run.update(changes)
    return dict(run, efficiency=run["speedup"] / run["world_size"])


def step(data, compute, sync):
    return {"ddp_step_ms": {"data": data, "compute": compute, "sync": sync}}


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {},
            "DDP is faster: 1.50 times the speed of normal training (1.40 to 1.60 in single epochs)",
        ),
        ({"speedup": 0.5, "speedup_range": [0.4, 0.6]}, "DDP is slower: 0.50 times"),
        ({"speedup_range": [0.9, 1.8]}, "DDP makes no clear difference: 1.50 times"),
        ({"speedup": 1.08, "speedup_range": [1.01, 1.14]}, "no clear difference"),
        ({"speedup_range": [1.5, 1.5]}, "One epoch cannot tell: 1.50 times the speed"),
        ({"world_size": 1}, "With one process, no speedup is possible."),
        ({"world_size": 9}, "9 processes share 4 devices"),
        # No advice where synchronising costs a quarter of the rest, at most.
        ({}, "where 2 would be ideal."),
        (step(1, 3, 0.9), "where 2 would be ideal."),
        # 2 x 4 >= 4 x 2: (2 x 7.5) / (2 x 4 + 2)
        (step(1, 3, 2), "would make it about 1.5: --grad_accum_steps 6, or"),
        (step(1, 3, 2), "--batch_size 20."),
        # 4 x 4 >= 4 x 4: (4 x 7.5) / (4 x 4 + 4)
        (step(1, 3, 4), "would make it about 1.5: --grad_accum_steps 12, or"),
        # 8 x 4 >= 4 x 8: (8 x 7.5) / (8 x 4 + 8)
        (step(1, 3, 8), "would make it about 1.5: --grad_accum_steps 24, or"),
        (step(1, 3, 8.1), "use a larger batch or model."),
        (step(0.1, 0.2, 1.1), "use a larger batch or model."),
        # Without synchronising, it would be 5 / 4 = 1.25: too little to share.
        (dict(step(1, 3, 2), normal_step_ms=5.0), "use a larger batch or model."),
        (step(5, 1, 0.1), "Loading takes 5.00 of 6.10 ms: try --num_workers 2."),
    ],
)
def test_the_verdict(changes, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = {"cores": 4, "grad_accum_steps": 3, "num_workers": 0, "batch_size": 10}
    text = ddp.verdict(a_run(**changes), argparse.Namespace(**flags))
    assert says in text and len(text) <= 4 * 76
    if says.endswith("ideal."):
        assert text.endswith(says)


def test_what_is_printed_has_80_columns(capsys):
    one = {"seconds": 12345.67}
    flags = {"cores": 128, "grad_accum_steps": 3, "num_workers": 0, "batch_size": 10}
    flags.update(precision="bfloat16")
    runs = [a_run(world_size=n, global_batch_size=131072) for n in (1, 2, 16)]
    for run in runs:
        run.update(normal=one, ddp=one, gradient_bytes=10**10)
        ddp.print_report(run, argparse.Namespace(**flags))
    result = ddp.EpochResult(123.4567, 1.0, 98765432, 1.0)
    ddp.print_epochs(0, 1000, result, result)
    ddp.print_epochs(999, 1000, result, result)
    ddp.print_table(runs)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)
    assert [line.split()[0] for line in lines[-3:]] == ["1", "2", "16"]
