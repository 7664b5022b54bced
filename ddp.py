"""Compare normal training with DistributedDataParallel (DDP) training.

Does DDP compute the same gradients? Is it faster, and if not, why not? Try it with one
process per GPU or, without GPUs, two that share the CPU:

    python ddp.py

It starts the processes itself. In each epoch, the first one trains normally, as with
one device (without GPUs, with its share of the cores): for a step, it takes the batches
of all processes, one after the other, and adds up their gradients. And all processes
train the same steps with DDP, each with its own batches. The first holds both models.

To check your own model, write a Python file and add --definitions FILE. What it defines
of the ten definitions below, from MyDataset down to the function `wrap`, replaces the
one here. Or edit them here. No other line makes a dataset or a model, or knows what is
in a batch. torchrun_ddp.py takes the same file, to train for good.

Together, the processes are a process group. Each has a number, its rank; the world
size is how many there are. A collective is a call by which ranks exchange data, such as
an all-reduce, which adds up their tensors. All ranks must make it: a rank waits for the
others, up to --timeout. The backend that does it is NCCL between GPUs, otherwise Gloo.
They find each other at a server, the store, which this script opens at MASTER_ADDR and
MASTER_PORT, from the environment or a file .env.

Comments "DDP 1" to "DDP 9" mark what makes ordinary training distributed, numbered in
the order in which it happens: 1 is in main; 2 and 9 in worker; 3, 4, 5 and 8 in
compare; 6 in accumulate_gradients; 7 in Metrics.
"""

import argparse
import copy
import ctypes
import gc
import importlib
import json
import math
import os
import random
import re
import signal
import socket
import statistics
import sys
import textwrap
import time
import traceback
from collections import namedtuple
from contextlib import nullcontext, suppress
from datetime import timedelta
from itertools import chain, cycle, islice

import torch
import torch.distributed as dist
import torch.distributed.nn  # an optimizer imports it: later, it would hold the group
import torch.multiprocessing as mp
from dotenv import load_dotenv
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler


class MyDataset(Dataset):
    """Random inputs of shape (size,) and labels 0 or 1; train=False: different ones."""

    def __init__(self, length, size, seed=0, train=True):
        generator = torch.Generator().manual_seed(2 * seed + (1 if train else 0))
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices):
        """Return a batch at once. Optional: much faster, if the data is in memory."""
        rows = torch.LongTensor(indices)  # twice as fast as torch.tensor(indices)
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)


class MyModel(nn.Module):
    """One linear layer: inputs of shape (batch, input_size) to logits (batch, 2)."""

    def __init__(self, input_size):
        super().__init__()
        self.linear = nn.Linear(input_size, 2)

    def forward(self, inputs):
        return self.linear(inputs)


def make_datasets(args):
    """Return the training set and the validation set, the same ones on all ranks."""
    length, size, seed = args.dataset_length, args.input_size, args.seed
    validation_set = MyDataset(max(1, length // 10), size, seed, train=False)
    return MyDataset(length, size, seed), validation_set


def make_model(args):
    return MyModel(args.input_size)


def compute_loss(model, batch):
    """Return the mean loss of a batch, and how many of its items are correct.

    Items are samples, or tokens. In place of the second, any sum over them will do.
    Call `model` itself, not one of its methods: DDP has to see each forward pass.
    """
    inputs, labels = batch
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, labels)
    return loss, (outputs.argmax(dim=1) == labels).sum()


def count_items(batch):
    """Return the number of items (samples, tokens) that compute_loss averages over.

    Samples: return an int. In training, all ranks have the same number, as all batches
    are full, so no step has to exchange it. Tokens, or whatever ranks can have
    different numbers of: return a tensor, such as (labels != -100).sum(), never its
    .item(). In each step, the ranks then add up theirs. `batch` is still in CPU memory.
    A batch without items gets weight 0. Its loss may be NaN, as only its gradient is
    used; that has to be finite, as cross_entropy's is.
    """
    _, labels = batch
    return len(labels)


def collate(samples):
    """Stack a list of samples; keep what __getitems__ returned, a tuple or a dict."""
    if isinstance(samples, list):
        return torch.utils.data.default_collate(samples)
    return samples


def make_optimizer(model, args):
    """Return Adam. (The fused one is faster, but refuses complex parameters.)"""
    fused = all(map(torch.is_floating_point, model.parameters()))
    return torch.optim.Adam(model.parameters(), args.learning_rate, fused=fused)


def make_scheduler(optimizer, steps, args):
    """Return None, or a scheduler, stepped after each of `steps` optimizer steps."""
    return


def wrap(model):
    """Return the model with DDP around it. Add options of DDP here."""
    # This one keeps gradients where DDP averages them, instead of copying them there.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def main():
    load_dotenv()
    args, store = parse_args()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PyTorch {torch.__version__} on {kind}, {args.backend}, {args.precision}")
    global_batch = args.batch_size * args.grad_accum_steps * args.world_size
    share = f" share {args.cores} cores" if kind == "cpu" else ""
    print(
        f"{args.world_size} processes{share}, global batch {global_batch:,}", flush=True
    )
    try:
        # DDP 1: launch one process per device. A terminal sends Ctrl-C to all of them.
        # The new ones inherit that it is ignored; this one ends, and ends the others.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        arguments = args, store.host, store.port
        processes = mp.spawn(worker, arguments, args.world_size, join=False)
        signal.signal(signal.SIGINT, handler)
        while not processes.join():  # raises an error when a process has failed
            pass
    except KeyboardInterrupt:
        sys.exit(130)
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        code = getattr(error, "exit_code", None)  # 1 or 2: the process has said why
        sys.exit(code if code in (1, 2) else f"ddp.py: {error}")
    finally:
        for process in mp.active_children():
            process.kill()


def worker(rank, args, host, port):
    """Run in each process: join the group, compare, leave."""
    if sys.platform == "linux":  # the kernel kills this process when its parent dies
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != mp.parent_process().pid:  # the parent has ended already
        sys.exit(1)
    # Before Python 3.12, forking a DataLoader worker can hang while a thread of Gloo
    # frees a message: wait for that first.
    if sys.version_info < (3, 12):
        os.register_at_fork(before=lambda: time.sleep(0.05))
    sys.stdout.reconfigure(line_buffering=True)  # lines appear at once, in files too
    mp.set_start_method(None, force=True)  # for DataLoaders: mp.spawn has set "spawn"
    # torchrun sets these, too: your definitions may read them.
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(args.world_size)
    torch.set_num_threads(max(1, args.cores // args.world_size))
    # DDP 2: own a device, then join the others. They meet in the parent's store.
    device = choose_device(rank)
    if args.definitions:
        use_definitions(args.definitions)
    timeout = timedelta(seconds=args.timeout)
    store = dist.TCPStore(host, port, timeout=timeout)
    numbers = {"rank": rank, "world_size": args.world_size}
    dist.init_process_group(args.backend, store=store, timeout=timeout, **numbers)
    dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects here, or fails
    try:
        is_right = compare(args, device, store)
    except Exception:  # noqa: BLE001, all are shown
        # mp.spawn shows one error, which can be that of a rank whose peer has failed.
        traceback.print_exc()
        sys.exit(1)
    leave_group()  # DDP 9: leave
    sys.exit(0 if is_right else 1)


Way = namedtuple("Way", "model loader training args")  # normal training's, or DDP's
Training = namedtuple("Training", "optimizer scheduler scaler")
EpochResult = namedtuple("EpochResult", "loss accuracy samples seconds")


def compare(args, device, store):
    """Check DDP, then train both ways. Return False if this rank finds DDP wrong."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # DDP 3: same start. All ranks must make the same datasets: here, by the seed. DDP,
    # when it wraps the model (below), sends rank 0's weights to all ranks.
    seed_everything(args.seed)
    dataset, _ = make_datasets(args)  # nothing is validated here
    model = make_model(args).to(device)
    check_data(dataset, args, device)
    ddp_model = wrap(model)  # shares its weights with `model`
    if any(isinstance(module, nn.SyncBatchNorm) for module in ddp_model.modules()):
        stop("SyncBatchNorm cannot train normally, on rank 0 alone: take BatchNorm")
    # DDP 4: shard. Each rank trains on its own part of the dataset. All parts have
    # equally many batches, all full: a few samples are left out, not always the same.
    options = {"num_replicas": world_size, "seed": args.seed, "drop_last": True}
    ranks = range(world_size)
    samplers = [DistributedSampler(dataset, rank=r, **options) for r in ranks]
    shards = [BatchSampler(each, args.batch_size, drop_last=True) for each in samplers]
    steps_per_epoch = math.ceil(len(shards[rank]) / args.grad_accum_steps)
    steps = args.epochs * steps_per_epoch
    loader = make_loader(dataset, shards[rank], args, device)
    training = make_training(model, steps, args, device)
    ways = {"ddp": Way(ddp_model, loader, training, args)}
    if rank == 0:
        seed_everything(args.seed)
        normal_model = make_model(args).to(device)  # not all models can be copied
        normal_model.load_state_dict(model.state_dict())
        # A normal step takes the batches that a DDP step takes on all ranks together.
        normal_args = copy.copy(args)
        normal_args.grad_accum_steps *= world_size
        loader = make_loader(dataset, InTurn(shards), args, device)
        training = make_training(normal_model, steps, args, device)
        ways["normal"] = Way(normal_model, loader, training, normal_args)

    figures = check(ways, dataset, device, store)
    results = {"normal": [], "ddp": []}  # of each epoch
    for epoch in range(args.epochs):
        for sampler in samplers:
            sampler.set_epoch(epoch)  # DDP 5: reshuffle, or all epochs are alike
        # They take turns in going first, to be fair to both.
        for name in ["normal", "ddp"] if epoch % 2 == 0 else ["ddp", "normal"]:
            # For dropout and augmentation: different on each rank, and in each epoch.
            seed_everything(args.seed + epoch * world_size + rank)
            if name in ways:
                # DDP 6 and 7, synchronise and measure globally, are in what this calls.
                results[name].append(train_epoch(*ways[name], device))
            wait_for_rank_0(store, f"epoch {epoch}, {name}")
        if rank == 0:  # DDP 8: rank 0 alone prints results
            print_epoch(epoch, args.epochs, results["normal"][-1], results["ddp"][-1])
    # All ranks have equal weights, unless something has trained without DDP.
    norms = [p.norm(1).item() for p in model.parameters() if p.requires_grad]
    warning = "the ranks' weights differ. README: Different weights"
    figures["same_weights"] = check_same(norms, warning)
    figures.update(measure_steps(ways, results, steps_per_epoch, dataset, device))
    if rank == 0:
        report(results, figures, args)
        if args.json:
            text = json.dumps({**vars(args), **figures})
            figures_or_null = json.loads(text, parse_constant=lambda _: None)  # no NaN
            with open(args.json, "w") as file:
                json.dump(figures_or_null, file, indent=1)
    return figures["same_gradients"] is not False and figures["same_weights"]


class InTurn:
    """The first batch of each of these batch samplers, then their second ones, ..."""

    def __init__(self, batch_samplers):
        self.batch_samplers = batch_samplers

    def __iter__(self):
        return chain.from_iterable(zip(*self.batch_samplers))

    def __len__(self):
        return sum(map(len, self.batch_samplers))


def train_epoch(model, loader, training, args, device, after_step=None):
    """Train one epoch, or its rest, with DDP or (in ddp.py) without.

    After each step but the last, rank 0 calls `after_step(batches done)`.
    """
    is_ddp = hasattr(model, "no_sync")  # isinstance() would miss a compiled one
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_ddp else (0, 1)
    metrics, batches_done = Metrics(device), 0
    batches, num_batches = iter(loader), len(loader)
    model.train()
    start = last_print = time.perf_counter()
    while step_batches := list(islice(batches, args.grad_accum_steps)):
        # Before the batches are moved, as reading a value from a GPU would wait for it.
        counts = [as_number(count_items(batch)) for batch in step_batches]
        train_step(model, step_batches, counts, training, metrics, args, device)
        batches_done += len(step_batches)
        del step_batches  # before the next ones are read: faster, if they are large
        samples = batches_done * args.batch_size * world_size
        if after_step and rank == 0 and batches_done < num_batches:
            after_step(batches_done)
        if rank == 0 and time.perf_counter() - last_print > 5:
            last_print = time.perf_counter()
            loss = metrics.loss_sum.item() / max(metrics.items, 1)
            line = f"  batch {batches_done}/{num_batches}  loss of rank 0 {loss:.4f}"
            print(f"{line}  {samples / (last_print - start):,.2f} samples/s")
    loss, accuracy = metrics.means(is_ddp)  # waits for the GPU, so the time is right
    seconds = time.perf_counter() - start
    if is_ddp and isinstance(metrics.items, int):
        check_same(metrics.items, "count_items' ints differ: let it return a tensor")
    return EpochResult(loss, accuracy, samples, seconds)


def as_number(count):
    """Return an int (equal on all ranks) as it is, a tensor (unequal) as a float."""
    return count if isinstance(count, int) else float(count)


def train_step(model, batches, counts, training, metrics, args, device):
    """Take one optimizer step; with DDP, it is one step of all ranks together."""
    optimizer, scheduler, scaler = training
    accumulate_gradients(model, batches, counts, scaler.scale, metrics, args, device)
    scaler.unscale_(optimizer)
    if args.max_grad_norm:
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    scaler.step(optimizer)  # with the same gradients on all ranks
    scaler.update()
    if scheduler:
        scheduler.step()
    optimizer.zero_grad()


def accumulate_gradients(model, batches, counts, scale, metrics, args, device):
    """Compute a step's gradients, over `batches` and, with DDP, the other ranks'.

    `counts`: the number of items in each batch. `scale`: a function that is applied to
    each loss, as that of a GradScaler.
    """
    is_ddp = hasattr(model, "no_sync")
    items_per_rank = sum(counts)
    if is_ddp and not isinstance(counts[0], int):  # unequal numbers: take their mean
        items_per_rank = torch.full((), sum(counts), dtype=torch.float32, device=device)
        dist.all_reduce(items_per_rank)  # now the sum over all ranks
        items_per_rank /= dist.get_world_size()
    for index, (batch, count) in enumerate(zip(batches, counts)):
        # DDP 6: synchronise. backward() averages the gradients over all ranks while it
        # computes them. In no_sync(), which must enclose the forward pass, too, it
        # averages nothing: once per step is enough.
        is_last = index == len(counts) - 1
        with model.no_sync() if is_ddp and not is_last else nullcontext():
            with autocast(args, device):
                loss, correct = compute_loss(model, to_device(batch, device))
            # loss * count is the sum over the batch's items. Divided by items_per_rank,
            # and averaged over the ranks by DDP, it is the mean over all of the step.
            weight = count / items_per_rank if count else 0.0
            scale(loss * weight).backward()
        metrics.add(loss, correct, count)


class Metrics:
    """Adds up what a rank's batches give; at the end, returns means over all ranks."""

    def __init__(self, device):
        # On the device: reading a value there, as .item() does, waits for the GPU.
        self.loss_sum, self.correct = torch.zeros(2, dtype=torch.float64, device=device)
        self.items = 0

    @torch.no_grad()
    def add(self, mean_loss, correct, count):
        self.items += count
        if count:  # the mean loss of no items is NaN
            self.loss_sum.add_(mean_loss, alpha=count)
            self.correct += correct

    def means(self, of_all_ranks=True):
        """Return the mean loss, and the share of items that are correct, 0 to 1."""
        items = torch.full_like(self.correct, self.items)
        sums = torch.stack([self.loss_sum, self.correct, items])
        # DDP 7: measure globally. The mean of rank 0's items is not the mean of all.
        if of_all_ranks:
            dist.all_reduce(sums)  # each rank now has the sum over all ranks
        return (sums[:2] / sums[2]).tolist()


def wait_for_rank_0(store, name):
    """Wait for rank 0, however long it takes. (A collective would end at --timeout.)"""
    if dist.get_rank() == 0:
        store.set(name, "done")
    store.wait([name], timedelta(days=20))


# Is DDP right? If so, it has normal training's gradients, with the initial weights.


def check(ways, dataset, device, store):
    """Take the gradients of a step both ways; rank 0 prints whether they are the same.

    Nothing is trained or changed. Returns figures, which are complete on rank 0 only.
    """
    args = ways["ddp"].args

    def take(name, backwards=False):
        way = ways[name]
        indices = list(islice(way.loader.batch_sampler, way.args.grad_accum_steps))
        if backwards:
            indices.reverse()
        return take_gradients(way.model.train(), dataset, indices, way.args, device)

    if dist.get_rank() == 0:
        expected = take("normal")
    wait_for_rank_0(store, "check")
    found = take("ddp")
    if dist.get_rank() > 0:
        return {"same_gradients": None}
    # How much may be rounding? (A mistake gives 0.3 or more.) GPUs add up in any order;
    # bfloat16 and float16 have three digits.
    limit = 1e-4 if device.type == "cpu" else 1e-2
    if args.precision != "float32" or any(g.element_size() < 4 for g in expected):
        limit = 2e-2
    gaps, lengths = compare_gradients(expected, found)
    difference = (gaps / lengths).max().item()
    same = difference < limit
    if not same:
        # A gradient that should be 0, as of a bias before BatchNorm, is only rounding
        # noise. Take normal training's gradients again, with its batches in reverse:
        # that gives only noise, too. Forgive gaps up to 10 times the largest, or 1e-7
        # of all gradients' length. If noise is too large, or NaN, one cannot tell.
        noise = compare_gradients(expected, take("normal", backwards=True))[0].max()
        whole = lengths.norm()
        gaps = (gaps - torch.maximum(10 * noise, 1e-7 * whole)).clamp(min=0)
        difference = (gaps / lengths).max().item()
        same = difference < limit if noise < limit * whole else None
    off = f"normal training's ({difference:.1g} off)."
    verdicts = {
        True: f"DDP is right: its gradients are {off}",
        False: f"DDP is WRONG: its gradients are not {off} README: Wrong.",
        None: "Cannot tell if DDP is right: normal training, repeated, has other"
        " gradients, or infinite ones. README: Not repeatable.",
    }
    print_wrapped(verdicts[same])
    mixes = mixes_samples(ways["normal"].model, dataset, args, device)
    if same and mixes:
        text = "Samples of a batch affect each other, as with BatchNorm: so DDP does"
        print_wrapped(f"{text} not train as one large batch would. README: Mixing.")
    size = sum(gradient.nbytes for gradient in expected)
    figures = {"same_gradients": same, "gradient_difference": difference}
    return {**figures, "mixes_samples": mixes, "gradient_bytes": size}


def compare_gradients(expected, found):
    """Return, for each parameter, how far gradients are apart and how long they are."""
    gaps = [(one - other).norm().item() for one, other in zip(expected, found)]
    lengths = [gradient.norm().item() for gradient in expected]
    return torch.tensor(gaps), torch.tensor(lengths).clamp(min=1e-30)


class Seeded(Dataset):
    """Reads a dataset with seeded augmentation, so that all ranks read the same."""

    def __init__(self, dataset, seed=0):
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, indices):
        if hasattr(self.dataset, "__getitems__"):
            seed_everything(indices[0] + self.seed)  # another batch, other numbers
            samples = self.dataset.__getitems__(indices)
        else:
            samples = []
            for index in indices:
                seed_everything(index)  # in any batch, the same numbers
                samples.append(self.dataset[index])
        seed_everything(self.seed)  # for collate
        return samples


def take_gradients(model, dataset, batch_indices, args, device, seed=0):
    """Return the gradients of a step, in CPU memory. The model stays as it was.

    They can be repeated: before each batch, random numbers (dropout) start anew, and
    what changes without training (BatchNorm's statistics) gets its first values again.
    """

    def untrained():  # by name, as a forward pass may replace a buffer
        named = chain(model.named_parameters(), model.named_buffers())
        return {name: value for name, value in named if not value.requires_grad}

    first = {name: value.detach().clone() for name, value in untrained().items()}

    def reset():
        seed_everything(seed)
        for name, value in untrained().items():
            value.data = first.get(name, value).clone()

    def reset_before_each():
        for batch in batches:
            reset()
            yield batch

    batches = list(make_loader(Seeded(dataset, seed), batch_indices, args, device))
    counts = [as_number(count_items(batch)) for batch in batches]
    # With DDP, a loss is divided by the items of one rank: it is world_size times as
    # large, until DDP averages the gradients. Do the same in normal training here: or
    # float16 and bfloat16 would round differently.
    factor = 1 if hasattr(model, "no_sync") else dist.get_world_size()
    more = (lambda loss: factor * loss), Metrics(device), args, device
    try:
        accumulate_gradients(model, reset_before_each(), counts, *more)
        trained = [p for p in model.parameters() if p.requires_grad]
        taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        return [(gradient.to_dense() / factor).cpu() for gradient in taken]
    finally:
        model.zero_grad()
        reset()


def mixes_samples(model, dataset, args, device):
    """Return whether samples of a batch affect each other; None if that cannot be told.

    If they do not, a batch has the same gradient as its parts, and several batches
    train as a large one does.
    """
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    if any(isinstance(module, kinds) for module in model.modules() if module.training):
        return True
    args = copy.copy(args)
    args.precision = "float32"

    def take(*batch_indices, seed=0):
        return take_gradients(model.eval(), dataset, batch_indices, args, device, seed)

    def differ(expected, found):
        gaps, lengths = compare_gradients(expected, found)
        return bool((gaps / lengths.maximum(1e-3 * lengths.norm())).max() > 1e-2)

    size = 2 * min(len(dataset) // 2, args.batch_size, 8)
    part = min(2, size // 2)
    try:
        whole = take(range(size))
        if differ(whole, take(range(size), seed=1)):  # there is other randomness
            return None
        return differ(whole, take(*[range(i, i + part) for i in range(0, size, part)]))
    except Exception:  # noqa: BLE001, not every model has a loss in evaluation mode
        return None
    finally:
        model.train()


# Is it faster? And if not, why not?


def print_epoch(epoch, epochs, normal, ddp):
    """Print a line with an epoch of both trainings, side by side."""
    if epoch == 0:
        print(f"{'':9}{'normal':>31}{'DDP':>31}")
        print(f"{'epoch':>9}" + "     loss  accuracy   samples/s" * 2 + " speedup")
    line = f"{f'{epoch + 1}/{epochs}':>9}"
    for result in (normal, ddp):
        rate = result.samples / result.seconds
        line += f"{result.loss:9.4f}{result.accuracy:10.1%}{rate:12,.1f}"
    print(f"{line}{normal.seconds / ddp.seconds:8.2f}")


def measure_steps(ways, results, steps_per_epoch, dataset, device):
    """Return the ms of a normal step, and of a DDP step's parts. Spoils the weights.

    Steps are timed with batches that are on the device already, with and without
    averaging gradients: that is sync. What a step of the epochs took beyond is data.
    """
    step_ms = {}  # of the median epoch; the first one warms up
    for name in ways:
        seconds = [result.seconds for result in results[name][1:] or results[name]]
        step_ms[name] = 1000 * statistics.median(seconds) / steps_per_epoch
    repeats = [max(2, round(400 / step_ms["ddp"]))]  # for nearly half a second
    dist.broadcast_object_list(repeats, 0)  # rank 0's, for all
    args = ways["ddp"].args

    def time_steps_of(name, batch_indices):
        model, _, training, _ = ways[name]  # but with DDP's grad_accum_steps
        return time_steps(
            model, dataset, batch_indices, repeats[0], training, args, device
        )

    # The batches of up to four steps, as they can differ in size.
    num_batches = args.grad_accum_steps * min(repeats[0], 4)
    batch_indices = list(islice(ways["ddp"].loader.batch_sampler, num_batches))
    # The smaller one, as noise could make a part negative.
    synced_ms = min(time_steps_of("ddp", batch_indices), step_ms["ddp"])
    with ways["ddp"].model.no_sync():  # of all batches: weights drift apart from here
        compute_ms = min(time_steps_of("ddp", batch_indices), synced_ms)
    parts = {"data": step_ms["ddp"] - synced_ms, "compute": compute_ms}
    parts["sync"] = synced_ms - compute_ms
    figures = {"ddp_step_ms": parts, "normal_step_ms": step_ms.get("normal")}
    figures["large_batch_step_ms"] = None
    if "normal" in ways and device.type == "cuda":
        # One device might take a batch as large as those of all ranks together. (Not
        # tried on a CPU, which can run out of memory without an exception.)
        batch_indices = [range(args.batch_size * args.world_size)]
        batch_indices *= args.grad_accum_steps
        with suppress(torch.cuda.OutOfMemoryError):
            figures["large_batch_step_ms"] = time_steps_of("normal", batch_indices)
    return figures


def time_steps(model, dataset, batch_indices, repeats, training, args, device):
    """Return the mean ms of an optimizer step on these batches, without reading."""
    batches = list(make_loader(dataset, batch_indices, args, device))
    counts = [as_number(count_items(batch)) for batch in batches]
    batches = [to_device(batch, device) for batch in batches]
    training = training._replace(scheduler=None)  # it has done all its steps
    metrics, starts = Metrics(device), range(0, len(batches), args.grad_accum_steps)
    for number, start in zip(range(repeats + 1), cycle(starts)):
        if number == 1:  # the first step warms up
            metrics.loss_sum.item()  # waits for the GPU
            begin = time.perf_counter()
        step = slice(start, start + args.grad_accum_steps)
        copies = [copy.copy(batch) for batch in batches[step]]  # compute_loss may pop
        train_step(model, copies, counts[step], training, metrics, args, device)
    metrics.loss_sum.item()
    return 1000 * (time.perf_counter() - begin) / repeats


def report(results, figures, args):
    """Complete the figures; print times, where a step's time goes, and the verdict."""
    for name, way in (("Normal", "normal"), ("DDP", "ddp")):
        seconds = figures[f"{way}_seconds"] = sum(r.seconds for r in results[way])
        print(f"{name} training time: {seconds:.2f} seconds")
        figures[way] = results[way][-1]._asdict()
    pairs = list(zip(results["normal"], results["ddp"]))
    ratios = [normal.seconds / ddp.seconds for normal, ddp in pairs[1:] or pairs]
    parts = figures["ddp_step_ms"]
    normal_ms, ddp_ms = figures["normal_step_ms"], sum(parts.values())
    figures.update(speedup=normal_ms / ddp_ms, speedup_range=[min(ratios), max(ratios)])
    print(f"\nA step takes {normal_ms:.2f} ms normally, {ddp_ms:.2f} with DDP:")
    for part, ms in parts.items():
        print(f"  {part:7} {ms:8.2f} ms  {'#' * round(50 * ms / ddp_ms)}")
    print(f"(sync averages {figures['gradient_bytes']:,} bytes of gradients)")
    if figures["large_batch_step_ms"]:
        size, ms = args.batch_size * args.world_size, figures["large_batch_step_ms"]
        print(f"One device, with batches of {size:,}: {ms:.2f} ms, without data")
    print_wrapped(verdict(figures, len(ratios), args))


def verdict(figures, num_ratios, args):
    """Return in words what the figures show, why, and what would help."""
    speedup, (slowest, fastest) = figures["speedup"], figures["speedup_range"]
    data, compute, sync = figures["ddp_step_ms"].values()
    unsynced, normal_ms = data + compute, figures["normal_step_ms"]
    how = "DDP makes no clear difference"
    if num_ratios == 1:
        how = "Too few epochs to tell"
    elif slowest > 1 and speedup > 1.1 and args.world_size > 1:
        how = "DDP is faster"
    elif fastest < 1 and speedup < 0.9:
        how = "DDP is slower"
    text = f"{how}: {speedup:.2f} times the speed of normal training ({slowest:.2f} to"
    text += f" {fastest:.2f} in single epochs)"
    if args.world_size == 1:
        return f"{text}. One process cannot be faster."
    text += f", where {args.world_size} would be ideal."
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices, kind = (gpus, "GPUs") if gpus else (args.cores, "cores")
    if args.world_size > devices:
        text += f" {args.world_size} processes share {devices} {kind}"
        return f"{text}: start no more."
    if data > max(compute, sync):
        return f"{text} Loading costs most: try --num_workers {args.num_workers + 2}."
    if unsynced >= 4 * sync:  # synchronising takes a fifth of a step, or less
        return text
    # How much more work for each synchronisation makes it a fifth?
    factor = next((f for f in (2, 4, 8) if f * unsynced >= 4 * sync), None)
    if factor is None or normal_ms < 1.3 * unsynced:  # that would not gain much
        text += f" There is too little work to share ({unsynced:.2f} ms, for {sync:.2f}"
        return f"{text} ms of sync): use a larger batch or model."
    # Both ways then have `factor` times the work in a step, but sync stays as it is.
    gain = factor * normal_ms / (factor * unsynced + sync)
    text += f" About {gain:.1f} with --grad_accum_steps"
    text += f" {factor * args.grad_accum_steps} or, if it fits, --batch_size"
    text += f" {factor * args.batch_size}: the global batch becomes {factor} times as"
    return f"{text} large, so mind the learning rate."


def print_wrapped(text):
    print(textwrap.fill(text, 80, break_on_hyphens=False))


# Helpers. Most are shared with torchrun_ddp.py.


def choose_device(local_rank):
    """Return this process's GPU, shared if there are too few, or else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # first of all, or each rank takes memory on GPU 0
    return device


def use_definitions(path):
    """Let what this Python file defines take the place of the definitions above."""
    names = "MyDataset MyModel make_datasets make_model compute_loss count_items"
    names = f"{names} collate make_optimizer make_scheduler wrap".split()
    folder, file = os.path.split(os.path.abspath(path))
    sys.path.insert(0, folder)  # so that it can import its neighbours
    module = importlib.import_module(os.path.splitext(file)[0])
    found = {name: vars(module)[name] for name in names if name in vars(module)}
    globals().update(found)
    if not found and os.environ["RANK"] == "0":  # then the others are ended
        print(f"{path} defines none of {', '.join(names)}", file=sys.stderr)
        sys.exit(2)
    if os.environ["RANK"] == "0":
        print(f"From {path}: {', '.join(found)}")


def seed_everything(seed):
    """Seed all that draws random numbers: PyTorch, Python, and NumPy if it is used."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def check_data(dataset, args, device):
    """Check that all ranks read the same data, as far as eight samples can tell."""
    length = len(dataset)
    if not check_same(length):
        stop(f"{length} samples, but not on all ranks. README: Different data")
    if length < args.batch_size * dist.get_world_size():
        stop(f"{length} samples are too few: no rank would have a whole batch")
    # Compare eight samples, which all ranks read as in training, with equal random
    # numbers: their repr, without the addresses of objects in it.
    seed_everything(args.seed)
    indices = [number * (length - 1) // 7 for number in range(8)]
    samples = next(iter(make_loader(dataset, [indices], args, device)))
    text = re.sub("0x[0-9A-Fa-f]+", "", repr(samples))
    check_same(text, "the ranks read different samples. README: Different data")


def check_same(value, warning=""):
    """Return whether all ranks, which must all call this, have one value; else warn."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, str(value))  # text, as NaN is not equal to NaN
    same = len(set(values)) == 1
    if warning and not same and dist.get_rank() == 0:
        print(f"WARNING: {warning}")
    return same


def leave_group():
    """Leave the process group, in such a way that Gloo does not abort or hang."""
    gc.collect()  # the DDP model, in a reference cycle, holds it: pytorch issue 190489
    time.sleep(0.1)  # a thread of Gloo may be freeing the last message
    dist.destroy_process_group()


def stop(reason):
    """Say why, leave the group, and end. All ranks have to call this."""
    print(reason, file=sys.stderr, flush=True)
    leave_group()
    sys.exit(1)


def make_loader(dataset, batch_sampler, args, device):
    """Return a DataLoader of the batches whose indices `batch_sampler` gives."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=args.num_workers,
        timeout=args.timeout if args.num_workers else 0,
        persistent_workers=args.num_workers > 0,  # or each epoch starts them again
        pin_memory=device.type == "cuda",  # non_blocking copies need it
    )


def autocast(args, device):
    """Return a context in which PyTorch computes in --precision where that is safe."""
    if args.precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, args.precision))


def to_device(batch, device):
    """Return a batch, whatever it is made of, with its tensors on `device`."""
    if callable(getattr(type(batch), "to", None)):  # a tensor, a graph, ...
        try:
            return batch.to(device, non_blocking=True)
        except TypeError:  # a tokenizer's batch, before transformers 4.48
            return batch.to(device)
    if isinstance(batch, dict) or hasattr(batch, "__dataclass_fields__"):
        moved = copy.copy(batch)  # of the same type
        fields = moved if isinstance(batch, dict) else vars(moved)
        for key, value in list(fields.items()):
            fields[key] = to_device(value, device)
        return moved
    if isinstance(batch, (list, tuple)):
        parts = [to_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def parse_flags(parser):
    """Add the flags of both scripts; return all arguments, or exit with code 2."""
    numbers = [  # with their smallest values
        ("--epochs", 5, 1, "passes over the dataset"),
        ("--batch_size", 64, 1, "samples per process and batch"),
        ("--grad_accum_steps", 1, 1, "batches per process and optimizer step"),
        ("--learning_rate", 0.01, 0, "of Adam"),
        ("--max_grad_norm", 0.0, 0, "clip gradients to this norm; 0: do not"),
        ("--dataset_length", 20000, 1, "samples in the dataset"),
        ("--input_size", 100, 1, "features per sample"),
        ("--num_workers", 0, 0, "DataLoader workers per process"),
        ("--seed", 0, 0, "of weights, data and shuffling"),
        ("--timeout", 600.0, 1, "seconds that a rank waits for others or workers"),
    ]
    add, gpus = parser.add_argument, torch.cuda.is_available()
    for flag, default, _, help in numbers:
        help += f" (default: {default})"
        add(flag, type=type(default), default=default, metavar="N", help=help)
    kinds = ["float32", "bfloat16", "float16"]
    help = "bfloat16: A100, RTX 30 and newer, CPUs; float16: older GPUs, as T4, V100"
    add("--precision", choices=kinds, default=kinds[0], help=help)
    backend = "nccl" if gpus and dist.is_nccl_available() else "gloo"
    help = f"nccl needs a GPU per process; gloo lets them share (default: {backend})"
    add("--backend", choices=["nccl", "gloo"], default=backend, help=help)
    add("--definitions", metavar="FILE", help="Python file with your MyDataset, ...")
    args = parser.parse_args()
    for flag, _, minimum, _ in numbers:
        if not minimum <= getattr(args, flag[2:]) < math.inf:  # refuses NaN, too
            parser.error(f"{flag} must be a number from {minimum}")
    if args.backend == "nccl" and not gpus:
        parser.error("--backend nccl needs a CUDA GPU; use --backend gloo")
    file = args.definitions or ""
    name = os.path.splitext(os.path.basename(file))[0]
    if file and (not os.path.isfile(file) or name in sys.modules):
        parser.error(f"--definitions {file}: no such file, or a module has its name")
    return args


def make_training(model, steps, args, device):
    """Return what train_step needs besides a model. (The scheduler can be None.)"""
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "float16")
    return Training(optimizer, make_scheduler(optimizer, steps, args), scaler)


def open_store(parser):
    """Return the ranks' store, at MASTER_ADDR and MASTER_PORT (default: a free one)."""
    address = os.environ.get("MASTER_ADDR") or "localhost"
    port = os.environ.get("MASTER_PORT") or "0"
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, int(port)), family=family)
    except (OSError, OverflowError, ValueError) as reason:
        parser.error(f"MASTER_ADDR={address} MASTER_PORT={port}: {reason}")
    host, port = server.getsockname()[:2]
    # Given this socket, the store listens at this address only. (libuv, the default,
    # cannot take one in PyTorch 2.6.)
    given = {"master_listen_fd": server.detach(), "use_libuv": False}
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, **given)


def parse_args():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    help = "number of processes (default: one per GPU or, without GPUs, 2)"
    parser.add_argument("--world_size", type=int, default=gpus or 2, help=help)
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    args = parse_flags(parser)
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    args.cores = len(affinity(0))  # on Linux, those that this process may use
    most = max(16, args.cores, gpus)
    if not 1 <= args.world_size <= most:
        parser.error(f"--world_size must be from 1 to {most}")
    too_few = args.world_size > gpus and "NCCL_MULTI_RANK_GPU_ENABLE" not in os.environ
    if args.backend == "nccl" and too_few:
        parser.error("fewer GPUs than processes: --backend gloo lets them share")
    if args.json:
        try:
            open(args.json, "a").close()
        except OSError as reason:
            parser.error(f"--json: {reason}")
    return args, open_store(parser)


if __name__ == "__main__":
    main()
