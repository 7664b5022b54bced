"""The same training on any number of processes, and what a step must not do."""

import argparse
import itertools

import models
import pytest
import torch
import torch.distributed as dist
from conftest import epoch_lines, validation_lines
from models import CNN_JOB, JOBS, PAIR_JOB, PARTLY, TEXT_JOB
from torch.nn.functional import cross_entropy

import torchrun_ddp

# Processes, batch size and accumulation: all have a global batch of 12. Of 30 samples,
# the last step of an epoch takes 6, in fewer batches or in one.
WAYS = [(1, 3, 4), (1, 6, 2), (1, 1, 12), (1, 2, 6)]
WAYS += [(2, 3, 2), (2, 1, 6), (3, 1, 4), (3, 2, 2)]
FLAGS = "--epochs 2 --learning_rate 0.1 --dataset_length {} --batch_size {}"
FLAGS += " --grad_accum_steps {}"


WAYS_OF = {"tokens": PARTLY, "samples": CNN_JOB}
WEIGHTED = {"compute_loss": "weighted_loss", "count_items": "weight_count"}
WEIGHTED["COUNTS_DIFFER"] = "YES"
QUICK = {"toy": {}, "CNN": CNN_JOB, "tokens": PARTLY}
QUICK["schedule"] = {"make_scheduler": "one_cycle"}
SLOW = {"item": {"compute_loss": "reads_a_value"}}
SLOW["new_tensor"] = {"compute_loss": "makes_a_tensor"}
# What may look like a mistake, and must not be warned of.
ODD = {
    "sparse or complex": dict(
        TEXT_JOB, MyModel="SparseOrComplex", make_optimizer="sgd"
    ),
    "experts": {**CNN_JOB, "MyModel": "Experts", "wrap_in_ddp": "wrap_unused"},
    "turned buffer": {**CNN_JOB, "MyModel": "TurnedBuffer"},
    "BatchNorm": {**CNN_JOB, "MyModel": "ConvBiasNorm"},
    "teacher": {**CNN_JOB, "MyModel": "TeacherCNN"},
    "masked": dict(PARTLY, compute_loss="target_loss"),
    "pairs": {**CNN_JOB, **PAIR_JOB},
    "augmented batches": {**CNN_JOB, "MyDataset": "TorchAugmented"},
    "groups and a cycle": {**CNN_JOB, "make_optimizer": "groups"},
}
ODD["groups and a cycle"]["make_scheduler"] = "one_cycle"
TRAINED = {**JOBS, **ODD}


def cases_of(world_size):
    cases = {}
    for (ranks, *sizes), name in itertools.product(WAYS, WAYS_OF):
        if ranks == world_size:
            case = {"run": "weights", "flags": FLAGS.format(30, *sizes)}
            cases[f"{name} {sizes}"] = {
                **case,
                **WAYS_OF[name],
                "make_optimizer": "sgd",
            }
    half = next(dict(case) for name, case in cases.items() if "tokens" in name)
    cases["float16"] = dict(half, flags=f"{half['flags']} --precision float16")
    flags = FLAGS.format(36, 12 // world_size, 1)
    cases["weighted"] = {"run": "weights", "flags": flags, "make_optimizer": "sgd"}
    cases["weighted"].update(WEIGHTED)
    flags = "--learning_rate 0 --epochs 2 --dataset_length {} --batch_size 3"
    for name, length, job in (
        ("few samples", 10, CNN_JOB),
        ("many samples", 430, CNN_JOB),
        ("tokens", 430, PARTLY),
        ("BatchNorm", 150, {**CNN_JOB, "MyModel": "BatchNormCNN"}),
    ):
        case = {"run": "train", "flags": flags.format(length), **job}
        cases[f"validation: {name}"] = case
    return cases


CASES = {world_size: cases_of(world_size) for world_size in (1, 2, 3)}
CASES[2].update(
    {
        "NaN samples": {"run": "train", "MyModel": "NaNModel"},
        "NaN tokens": {"run": "train", **PARTLY, "MyModel": "NaNTagger"},
    }
)
for name, job in {**QUICK, **SLOW}.items():
    flags = "--grad_accum_steps 2 --max_grad_norm 1"
    CASES[2][f"waits: {name}"] = {"run": "waits", "flags": flags, **job}
for name, job in TRAINED.items():
    flags = "--dataset_length 400 --epochs 3 --learning_rate 0.01"
    CASES[2][name] = {"run": "train", "flags": flags, **job}
CASES[2]["no validation"] = {
    "run": "train",
    **CNN_JOB,
    "make_datasets": "no_validation",
}
one = "--batch_size 1 --grad_accum_steps 4 --dataset_length 100"
CASES[2]["any size"] = {"run": "train", **CNN_JOB, "MyDataset": "AnySize", "flags": one}
for name in ("two_metrics", "no_metrics"):
    CASES[3][name] = {"run": "train", **CNN_JOB, "compute_loss": name}
    CASES[3][name]["flags"] = "--batch_size 5 --dataset_length 20"  # 2 to validate
CASES[3]["downloads"] = {"run": "train", **CNN_JOB, "make_datasets": "downloads"}
CASES[3]["downloads: ddp"] = {
    **CASES[3]["downloads"],
    "run": "check",
    "flags": "--epochs 2",
}
HALF = {"run": "train", **CNN_JOB}
HALF["flags"] = "--dataset_length 400 --epochs 4 --precision float16"
CASES[2]["float16 learns"] = HALF
for name, model in ("BatchNorm", "BatchNormCNN"), ("turned buffer", "TurnedBuffer"):
    CASES[2][f"buffers: {name}"] = {"run": "buffers", **CNN_JOB, "MyModel": model}
CASES[2]["float16 overflows"] = dict(HALF, compute_loss="infinite_on_rank_1")


def plainly(job, length, epochs=2):
    """Return the weights after training in plain PyTorch, with batches of 12."""
    parts = {**vars(torchrun_ddp), **{k: getattr(models, v) for k, v in job.items()}}
    torch.manual_seed(0)
    dataset = parts["MyDataset"](length, 64)
    model = parts["MyModel"](64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sampler = torch.utils.data.DistributedSampler(dataset, 1, 0)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        for start in range(0, length, 12):
            samples = [dataset[i] for i in order[start : start + 12]]
            inputs, labels = torch.utils.data.default_collate(samples)
            optimizer.zero_grad()
            outputs = model(inputs)
            cross_entropy(outputs.flatten(0, -2), labels.flatten()).backward()
            optimizer.step()
    return [p.flatten().tolist() for p in model.parameters()]


def assert_close(weights, expected, case, tolerance=1e-6):
    for one, other in zip(weights, expected):
        gap = (torch.tensor(one) - torch.tensor(other)).abs().max().item()
        assert gap < tolerance, case


def test_eight_ways_to_one_global_batch(results):
    """Tokens, of which batches have unequal numbers or none; samples; float16."""
    expected = {name: plainly(job, 30) for name, job in WAYS_OF.items()}
    for (world_size, *sizes), name in itertools.product(WAYS, WAYS_OF):
        weights, lines = results[world_size][f"{name} {sizes}"]
        assert "nan" not in str(lines), (world_size, sizes)
        assert_close(weights, expected[name], (world_size, sizes))
    for world_size in (1, 2, 3):
        weights, lines = results[world_size]["float16"]
        assert_close(weights, expected["tokens"], world_size, 5e-3)
        assert "nan" not in str(lines)


@pytest.mark.parametrize("name", ["NaN samples", "NaN tokens"])
def test_what_diverges_is_nan(results, name):
    assert "loss nan" in results[2][name][0]


def test_several_metrics_or_none(results):
    """With two samples for three ranks to validate."""
    lines = "\n".join(results[3]["two_metrics"])
    for found in epoch_lines(lines) + validation_lines(lines):
        assert list(found)[:3] == ["loss", "accuracy", "ones"] and found["ones"] == 1
    lines = "\n".join(results[3]["no_metrics"])
    assert [*epoch_lines(lines)[0]] == ["loss"] == [*validation_lines(lines)[0]]


def test_no_validation_set(results):
    lines = "\n".join(results[2]["no validation"])
    assert len(epoch_lines(lines)) == 1 and "validation" not in lines


def test_images_of_any_size_one_by_one(results):
    lines = results[2]["any size"]
    assert len(epoch_lines("\n".join(lines))) == 1 and "WARNING" not in str(lines)


def test_local_rank_0_downloads_first(results):
    """The other ranks find the whole file, or the case fails."""
    assert "epoch 1/1" in results[3]["downloads"][0]
    assert "DDP is right" in results[3]["downloads: ddp"]["says"]


@pytest.mark.parametrize("name", QUICK)
def test_no_step_waits_for_the_gpu(results, name):
    """A CPU shows which operations would."""
    assert results[2][f"waits: {name}"] == {}


@pytest.mark.parametrize("name", SLOW)
def test_a_step_that_waits_is_seen(results, name):
    assert results[2][f"waits: {name}"] != {}


@pytest.mark.parametrize("name", TRAINED)
def test_whatever_people_bring_trains(results, name):
    output = "\n".join(results[2][name])
    losses = [found["loss"] for found in epoch_lines(output)]
    assert len(losses) == 3 and losses[-1] < losses[0], output
    assert len(validation_lines(output)) == 3 and "WARNING" not in output


def test_fractional_items(results):
    """The mean over class weights: two processes train as one."""
    ends = [results[n]["weighted"][0] for n in (1, 2, 3)]
    assert_close(ends[1], ends[0], "two processes")
    assert_close(ends[2], ends[0], "three processes")


def test_validation_is_the_same_on_each_world_size(results):
    """To the last digit, of untrained weights; also where some ranks have no sample."""
    for name in ("few samples", "many samples", "tokens"):
        one, three = (results[n][f"validation: {name}"] for n in (1, 3))
        found = [validation_lines("\n".join(lines)) for lines in (one, three)]
        assert found[0] == found[1] and len(found[0]) == 2, name
    lines = "\n".join(results[3]["validation: BatchNorm"])
    assert len(validation_lines(lines)) == 2


def test_float16_skips_a_step_on_all_ranks(results):
    """It learns, and an overflow on one rank alone lets both skip the step."""
    for name in ("float16 learns", "float16 overflows"):
        lines = results[2][name]
        assert epoch_lines("\n".join(lines))[-1]["accuracy"] > 0.95, lines
        assert "WARNING" not in str(lines)


@pytest.mark.parametrize("name", ["BatchNorm", "turned buffer"])
def test_rank_0s_buffers_are_used_to_validate(results, name):
    """Each rank has trained with other data, so without that they would differ."""
    own, of_all = results[2][f"buffers: {name}"]
    assert own != of_all[0] and of_all[0] == of_all[1]


def test_clipping(monkeypatch):
    """To a norm, by what plain PyTorch makes of the same gradient."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    flags = {"input_size": 5, "batch_size": 8, "dataset_length": 8, "seed": 0}
    flags.update(epochs=1, grad_accum_steps=1, learning_rate=1.0, max_grad_norm=0.01)
    flags.update(num_workers=0, precision="float32", snapshot_path=None)
    monkeypatch.setattr(torchrun_ddp, "make_optimizer", models.sgd)
    trainer = torchrun_ddp.Trainer(argparse.Namespace(**flags), torch.device("cpu"))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    metrics = torchrun_ddp.Metrics(torch.device("cpu"))
    trainer.train_step([trainer.dataset[:]], metrics)
    moved = [b - p.detach() for b, p in zip(before, trainer.model.parameters())]
    torchrun_ddp.leave_group()
    length = torch.cat([m.flatten() for m in moved]).norm().item()
    assert length == pytest.approx(0.01, rel=1e-3)
