# /// script
# requires-python = ">=3.8"
# dependencies = ["torch>=2.0", "numpy", "python-dotenv"]
# ///
"""Compare normal training with DistributedDataParallel (DDP) training.

Is DDP right, is it faster, and if not, why not? This script starts its own processes:

    python ddp.py
    python ddp.py --world_size 4 --batch_size 128

It trains a model in one process, without DDP, and the same model with DDP in several:
from the same weights, with the same samples in every step. Then it compares the times
and the weights. MASTER_ADDR and MASTER_PORT, in the environment or in a file .env, say
where the processes meet.

To make it yours, replace MyModel and MyDataset. Comments "DDP 1" to "DDP 9" mark all
that makes this distributed training; torchrun_ddp.py has the same numbers.
"""

import os

PARENT = os.getppid()  # before the slow imports: it could die meanwhile, unnoticed

import argparse
import contextlib
import copy
import errno
import gc
import itertools
import json
import math
import platform
import re
import signal
import socket
import statistics
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from array import array
from contextlib import redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the group is joined: leave_group() says why
import torch.multiprocessing as mp
from dotenv import load_dotenv
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    SequentialSampler,
    default_collate,
)

# PyTorch 2.0 warns of itself when it loads a file.
warnings.filterwarnings("ignore", "TypedStorage is deprecated")


class MyDataset(Dataset):
    """Random inputs of shape (size,) and random labels, 0 or 1; the seed fixes them."""

    def __init__(self, length, size, seed=0):
        # DDP 3: the same data on every rank; unseeded, each would draw its own.
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices):
        """Return a batch, as a tuple, in one read. Optional, but far faster."""
        # Through an array, as torch.tensor(indices) takes several times as long.
        rows = torch.frombuffer(array("q", indices), dtype=torch.int64)
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)


class MyModel(nn.Module):
    """One linear layer: (batch, input_size) inputs become (batch, 2) logits."""

    def __init__(self, input_size):
        super().__init__()
        self.linear = nn.Linear(input_size, 2)

    def forward(self, inputs):
        return self.linear(inputs)


def collate(batch):
    """Make a batch of a list of samples; a tuple is one already (`__getitems__`)."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def make_loader(dataset, sampler, batch_size, num_workers, device):
    """Return a DataLoader for this process; `sampler` picks and shuffles samples."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # started once, not again in every epoch
        pin_memory=device.type == "cuda",  # lets the copy to the GPU be non-blocking
    )
    if num_workers > 0:
        next(iter(loader), None)  # this starts them: now, not when training is timed
    return loader


def make_optimizer(model, learning_rate):
    """Return Adam, fused (all parameters in one kernel) where PyTorch has it."""
    try:
        return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    except RuntimeError:  # on the CPU before PyTorch 2.4
        return torch.optim.Adam(model.parameters(), lr=learning_rate)


def clock(device):
    """Return the time in seconds, once `device` has done all it was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train_loop(model, loader, optimizer, device, args, first_epoch=0, save=None):
    """Train `model`, wrapped in DDP or not.

    Calls `save(epoch, step)`, if given, after each optimizer step and each epoch.
    Returns how many seconds it took, and the mean loss and the accuracy of the last
    epoch, over the samples of all ranks.
    """
    group_size = args.grad_accum_steps * loader.batch_size
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)  # without DDP: nothing
    joined = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    precision = contextlib.nullcontext()
    if args.amp:
        precision = torch.autocast(device.type, torch.bfloat16)
    loss_function = nn.CrossEntropyLoss()
    model.train()
    start = clock(device)
    for epoch in range(first_epoch, args.epochs):
        loader.sampler.set_epoch(epoch)  # DDP 5: or every epoch has the same order
        steps, samples = len(loader), len(loader.sampler)  # of this rank
        # Ranks draw different dropout masks; an epoch draws the same after a resume.
        torch.manual_seed(args.seed + epoch * world_size + rank)
        epoch_start = last_print = time.perf_counter()
        seen = 0
        # The sums of loss and of right answers stay on the device until the epoch ends:
        # to read one, with .item(), is to wait for the GPU.
        loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=device)

        for step, (inputs, labels) in enumerate(loader, start=1):
            inputs = inputs.to(device, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            # A group of batches makes an optimizer step; the epoch's last group is as
            # large as what is left. Each sample weighs the same, as in one large batch.
            in_group = min(group_size, samples - seen // group_size * group_size)
            share = len(labels) / in_group
            group_ends = step % args.grad_accum_steps == 0 or step == steps

            # DDP 6: backward() averages the gradients over the ranks while it computes
            # them; in no_sync(), which must enclose the forward pass too, it does not.
            with contextlib.nullcontext() if group_ends else no_sync():
                with precision:
                    outputs = model(inputs)
                loss = loss_function(outputs.float(), labels)
                # share is 1 without accumulation: to multiply costs 4% of a small step.
                (loss * share if share < 1 else loss).backward()
            if group_ends:
                optimizer.step()  # all ranks have equal gradients: models stay equal
                optimizer.zero_grad()
                if save and step < steps:
                    save(epoch, step)

            seen += len(labels)
            loss_sum.add_(loss.detach(), alpha=len(labels))
            correct += (outputs.argmax(dim=1) == labels).sum()
            if rank == 0 and time.perf_counter() - last_print > 5:
                last_print = time.perf_counter()
                rate = seen / (last_print - epoch_start)
                print(
                    f"  batch {step}/{steps}"
                    f"  loss on rank 0 {loss_sum.item() / seen:.4f}"
                    f"  {rate * world_size:,.0f} samples/s"
                    f"  {(samples - seen) / rate:.0f} s left",
                    flush=True,
                )

        # DDP 7: sum over the ranks, then divide; rank 0's mean is not the model's.
        totals = torch.stack([loss_sum, correct, loss_sum.new_tensor(seen)])
        if joined:
            dist.all_reduce(totals)
        loss_sum, correct, seen = totals.tolist()
        if rank == 0:  # DDP 8
            rate = seen / (time.perf_counter() - epoch_start)
            print(
                f"epoch {epoch + 1}/{args.epochs}  loss {loss_sum / seen:.4f}"
                f"  accuracy {correct / seen:.1%}  {rate:,.0f} samples/s",
                flush=True,
            )
        if save:
            save(epoch + 1, 0)
    return clock(device) - start, loss_sum / seen, correct / seen


def choose_backend(backend, local_world_size):
    """Return `backend` or, if that is None, NCCL if each local rank can own a GPU.

    Without that it is Gloo. Raises ValueError for an NCCL that cannot work here.
    """
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if backend is None:
        return "nccl" if local_world_size <= gpus else "gloo"
    if backend == "nccl" and gpus == 0:
        raise ValueError("nccl needs a CUDA GPU and Linux; use --backend gloo")
    # With this variable set, NCCL 2.30 and later lets ranks share a GPU.
    can_share = os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1"
    if backend == "nccl" and gpus < local_world_size and not can_share:
        raise ValueError(
            f"nccl needs a GPU for each of the {local_world_size} processes here, and"
            f" there are {gpus}; use --backend gloo, or fewer processes"
        )
    return backend


def own_device(local_rank):
    """Return this rank's device: a GPU, shared if there are too few, or the CPU."""
    if torch.cuda.device_count() == 0:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # DDP 2: before CUDA is used, or all start on GPU 0
    return device


def leave_group():
    """Leave the process group so that nothing of it is left when Python shuts down.

    If something keeps a Gloo group alive, its threads run on, and one process in ten
    aborts at its very end (https://github.com/pytorch/pytorch/issues/190489). So train
    in a function, whose DDP model is gone when it returns; reference cycles that hold
    it are collected here. The group also lives on in default arguments of functions in
    torch.distributed.nn if that is first imported, as DDP does by itself, when there is
    a group already. Hence its import at the top of this file.
    """
    gc.collect()
    dist.destroy_process_group()


def is_orphan():
    """Return whether the process that started this one is gone."""
    return os.getppid() != PARENT


def end_with_parent():
    """End this process when its parent dies: an orphaned rank would train on unseen."""

    def watch():
        while not is_orphan():
            time.sleep(0.5)
        os._exit(1)  # at once, even if the main thread waits in a collective

    threading.Thread(target=watch, daemon=True).start()


def fail(message):
    """Say on stderr, in one line, what is wrong with the command; exit with code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    else:
        time.sleep(6)  # torchrun ends all when one ends: let local rank 0 print first
    sys.exit(2)


def number(kind, low, high):
    """Return an argparse type: an int or a float (`kind`) from `low` to `high`."""

    def parse(text):
        name = "a whole number" if kind is int else "a number"
        try:
            if low <= kind(text) <= high:
                return kind(text)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {name} from {low} to {high}")

    return parse


def make_parser(description, example):
    """Return a parser with the flags that torchrun_ddp.py and ddp.py share."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"example: {example}",
    )
    parser.error = fail

    def add(group, flag, kind, low, high, default, help, unit="N"):
        help += " (default: %(default)s)"
        kind = number(kind, low, high)
        group.add_argument(flag, type=kind, default=default, metavar=unit, help=help)

    training = parser.add_argument_group("training")
    add(training, "--epochs", int, 1, 10**6, 5, "passes over the dataset")
    add(training, "--batch_size", int, 1, 10**6, 64, "samples per process and step")
    add(training, "--grad_accum_steps", int, 1, 10**6, 1, "batches per optimizer step")
    add(training, "--learning_rate", float, 1e-9, 100, 0.01, "of Adam", "X")
    training.add_argument("--amp", action="store_true", help="compute in bfloat16")
    data = parser.add_argument_group("data")
    add(data, "--dataset_length", int, 1, 10**9, 1000, "samples in the dataset")
    add(data, "--input_size", int, 1, 10**6, 100, "features per sample")
    add(data, "--seed", int, 0, 2**31, 0, "of weights, data and shuffling")
    add(data, "--num_workers", int, 0, 64, 0, "DataLoader workers per process")
    processes = parser.add_argument_group("processes")
    processes.add_argument(
        "--backend",
        choices=["nccl", "gloo"],
        help="default: nccl if each process can own a GPU, else gloo",
    )
    help = "longest wait for a lost or stuck rank"
    add(processes, "--timeout", float, 1, 10**6, 600, help, "SECONDS")
    return parser


def parse(parser):
    """Parse the command line. Exits with code 2, and one line, if it makes no sense."""

    # torchrun takes --master-port for --master_port, so take --batch-size as well.
    def with_underscores(flag):
        return "--" + flag[0][2:].replace("-", "_")

    words = [re.sub("^--[^=]+", with_underscores, word) for word in sys.argv[1:]]
    args = parser.parse_args(words)
    if args.dataset_length * args.input_size > 2**31:
        fail("--dataset_length times --input_size is over 2**31 numbers (8 GiB)")
    return args


class GlobalSampler(DistributedSampler):
    """The samples of all ranks, for one process: a batch is what they see in a step.

    DistributedSampler deals a shuffled list out to the ranks as one deals cards, so
    what all ranks see in a step stands together in that list. Where the list does not
    divide evenly, it fills it up from its start; so does this.
    """

    def __init__(self, dataset, world_size, seed):
        super().__init__(dataset, num_replicas=1, rank=0, seed=seed)
        self.length = math.ceil(len(dataset) / world_size) * world_size

    def __iter__(self):
        return itertools.islice(itertools.cycle(super().__iter__()), self.length)

    def __len__(self):
        return self.length


class TimedLoader:
    """A loader that adds up, in `seconds`, how long the program waits for batches."""

    def __init__(self, loader, device):
        self.loader, self.device, self.seconds = loader, device, 0
        self.sampler, self.batch_size = loader.sampler, loader.batch_size

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        start = clock(self.device)
        for batch in self.loader:
            self.seconds += clock(self.device) - start
            yield batch
            start = clock(self.device)


def measure_step(model, dataset, optimizer, device, args, seconds):
    """Return for how many ms a DDP step waits for data, computes and synchronises.

    Trains on for a few seconds, in turns with synchronisation and without, in
    no_sync(): the difference is what synchronisation costs. `seconds` is how long a
    step took in training. Returns None if even two of them would take too long.
    """
    seconds = torch.tensor(seconds, device=device)
    dist.broadcast(seconds, 0)  # the ranks are to agree on the number of steps
    turns = int(1 / seconds.item()) or 1  # of two steps each
    rounds, steps = min(turns, 5), turns // min(turns, 5)
    if seconds.item() > 3:
        return None
    size = args.batch_size * args.grad_accum_steps * dist.get_world_size()
    sampler = DistributedSampler(range(min(len(dataset), steps * size)))
    loader = make_loader(dataset, sampler, args.batch_size, args.num_workers, device)
    loader = TimedLoader(loader, device)
    epoch_steps = math.ceil(len(loader) / args.grad_accum_steps)
    args = argparse.Namespace(**dict(vars(args), epochs=math.ceil(steps / epoch_steps)))
    waits, times = [], {True: [], False: []}
    for synchronise in (True, False) * rounds:
        context = contextlib.nullcontext() if synchronise else model.no_sync()
        loader.seconds = 0
        with context, open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            spent, _, _ = train_loop(model, loader, optimizer, device, args)
        waits.append(loader.seconds / (args.epochs * epoch_steps) * 1000)
        times[synchronise].append(spent / (args.epochs * epoch_steps) * 1000)
    data, local = statistics.median(waits), statistics.median(times[False])
    sync = max(0, statistics.median(times[True]) - local)
    return {"data": data, "compute": max(0, local - data), "sync": sync}


def is_per_sample(model, dataset, batch_size, device):
    """Return whether the output for a sample depends on that sample alone.

    With BatchNorm or dropout it does not, and the ranks cannot train what one process
    does: each normalises its own batch and draws its own random numbers.
    """
    loader = make_loader(dataset, SequentialSampler(dataset), batch_size, 0, device)
    inputs = next(iter(loader))[0].to(device)
    middle = len(inputs) // 2
    if middle < 2:  # too few to tell: BatchNorm does not take one sample
        return True
    with torch.no_grad():
        whole = model(inputs)
        parts = torch.cat([model(inputs[:middle]), model(inputs[middle:])])
    whole, parts = whole.nan_to_num(), parts.nan_to_num()  # NaN is not NaN's equal
    return torch.allclose(whole, parts, rtol=1e-3, atol=1e-3 * whole.abs().max().item())


def train(rank, world_size, ddp, args, device):
    """Train as rank `rank` of `world_size` or, without `ddp`, as all of them in one."""
    torch.manual_seed(args.seed)  # DDP 3: the same weights on every rank
    dataset = MyDataset(args.dataset_length, args.input_size, args.seed)
    model = MyModel(args.input_size).to(device)
    if ddp:
        # DDP 3, 6: sends rank 0's weights to all, and makes backward() synchronise.
        trained, batch_size = DistributedDataParallel(model), args.batch_size
        sampler = DistributedSampler(dataset, seed=args.seed)  # DDP 4: each its part
    else:
        trained, batch_size = model, args.batch_size * world_size
        sampler = GlobalSampler(dataset, world_size, args.seed)
    optimizer = make_optimizer(model, args.learning_rate)
    loader = make_loader(dataset, sampler, batch_size, args.num_workers, device)
    seconds, loss, accuracy = train_loop(trained, loader, optimizer, device, args)

    samples = args.epochs * len(sampler) * (world_size if ddp else 1)
    steps = args.epochs * math.ceil(len(loader) / args.grad_accum_steps)
    result = {
        "seconds": seconds,
        "samples_per_second": samples / seconds,
        "loss": loss,
        "accuracy": accuracy,
        "steps": steps,
        "gradient_bytes": sum(
            p.numel() * p.element_size() for p in model.parameters() if p.requires_grad
        ),
        "weights": copy.deepcopy(model.state_dict()),  # what follows changes the model
    }
    if ddp:
        result["step_ms"] = measure_step(
            trained, dataset, optimizer, device, args, seconds / steps
        )
    else:
        result["is_per_sample"] = is_per_sample(model, dataset, batch_size, device)
    return result


def worker(rank, world_size, ddp, args, address, result_file):
    """Be one process: a rank of DDP training, or the only one of normal training."""
    end_with_parent()
    # Normal training has as many threads as a rank: the processes make the difference.
    threads = max(1, args.cores // world_size)
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    device = own_device(rank)
    if ddp:
        timeout = timedelta(seconds=args.timeout)
        # The store serves one run after the other, each of another world size.
        store = dist.TCPStore(*address, timeout=timeout)
        store = dist.PrefixStore(f"world size {world_size}", store)
        # DDP 2: join the others: which rank this is, of how many, and where they meet.
        dist.init_process_group(
            args.backend, store=store, rank=rank, world_size=world_size, timeout=timeout
        )
    result = train(rank, world_size, ddp, args, device)
    if rank == 0:  # DDP 8
        torch.save(result, result_file)
    if ddp:
        leave_group()  # DDP 9


def run(world_size, ddp, args, store, folder):
    """Train, in one process or with DDP in `world_size` of them; return the result.

    Raises ProcessRaisedException or ProcessExitedException if a process fails.
    """
    result_file = os.path.join(folder, "result.pt")
    arguments = (world_size, ddp, args, (store.host, store.port), result_file)
    # DDP 1: one process per device. A terminal sends Ctrl-C to all of them, so they are
    # born deaf to it, and this process ends them.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    processes = mp.spawn(worker, arguments, world_size if ddp else 1, join=False)
    signal.signal(signal.SIGINT, on_interrupt)
    while not processes.join():
        pass
    return torch.load(result_file, map_location="cpu", weights_only=True)


def largest_difference(weights, others):
    """Return the largest difference between two state dicts; NaN if one has a NaN."""
    differences = [(weights[k].double() - others[k].double()).abs() for k in weights]
    return torch.stack([difference.max() for difference in differences]).max().item()


def compare(world_size, args, store, folder):
    """Train both ways; return the figures, as in the JSON file, and a verdict."""
    batch = args.batch_size
    print(f"Normal training: 1 process, batch size {batch * world_size}", flush=True)
    normal = run(world_size, False, args, store, folder)
    print(f"Normal training time: {normal['seconds']:.2f} seconds\n")
    print(
        f"DDP training: {world_size} processes, batch size {batch} each",
        flush=True,
    )
    ddp = run(world_size, True, args, store, folder)
    print(f"DDP training time: {ddp['seconds']:.2f} seconds\n")

    # The weights differ by rounding, since DDP adds the gradients up in another order.
    # That hardly changes the first half of the digits of what training has changed.
    torch.manual_seed(args.seed)
    untrained = MyModel(args.input_size).state_dict()
    difference = largest_difference(normal["weights"], ddp["weights"])
    precision = torch.finfo(torch.bfloat16 if args.amp else torch.float32).eps
    moved = largest_difference(normal["weights"], untrained)
    speedup = normal["seconds"] / ddp["seconds"]
    figures = ("seconds", "samples_per_second", "loss", "accuracy")
    comparison = {
        "world_size": world_size,
        "global_batch_size": batch * world_size,
        "normal": {name: normal[name] for name in figures},
        "ddp": {name: ddp[name] for name in figures},
        "speedup": speedup,
        "efficiency": speedup / world_size,
        "max_weight_difference": difference,
        "same_model": difference <= precision**0.5 * moved,
        "ddp_step_ms": ddp["step_ms"],
    }
    return comparison, normal["is_per_sample"], verdict(comparison, normal, ddp, args)


def verdict(comparison, normal, ddp, args):
    """Say in a sentence or two what the figures show, and which flags would help."""
    if not comparison["same_model"] and normal["is_per_sample"]:
        return "The two models differ by more than rounding: DDP training is not right."
    n, step = comparison["world_size"], comparison["ddp_step_ms"]
    speedup, efficiency = comparison["speedup"], comparison["efficiency"]
    how = "faster" if speedup > 1.05 else "slower" if speedup < 0.95 else "no faster"
    text = (
        f"DDP in {n} process{'es' if n > 1 else ''} is {how}: {speedup:.2f} times the"
        f" speed of normal training, where {n} would be ideal."
    )
    if n == 1:
        text = text.split(",")[0] + ", and has nobody to share the work with."
    if not comparison["same_model"]:
        text += " The models differ, as they have to with BatchNorm or dropout."
    gpus = torch.cuda.device_count()
    if n > (gpus or args.cores):
        what = f"{gpus} GPU(s)" if gpus else f"{args.cores} core(s)"
        return (
            f"{text} They share {what} and take turns; try as many processes as that."
        )
    if efficiency > 0.9 or n == 1 or step is None:
        return text

    # Ideally a step takes 1/n of normal training's. Where does most of the rest go?
    ideal = normal["seconds"] / normal["steps"] * 1000 / n
    alone = step["data"] + step["compute"]
    if step["sync"] > alone - ideal:
        text += (
            f" Synchronising {ddp['gradient_bytes']:,} bytes of gradients costs"
            f" {step['sync']:.2f} ms of a step's {alone + step['sync']:.2f} ms"
        )
        advice = "; --grad_accum_steps {} does it less often.", args.grad_accum_steps
    else:
        text += (
            f" Without synchronising, a step takes {alone:.2f} ms, and 1/{n} of one of"
            f" normal training is {ideal:.2f} ms"
        )
        advice = "; --batch_size {} gives each process more to do.", args.batch_size
    # Larger steps are fewer steps: advise no more of it than leaves four in an epoch.
    factor = min(8, normal["steps"] // args.epochs // 4)
    return text + (advice[0].format(factor * advice[1]) if factor > 1 else ".")


def print_table(comparisons):
    """Print a line for each world size; 80 columns hold it."""
    print(
        "           global     seconds         samples/s                  same  weights"
    )
    print(
        "processes   batch  normal     DDP   normal     DDP   speed effic. model  differ"
    )
    for c in comparisons:
        normal, ddp = c["normal"], c["ddp"]
        print(
            f"{c['world_size']:9} {c['global_batch_size']:7,}"
            f" {normal['seconds']:7.2f} {ddp['seconds']:7.2f}"
            f" {normal['samples_per_second']:8,.0f} {ddp['samples_per_second']:8,.0f}"
            f" {c['speedup']:5.2f}x {c['efficiency']:5.0%}"
            f" {'yes' if c['same_model'] else 'NO':>5} {c['max_weight_difference']:.1e}"
        )


def print_step(comparison):
    """Print where the time of a DDP step goes, as figures and as a bar."""
    step = comparison["ddp_step_ms"]
    if step is None:
        print("A step takes too long to measure its parts in a few seconds.")
        return
    total = sum(step.values())
    print(f"A step of DDP, world size {comparison['world_size']}: {total:.2f} ms")
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    for part, milliseconds in step.items():
        share = milliseconds / total
        bar = ("\N{FULL BLOCK}" if unicode else "#") * round(50 * share)
        print(f"  {part:7} {milliseconds:8.2f} ms {share:4.0%} {bar}")


def parse_args():
    parser = make_parser(
        "Compare normal training with DistributedDataParallel (DDP) training.",
        "python ddp.py --world_size 2 --batch_size 128",
    )
    comparison = parser.add_argument_group("comparison")
    comparison.add_argument(
        "--world_size",
        type=number(int, 1, max(16, os.cpu_count())),
        nargs="+",
        default=[torch.cuda.device_count() or 2],
        metavar="N",
        help="processes of DDP training; several values are compared in one table"
        " (default: one for each GPU, or 2 without GPUs)",
    )
    comparison.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    args = parse(parser)
    if "LOCAL_RANK" in os.environ:
        fail("it starts its own processes, so run it as: python ddp.py")
    try:
        args.backend = choose_backend(args.backend, max(args.world_size))
    except ValueError as error:
        fail(f"argument --backend: {error}")
    on_linux = hasattr(os, "sched_getaffinity")  # it knows what a container may use
    args.cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count()
    args.world_size = list(dict.fromkeys(args.world_size))
    if args.json:
        try:
            write_json(args.json, None)
        except OSError as error:
            fail(f"argument --json: cannot write {args.json}: {error.strerror}")
    return args


def write_json(path, figures):
    """Write `figures` to a file, whole or not at all; with None, only try to.

    Raises OSError if it cannot be written there.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "Not a regular file")
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w") as file:
            json.dump(figures, file, indent=1)
            file.write("\n")
        if figures is not None:
            os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def open_store():
    """Return the store where the processes meet, at MASTER_ADDR and MASTER_PORT.

    It is opened here, before any process is started, so the port is known to be ours;
    without MASTER_PORT it is any free port. Exits with code 2 if it cannot be had.
    """
    address = os.environ.get("MASTER_ADDR") or "localhost"
    port = os.environ.get("MASTER_PORT") or None
    if port and not (port.isdecimal() and 1 <= int(port) <= 65535):
        fail(
            f"MASTER_PORT={port} is not a number from 1 to 65535; unset: any free port"
        )
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, int(port or 0)), family=family)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", None) in (errno.EADDRINUSE, errno.EACCES):
            reason = os.strerror(error.errno)
            fail(f"MASTER_PORT={port} cannot be used: {reason}; unset: any free port")
        fail(f"MASTER_ADDR={address} is not an address of this machine; try localhost")
    host, free_port = server.getsockname()[:2]
    options = {"is_master": True, "wait_for_workers": False}
    try:
        # Our own socket: TCPStore's listens on every interface, whatever the address.
        fd = server.fileno()
        # (Not with libuv, which in some versions of PyTorch cannot do that.)
        store = dist.TCPStore(
            host, free_port, master_listen_fd=fd, use_libuv=False, **options
        )
        server.detach()  # it is the store's now
    except TypeError:  # older versions, PyTorch 2.0 for one
        server.close()
        store = dist.TCPStore(host, int(port or 0), **options)
    return store


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # cleaning up on the way
    load_dotenv()
    args = parse_args()
    store = open_store()
    device = "cuda" if torch.cuda.device_count() else "cpu"
    print(f"PyTorch {torch.__version__} on {device}, backend {args.backend}\n")
    try:
        with tempfile.TemporaryDirectory() as folder:
            compared = [compare(n, args, store, folder) for n in args.world_size]
    except KeyboardInterrupt:
        sys.exit(130)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        sys.exit(f"Training failed: {error}")
    finally:
        for process in mp.active_children():
            process.kill()

    comparisons = [comparison for comparison, _, _ in compared]
    print_table(comparisons)
    print("Equal for both: first weights, samples of each step, threads per process.")
    for comparison, _, text in compared:
        print()
        print_step(comparison)
        print(textwrap.fill(text, 80, break_on_hyphens=False))
    if args.json:
        settings = ("backend", "dataset_length", "input_size", "batch_size", "epochs")
        figures = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device,
            **{name: getattr(args, name) for name in settings},
            "runs": comparisons,
        }
        # JSON has no NaN, which a training that fails to converge can print.
        figures = json.loads(json.dumps(figures), parse_constant=lambda _: None)
        write_json(args.json, figures)
    if not all(c["same_model"] or not per_sample for c, per_sample, _ in compared):
        sys.exit("Normal and DDP training ended with different models.")


if __name__ == "__main__":
    main()
