"""Compare normal training with DistributedDataParallel (DDP) training.

Does DDP compute the same gradients, is it faster, and if not, why not? Try it with one
process per GPU or, without GPUs, two that share the CPU; or compare several numbers:

    python ddp.py
    python ddp.py --world_size 1 2 --batch_size 128

This starts the processes itself. In every epoch, the first of them trains normally, as
with one device: it takes the batches of all ranks, one after the other, and accumulates
their gradients. Then all train the same steps with DDP, each rank on its own batches.
They meet in a store (a server of keys and values) at MASTER_ADDR and MASTER_PORT, from
the environment or a file .env.

To check your own model, replace MyDataset, MyModel and compute_loss (and collate, where
samples cannot simply be stacked). Nothing else depends on what is in a batch.

A rank is a process's number, or the process; the world size is how many there are. A
collective is a call by which ranks exchange data: all ranks must make it, or the others
hang. Comments "DDP 1" to "DDP 9" mark what makes ordinary training distributed, in the
order in which it runs: the last, DDP 9, is at the end of worker.
"""

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import random
import signal
import socket
import statistics
import sys
import textwrap
import time
from array import array
from collections import namedtuple
from contextlib import nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, it would keep the group alive: DDP 9
import torch.multiprocessing as mp
from dotenv import load_dotenv
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler


class MyDataset(Dataset):
    """Random inputs of shape (size,) and labels 0 or 1; train=False: different ones."""

    def __init__(self, length, size, seed=0, train=True):
        generator = torch.Generator().manual_seed(2 * seed + train)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices):
        """Return a batch. Optional: for data in memory, much faster than one by one."""
        # torch.tensor(indices) would take longer than reading the rows.
        rows = torch.frombuffer(array("q", indices), dtype=torch.int64)
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)


class MyModel(nn.Module):
    """One linear layer: inputs of shape (batch, input_size) to logits (batch, 2)."""

    def __init__(self, input_size):
        super().__init__()
        self.linear = nn.Linear(input_size, 2)

    def forward(self, inputs):
        return self.linear(inputs)


def compute_loss(model, batch):
    """Return the mean loss of a batch, its number of samples and how many are right.

    The number is an int and counts samples, not tokens. The others stay on the device,
    without .item(). In place of the last, any sum over the samples will do.
    """
    inputs, labels = batch
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, labels)
    return loss, len(labels), (outputs.argmax(dim=1) == labels).sum()


def collate(samples):
    """Return a batch: stack samples, or take what __getitems__ returned as it is."""
    if isinstance(samples, list):
        return torch.utils.data.default_collate(samples)
    return samples


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that "finally" runs
    load_dotenv()
    args, backends, store = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = " and ".join(dict.fromkeys(backends))
    print(f"PyTorch {torch.__version__} on {device} with {names}", flush=True)
    runs = []
    try:
        for world_size, backend in zip(args.world_size, backends):
            args.backend = backend
            # DDP 1: launch the processes, best one per device. They ignore SIGINT, as
            # Ctrl-C reaches all processes: this one alone reacts, and ends the others.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            name = f"run {len(runs)}"  # prefix of its keys in the store
            arguments = (world_size, args, os.getpid(), store.host, store.port, name)
            processes = mp.spawn(worker, arguments, world_size, join=False)
            signal.signal(signal.SIGINT, handler)
            while not processes.join():
                pass
            runs.append(json.loads(store.get(f"{name}/figures")))
    except KeyboardInterrupt:
        sys.exit(130)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        sys.exit(f"Training failed: {error}")
    finally:
        for process in mp.active_children():
            process.kill()
    if len(runs) > 1:
        print_table(runs)
    if args.json:
        versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
        figures = {**vars(args), **versions, "device": device, "runs": runs}
        # JSON has neither NaN nor Infinity: write null.
        figures = json.loads(json.dumps(figures), parse_constant=lambda _: None)
        with open(args.json, "w") as file:
            json.dump(figures, file, indent=1)
    sys.exit(1 if any(run["same_gradients"] is False for run in runs) else 0)


def worker(rank, world_size, args, parent, host, port, name):
    """Run in each process: join the group, compare, leave."""
    if sys.platform == "linux":  # die with the parent, instead of training on alone
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:  # the parent died first
        sys.exit(1)
    sys.stdout.reconfigure(line_buffering=True)  # lines appear at once, in files too
    torch.set_num_threads(max(1, args.cores // world_size))
    # DDP 2: take a device, then join the others. They meet in the parent's store.
    device = choose_device(rank)
    timeout = timedelta(seconds=args.timeout)
    store = dist.PrefixStore(name, dist.TCPStore(host, port, timeout=timeout))
    if rank == 0:  # it chooses for all ranks, as their GPUs may differ
        store.set("precision", choose_precision(args.amp, device))
    args.precision = store.get("precision").decode()
    group = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    dist.init_process_group(args.backend, **group)
    args.global_batch_size = args.batch_size * args.grad_accum_steps * world_size
    if rank == 0:
        batch = f"global batch {args.global_batch_size:,}"
        print(f"\nworld size {world_size}, {batch}, {args.precision}")
        if device.type == "cpu":
            share = f"{torch.get_num_threads()} of {args.cores} cores"
            print(f"Each process stands for a device, with {share}.")
    compare(rank, world_size, args, device, store)
    # DDP 9: leave, once the DDP model of compare is freed: if anything holds the group,
    # Gloo can abort at exit (https://github.com/pytorch/pytorch/issues/190489).
    gc.collect()
    dist.destroy_process_group()


def compare(rank, world_size, args, device, store):
    """Train in turns, normally and with DDP. Rank 0 stores the figures for main."""
    # DDP 3: same start. The seed gives all ranks the same data. DDP, when it wraps the
    # model, sends rank 0's weights to all ranks.
    torch.manual_seed(args.seed)
    dataset = MyDataset(args.dataset_length, args.input_size, args.seed)
    model = MyModel(args.input_size).to(device)
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        dist.destroy_process_group()
        reason = "SyncBatchNorm needs all ranks, but rank 0 trains normally alone"
        sys.exit(f"{reason}: compare with BatchNorm" if rank == 0 else 1)
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    normal_model = None
    if rank == 0:  # it is made anew, as not all models can be copied
        torch.manual_seed(args.seed)
        normal_model = MyModel(args.input_size).to(device)
        normal_model.load_state_dict(model.state_dict())
    normal_args = copy.copy(args)
    normal_args.grad_accum_steps *= world_size  # all ranks' batches, in turn
    models = (normal_model, normal_args), (ddp_model, args)
    figures = check(*models, dataset, device, store)

    # DDP 4: shard. Each rank reads its own part of the dataset. DistributedSampler makes
    # the parts equal: it repeats a few samples. Normal training reads all ranks' parts.
    batch_samplers = make_batch_samplers(len(dataset), args)
    loaders = [make_loader(dataset, each, args, device) for each in batch_samplers]
    torch.manual_seed(args.seed + rank)  # workers that start now augment differently
    if rank == 0:
        normal_training = prepare(normal_model, loaders[0], device, normal_args)
    ddp_training = prepare(ddp_model, loaders[1], device, args)
    normal_epochs, ddp_epochs = [], []  # what train_loop returned
    for epoch in range(args.epochs):
        for each in batch_samplers:
            each.sampler.set_epoch(epoch)  # DDP 5: reshuffle, or all epochs are alike
        # DDP 6 and 7, synchronise and measure globally, are in train_loop.
        if rank == 0:
            torch.manual_seed(args.seed + epoch)  # for dropout and augmentation
            normal_epochs.append(train_loop(*normal_training))
        wait_for_rank_0(store, f"epoch {epoch}")
        torch.manual_seed(args.seed + epoch * world_size + rank)
        ddp_epochs.append(train_loop(*ddp_training))
        if rank == 0:  # DDP 8: rank 0 alone prints
            print_epochs(epoch, args.epochs, normal_epochs[-1], ddp_epochs[-1])
    if rank == 0:
        weights = zip(normal_model.parameters(), model.parameters())
        differences = [(a.double() - b.double()).abs().max().item() for a, b in weights]
        figures["max_weight_difference"] = max(differences)
    figures["ddp_step_ms"] = measure_step(ddp_training, ddp_epochs)
    if rank == 0:
        figures.update(summarise(normal_epochs, ddp_epochs))
        step_ms = sum(figures["ddp_step_ms"].values())
        figures["normal_step_ms"] = step_ms * figures["speedup"]
        figures.update(world_size=world_size, global_batch_size=args.global_batch_size)
        figures.update(backend=args.backend, precision=args.precision)
        print_report(figures, args)
        store.set("figures", json.dumps(figures))


def train_loop(model, loader, optimizer, scaler, device, args, on_step=None):
    """Train one epoch. Without DDP around `model`, this is ordinary training.

    A step takes `batch_size` x `grad_accum_steps` samples of each rank: together, the
    global batch, to which the learning rate has to fit. After each step but the last,
    calls `on_step(steps, samples)` with the numbers done so far, of all ranks.
    """
    is_ddp = hasattr(model, "no_sync")  # isinstance() would miss a compiled one
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_ddp else (0, 1)
    autocast = make_autocast(args.precision, device)
    num_batches, accum = len(loader), args.grad_accum_steps
    batch_size = loader.batch_sampler.batch_size
    length = len(loader.batch_sampler.sampler)  # samples of this rank
    # Sums stay on the device: reading one, with .item(), waits for the GPU.
    loss_sum, right_sum = torch.zeros(2, dtype=torch.float64, device=device)
    done = 0
    model.train()
    begin = last_print = time.perf_counter()
    for number, batch in enumerate(loader, 1):
        if (number - 1) % accum == 0:
            # A step begins. How many samples will it have? The last has what is left.
            step_samples = min(accum * batch_size, length - (number - 1) * batch_size)
        step_ends = number % accum == 0 or number == num_batches
        # DDP 6: synchronise. backward() averages the gradients over all ranks while it
        # computes them. In no_sync(), which must enclose the forward pass as well, it
        # averages nothing: once per step is enough.
        with model.no_sync() if is_ddp and not step_ends else nullcontext():
            with autocast:
                loss, count, right = compute_loss(model, to_device(batch, device))
            assert count <= batch_size, "compute_loss must count samples, not tokens"
            # With this factor, each sample of the step weighs the same.
            scaler.scale(loss * (count / step_samples)).backward()
        done += count
        with torch.no_grad():
            loss_sum.add_(loss, alpha=count)
            right_sum += right
        if step_ends:
            scaler.unscale_(optimizer)  # after this, gradients can be clipped
            scaler.step(optimizer)  # with the same gradients on all ranks
            scaler.update()
            optimizer.zero_grad()
            if on_step and number < num_batches:
                on_step(number // accum, done * world_size)
        if time.perf_counter() - last_print > 5 and rank == 0:
            loss = loss_sum.item() / done
            last_print = time.perf_counter()
            rate = format_rate(done * world_size, last_print - begin)
            print(f"  batch {number}/{num_batches}  loss {loss:.4f}  {rate} samples/s")
    assert done == length, f"compute_loss counted {done} samples instead of {length}"
    # DDP 7: measure globally. The mean of rank 0's samples is not the mean of all.
    totals = torch.stack([loss_sum, right_sum, loss_sum.new_tensor(done)])
    if world_size > 1:
        dist.all_reduce(totals)  # each rank now has the sum over all ranks
    loss_sum, right_sum, done = totals.tolist()
    seconds = time.perf_counter() - begin
    return EpochResult(loss_sum / done, right_sum / done, int(done), seconds)


EpochResult = namedtuple("EpochResult", "loss accuracy samples seconds")  # of all ranks


def make_batch_samplers(length, args):
    """Return those of normal training and of this rank, for `length` samples."""
    ours = DistributedSampler(range(length), seed=args.seed)
    everything = DistributedSampler(range(length), 1, 0, seed=args.seed)
    # It repeats the samples that the ranks' samplers repeat.
    everything.num_samples = everything.total_size = ours.total_size
    normal = BatchesOfAllRanks(everything, args.batch_size, drop_last=False)
    return normal, BatchSampler(ours, args.batch_size, drop_last=False)


class BatchesOfAllRanks(BatchSampler):
    """Rank 0's first batch, rank 1's first, and so on; then their second ones."""

    def __iter__(self):
        ranks, order = dist.get_world_size(), list(self.sampler)
        for begin in range(0, len(order), ranks * self.batch_size):
            batches = order[begin : begin + ranks * self.batch_size]
            yield from (batches[rank::ranks] for rank in range(ranks))

    def __len__(self):
        ranks = dist.get_world_size()
        return ranks * math.ceil(len(self.sampler) / ranks / self.batch_size)


def prepare(model, loader, device, args):
    """Return the arguments of train_loop; start what must not start in a timed epoch."""
    next(iter(loader))  # starts the workers
    tiny = nn.Linear(1, 1).to(device)  # the optimizer's kernels
    tiny(torch.ones(1, 1, device=device)).sum().backward()
    make_optimizer(tiny, args.learning_rate).step()
    optimizer = make_optimizer(model, args.learning_rate)
    return model, loader, optimizer, make_scaler(args.precision, device), device, args


def wait_for_rank_0(store, name):
    """Wait for rank 0, however long it takes: a collective would have --timeout."""
    if dist.get_rank() == 0:
        store.set(name, "done")
    store.wait([name], timedelta(days=20))


def check(normal, ddp, dataset, device, store):
    """Is DDP right? Print the answer; return figures. Nothing is trained or changed.

    `normal` and `ddp`: a model and its args. Compares the gradients of up to two whole
    steps and of one like an epoch's last, with the first weights. (In training, rounding
    grows: even right weights differ.)
    """
    (normal_model, normal_args), (ddp_model, args) = normal, ddp
    global_batch_size = args.global_batch_size
    count = 2 * global_batch_size + len(dataset) % global_batch_size
    count = min(len(dataset), count)
    indices = [number * len(dataset) // count for number in range(count)]  # spread
    batch_samplers = make_batch_samplers(count, args)
    loaders = [DataLoader(indices, batch_sampler=each) for each in batch_samplers]
    normal = normal_model, loaders[0], dataset, device, normal_args
    if dist.get_rank() == 0:
        expected = take_gradients(*normal)
    wait_for_rank_0(store, "check")
    gradients = take_gradients(ddp_model, loaders[1], dataset, device, args)
    if dist.get_rank() > 0:
        return {}
    difference = relative_difference(expected, gradients)
    trained = [p for p in ddp_model.parameters() if p.requires_grad]
    limit = 1e-2 if device.type == "cuda" else 1e-4
    if args.precision != "float32" or min(p.element_size() for p in trained) < 4:
        limit = 2e-2
    same = difference < limit
    mixes = mixes_samples(normal_model, dataset, args, device)
    gap = f"(difference {difference:.1g})"
    if same:
        text = f"DDP is right: its gradients are normal training's {gap}."
    elif not all(step.isfinite().all() for step in expected):
        text = "The gradients are not finite: there is nothing to compare."
    elif not relative_difference(expected, take_gradients(*normal)) < limit:
        same = None
        text = "Cannot tell if DDP is right: normal training, repeated, has other"
        text += " gradients. README: Not repeatable."
    else:
        text = f"DDP is WRONG: its gradients are not normal training's {gap}."
        text += " README: Wrong."
    if same and mixes:
        text += "\nSamples of a batch affect each other, as with BatchNorm: so it does"
        text += (
            f" not train as one batch of {global_batch_size:,} does. README: Mixing."
        )
    for line in text.splitlines():
        print(textwrap.fill(line, 80))
    size = sum(p.numel() * p.element_size() for p in trained)
    figures = {"same_gradients": same, "gradient_difference": difference}
    return {**figures, "mixes_samples": mixes, "gradient_bytes": size}


def take_gradients(model, loader, dataset, device, args, training=True, seed=0):
    """Return, on rank 0, the gradients of each step of train_loop; train nothing.

    `loader` has indices of `dataset`. Everything is repeatable: random numbers depend on
    a sample's index while it is read (with __getitems__, on the batch's first), and start
    anew for each batch (dropout); what is not trained (BatchNorm's statistics, frozen
    weights) gets its first values again.
    """
    gradients = []  # of each step, a vector
    trained = [p for p in model.parameters() if p.requires_grad]

    def not_trained():
        named = [*model.named_buffers(), *model.named_parameters()]
        return {name: value for name, value in named if not value.requires_grad}

    first = {name: value.clone() for name, value in not_trained().items()}

    def reset():
        with torch.no_grad():
            for name, value in not_trained().items():
                value.copy_(first.get(name, value))

    def read(indices):  # in place of collate
        if hasattr(dataset, "__getitems__"):
            seed_generators(indices[0] + seed)
            samples = dataset.__getitems__(indices)
        else:
            samples = [seed_generators(index) or dataset[index] for index in indices]
        seed_generators(seed)
        batch = collate(samples)
        model.train(training)
        reset()
        return batch

    class StandIn:  # for the optimizer and for the scaler of its gradients
        def scale(self, loss):
            return loss * factor

        def unscale_(self, _):
            for p in trained:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad.div_(factor)

        def step(self, _):
            if dist.get_rank() == 0:
                gradients.append(torch.cat([p.grad.flatten().cpu() for p in trained]))

        def update(self):
            pass

        def zero_grad(self):
            model.zero_grad()

    # DDP divides gradients, not the loss, by the number of ranks: so does normal training
    # here, to round alike.
    factor = 1 if hasattr(model, "no_sync") else dist.get_world_size()
    loader.collate_fn = read
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            with redirect_stdout(None):
                train_loop(model, loader, StandIn(), StandIn(), device, args)
        finally:
            reset()
            model.train()
            model.zero_grad()
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
    return gradients


def seed_generators(seed):
    """Seed what draws random numbers; return None."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def relative_difference(expected, found):
    """Return how far these lists of vectors are apart, relative to their lengths."""
    if len(expected) != len(found):
        return math.inf
    pairs = zip(expected, found)
    parts = [(a - b).norm() / a.norm().clamp(min=1e-30) for a, b in pairs]
    return torch.stack(parts).max().item()  # NaN, if one is


def mixes_samples(model, dataset, args, device):
    """Return whether the samples of a batch affect each other's gradients.

    If so, several batches are not the same as a large one. None: it cannot be told.
    """
    if dist.get_world_size() == 1 or len(dataset) == 1:
        return None
    kinds = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    if any(isinstance(m, kinds) and m.training for m in model.train().modules()):
        return True
    count = min(len(dataset), max(2, min(args.batch_size, 16)))
    indices = [number * len(dataset) // count for number in range(count)]
    args = copy.copy(args)
    args.precision, args.grad_accum_steps = "float32", 2

    def gradients(batch_size, seed=0):
        batch_sampler = BatchSampler(range(count), batch_size, drop_last=False)
        loader = DataLoader(indices, batch_sampler=batch_sampler)
        return take_gradients(model, loader, dataset, device, args, False, seed)

    try:
        whole = gradients(count)
        if relative_difference(whole, gradients(count, seed=1)) > 1e-3:
            return None  # there are random numbers in evaluation mode, too
        in_two_batches = gradients(count * 3 // 4)
        return relative_difference(whole, in_two_batches) > 1e-2
    except Exception:  # noqa: BLE001, not every model has a loss in evaluation mode
        return None


def print_epochs(epoch, epochs, normal, ddp):
    """Print a line with an epoch of both trainings, side by side."""
    if epoch == 0:
        print(f"{'':9}{'normal':>31}{'DDP':>31}")
        print(f"{'epoch':>9}" + "     loss  accuracy   samples/s" * 2 + " speedup")
    line = f"{f'{epoch + 1}/{epochs}':>9}"
    for result in (normal, ddp):
        rate = format_rate(result.samples, result.seconds)
        line += f"{result.loss:9.4f}{result.accuracy:10.1%}{rate:>12}"
    print(f"{line}{normal.seconds / ddp.seconds:8.2f}")


def measure_step(training, epochs):
    """Return where the ms of a DDP step went, on average; then, the model is useless.

    Times steps with one batch that is on the device already, in turns with and without
    averaging the gradients. What a step of the epochs took beyond that went into data:
    into reading, and waiting for the rank that reads longest. (The median epoch is taken,
    as the first can be slow.)
    """
    model, loader, _, _, device, args = training
    steps_per_epoch = math.ceil(len(loader) / args.grad_accum_steps)
    all_ms = [result.seconds * 1000 / steps_per_epoch for result in epochs]
    step_ms = statistics.median(all_ms)
    steps = [max(5, int(100 / step_ms))]
    dist.broadcast_object_list(steps, 0)  # rank 0's, for all
    batch = to_device(next(iter(loader)), device)
    size = min(args.batch_size, len(loader.batch_sampler.sampler))
    count = steps[0] * args.grad_accum_steps

    class Kept(list):  # in place of a loader
        batch_sampler = BatchSampler(range(count * size), size, drop_last=False)

    def milliseconds(context):
        with context(), redirect_stdout(None):
            result = train_loop(model, Kept([batch] * count), *training[2:])
        return result.seconds / steps[0] * 1000

    turns = [[milliseconds(c) for c in (nullcontext, model.no_sync)] for _ in range(4)]
    whole, compute = map(statistics.mean, zip(*turns))
    whole = min(whole, step_ms)  # or noise could make a part negative
    compute = min(compute, whole)
    parts = {"data": step_ms - whole, "compute": compute, "sync": whole - compute}
    scale = statistics.mean(all_ms) / step_ms
    return {name: ms * scale for name, ms in parts.items()}


def summarise(normal_epochs, ddp_epochs):
    """Return the figures of both trainings, from what train_loop returned."""
    figures = {}
    for way, epochs in (("normal", normal_epochs), ("ddp", ddp_epochs)):
        _, _, samples, seconds = map(sum, zip(*epochs))
        rate, last = samples / seconds, epochs[-1]
        figures[way] = {"seconds": seconds, "samples_per_second": rate}
        figures[way].update(loss=last.loss, accuracy=last.accuracy)
    speedup = figures["normal"]["seconds"] / figures["ddp"]["seconds"]
    figures.update(speedup=speedup, efficiency=speedup / dist.get_world_size())
    ratios = [a.seconds / b.seconds for a, b in zip(normal_epochs, ddp_epochs)]
    return dict(figures, speedup_range=[min(ratios), max(ratios)])


def print_report(run, args):
    """Print how long both trainings took, where a step's time goes, and the verdict."""
    print(f"Normal training time: {run['normal']['seconds']:.2f} seconds")
    print(f"DDP training time: {run['ddp']['seconds']:.2f} seconds")
    step, normal = sum(run["ddp_step_ms"].values()), run["normal_step_ms"]
    print(f"\nA step takes {normal:.2f} ms normally and {step:.2f} ms with DDP:")
    for part, ms in run["ddp_step_ms"].items():
        print(f"  {part:7} {ms:8.2f} ms  {'#' * round(50 * ms / step)}")
    print(f"(sync averages {run['gradient_bytes']:,} bytes of gradients)")
    print(textwrap.fill(verdict(run, args), 80, break_on_hyphens=False))


def verdict(run, args):
    """Return in words what the figures show, why, and what would help."""
    n, speedup, (low, high) = run["world_size"], run["speedup"], run["speedup_range"]
    how = "DDP makes no clear difference" if low < high else "One epoch cannot tell"
    if low < high and (low > 1 and speedup > 1.1 or high < 1 and speedup < 0.9):
        how = "DDP is faster" if speedup > 1 else "DDP is slower"
    text = f"{how}: {speedup:.2f} times the speed of normal training"
    if low < high:
        text += f" ({low:.2f} to {high:.2f} in single epochs)"
    if n == 1:
        return f"{text}. With one process, no speedup is possible."
    text += f", where {n} would be ideal."
    devices = torch.cuda.device_count() if torch.cuda.is_available() else args.cores
    if n > devices:
        return f"{text} {n} processes share {devices} devices: use no more than that."
    data, compute, sync = (run["ddp_step_ms"][k] for k in ("data", "compute", "sync"))
    alone, normal = data + compute, run["normal_step_ms"]
    if data > max(compute, sync):
        advice = f"try --num_workers {args.num_workers + 2}"
        return f"{text} Loading takes {data:.2f} of {alone + sync:.2f} ms: {advice}."
    if alone >= 4 * sync:
        return text
    factor = next((k for k in (2, 4, 8) if k * alone >= 4 * sync), None)
    if factor is None or normal / alone < 1.3:
        text += f" There is too little work to share ({alone:.2f} ms, for {sync:.2f} ms"
        return f"{text} of synchronising): use a larger batch or model."
    gain = factor * normal / (factor * alone + sync)
    text += f" {factor} times as much work per synchronisation would make it about"
    text += f" {gain:.1f}: --grad_accum_steps {factor * args.grad_accum_steps}, or, if"
    return f"{text} the memory allows, --batch_size {factor * args.batch_size}."


def print_table(runs):
    print("\nworld size  global batch  normal seconds  DDP seconds  speedup  of ideal")
    for run in runs:
        row = f"{run['world_size']:10} {run['global_batch_size']:13,}"
        row += f" {run['normal']['seconds']:15.2f} {run['ddp']['seconds']:12.2f}"
        print(f"{row} {run['speedup']:8.2f} {run['efficiency']:9.0%}")


def choose_device(local_rank):
    """Return this process's GPU, shared if there are too few, or else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # first of all, or each rank takes memory on GPU 0
    return device


def choose_precision(amp, device):
    """Return a type's name: float16 for --amp where a GPU would emulate bfloat16."""
    if not amp:
        return "float32"
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return "float16" if old else "bfloat16"


def make_optimizer(model, learning_rate):
    """Return Adam: from PyTorch 2.4 on, the fused one, which is faster."""
    fused = torch.__version__ >= "2.4" or None  # compares versions, not strings
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=fused)


def make_scaler(precision, device):
    """Return a scaler, so that small gradients survive float16; else it does nothing."""
    enabled = precision == "float16"
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)  # before PyTorch 2.3


def make_autocast(precision, device):
    """Return a context in which PyTorch computes in this precision where it is safe."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))


def make_loader(dataset, batch_sampler, args, device):
    """Return a DataLoader of the batches whose indices a BatchSampler gives."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,  # or each epoch starts them again
        pin_memory=device.type == "cuda",  # non_blocking copies need it
    )


def to_device(batch, device):
    """Return a batch, whatever it is made of, with its tensors on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if hasattr(batch, "to"):  # a tokenizer's batch, a PackedSequence, a graph
        return copy.copy(batch).to(device)  # a copy, as some move themselves
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [to_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def format_rate(samples, seconds):
    """Return samples per second, with at least three digits."""
    rate = samples / seconds
    return f"{rate:,.2f}" if rate < 100 else f"{rate:,.0f}"


def open_store(refuse):
    """Return the store where the ranks meet, at MASTER_ADDR and MASTER_PORT.

    Without MASTER_PORT, at any free port. On failure, calls `refuse(message)`.
    """
    address = os.environ.get("MASTER_ADDR") or "localhost"
    port = os.environ.get("MASTER_PORT") or "0"
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, int(port)), family=family)
    except (OSError, OverflowError, ValueError) as reason:
        refuse(f"cannot listen at MASTER_ADDR={address} MASTER_PORT={port}: {reason}")
    host, port = server.getsockname()[:2]
    options, listening = {"is_master": True, "wait_for_workers": False}, server.detach()
    try:
        # Given this socket, the store listens at this address only. (In PyTorch 2.6,
        # libuv, the default, cannot take one.)
        given = {"master_listen_fd": listening, "use_libuv": False}
        return dist.TCPStore(host, port, **options, **given)
    except TypeError:  # older than that option, as PyTorch 2.0
        os.close(listening)
        return dist.TCPStore(host, port, **options)


def make_parser():
    """Return a parser with the flags of both scripts, and a function that adds more."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    parser.description = __doc__

    def add(flag, kind, minimum, default, help):
        def number(text):
            if minimum <= kind(text) < float("inf"):  # false for NaN, too
                return kind(text)
            raise argparse.ArgumentTypeError(f"{text} is not a number from {minimum}")

        help = f"{help} (default: {default})"
        parser.add_argument(flag, type=number, default=default, metavar="N", help=help)

    add("--epochs", int, 1, 5, "passes over the dataset")
    add("--batch_size", int, 1, 64, "samples per process and batch")
    add("--grad_accum_steps", int, 1, 1, "batches per process and optimizer step")
    add("--learning_rate", float, 0, 0.01, "of Adam")
    add("--dataset_length", int, 1, 20000, "samples in the dataset")
    add("--input_size", int, 1, 100, "features per sample")
    add("--num_workers", int, 0, 0, "DataLoader workers per process")
    add("--seed", int, 0, 0, "of weights, data and shuffling")
    add("--timeout", float, 1, 600.0, "seconds that a rank waits for others")
    help = "compute in bfloat16 or, on GPUs without it, in float16"
    parser.add_argument("--amp", action="store_true", help=help)
    help = "default: nccl if each process has a GPU to itself, else gloo"
    parser.add_argument("--backend", choices=["nccl", "gloo"], help=help)
    return parser, add


def choose_backend(backend, local_world_size, refuse):
    """Return `backend` or, if None, NCCL if there is a GPU for each process here."""
    # device_count() alone may count GPUs that cannot be used.
    usable = torch.cuda.is_available() and dist.is_nccl_available()
    if backend == "nccl" and not usable:
        refuse("--backend nccl needs a CUDA GPU; use --backend gloo")
    enough = usable and local_world_size <= torch.cuda.device_count()
    return backend or ("nccl" if enough else "gloo")


def parse_args():
    """Return the arguments, a backend for each world size, and the store.

    Exits with code 2 if they are invalid.
    """
    parser, _ = make_parser()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count, add = gpus or 2, parser.add_argument
    help = "processes; several numbers are compared (default: one per GPU, or 2)"
    add("--world_size", type=int, nargs="+", default=[count], metavar="N", help=help)
    add("--json", metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    args.cores = len(affinity(0))  # on Linux, those that this process may use
    most = max(16, args.cores, count)
    if not all(1 <= n <= most for n in args.world_size):
        parser.error(f"--world_size must be from 1 to {most}")
    backends = [choose_backend(args.backend, n, parser.error) for n in args.world_size]
    if args.json:
        try:
            open(args.json, "a").close()
        except OSError as reason:
            parser.error(f"--json: {reason}")
    return args, backends, open_store(parser.error)


if __name__ == "__main__":
    main()
