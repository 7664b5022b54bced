"""Compare normal training with DistributedDataParallel (DDP) training.

Does DDP compute the same gradients, is it faster, and if not, why not? Try it with one
process per GPU or, without GPUs, two that share the CPU; or compare several numbers:

    python ddp.py
    python ddp.py --world_size 1 2 --batch_size 128

This starts the processes itself. They take turns: in every epoch, one of them trains
normally, then all of them with DDP, on the same samples in every step. They meet at
MASTER_ADDR and MASTER_PORT, from the environment or a file .env.

To check your own model, replace MyDataset, MyModel and, in train_loop, the loss and the
accuracy. Comments "DDP 1" to "DDP 9" mark the steps that make ordinary training
distributed. A rank is one process, or its number.
"""

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import re
import signal
import socket
import statistics
import sys
import textwrap
import time
from array import array
from contextlib import nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # if imported later, it holds the group: see DDP 9
import torch.multiprocessing as mp
from dotenv import load_dotenv
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate


class MyDataset(Dataset):
    """Random inputs of shape (size,) and labels 0 or 1, made from a seed."""

    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices):
        """Return a batch, as a tuple. Optional: much faster for data in memory."""
        # From a list, torch.tensor(indices) would be slower than the rest of the read.
        rows = torch.frombuffer(array("q", indices), dtype=torch.int64)
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)


class MyModel(nn.Module):
    """One linear layer: inputs of shape (batch, input_size) to logits (batch, 2)."""

    def __init__(self, input_size):
        super().__init__()
        self.linear = nn.Linear(input_size, 2)

    def forward(self, inputs):
        return self.linear(inputs)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that "finally" runs
    load_dotenv()
    args, store = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PyTorch {torch.__version__} on {device} with {args.backend}", flush=True)
    runs = []
    try:
        for world_size in args.world_size:
            # DDP 1: launch one process per device. They inherit an ignored SIGINT, as
            # Ctrl-C reaches all processes: this one alone reacts, and ends the others.
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            name = f"run {len(runs)}"  # of its part of the store
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
    print_report(runs, args)
    if args.json:
        versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
        figures = {**vars(args), **versions, "device": device, "runs": runs}
        text = json.dumps(figures, indent=1)
        with open(args.json, "w") as file:
            file.write(re.sub("NaN|-?Infinity", "null", text))  # JSON has neither
    sys.exit(0 if all(run["right"] for run in runs) else 1)


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
    group = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    dist.init_process_group(args.backend, **group)
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
    normal_model = copy.deepcopy(model)
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    batch, threads = args.batch_size * world_size, torch.get_num_threads()
    if rank == 0:
        print(f"\nworld size {world_size}, global batch {batch}, CPU threads {threads}")
    figures = check_gradients(normal_model, ddp_model, dataset, args, device)

    # DDP 4: shard. Each rank reads its own part of the dataset; normal training, all.
    loaders = make_loaders(dataset, len(dataset), args.num_workers, args, device)
    normal = normal_model, loaders[0], make_optimizer(normal_model, args.learning_rate)
    ddp = ddp_model, loaders[1], make_optimizer(ddp_model, args.learning_rate)
    for loader in loaders[rank > 0 :]:  # rank 0 alone trains normally
        next(iter(loader))  # starts the workers, if any: now, not in a timed epoch
    normal_epochs, ddp_epochs = [], []  # what train_loop returned
    for epoch in range(args.epochs):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # DDP 5: reshuffle, or all have one order
        # DDP 6 and 7, synchronise and measure globally, are in train_loop.
        name = f"epoch {epoch + 1}/{args.epochs}"
        if rank == 0:  # DDP 8: rank 0 alone reports
            normal_epochs.append(train_loop(*normal, device, args, epoch))
            print_epoch(f"{name}  normal", *normal_epochs[-1])
            store.set(name, "done")
        store.wait([name], timedelta(days=20))  # until then; it takes no CPU
        ddp_epochs.append(train_loop(*ddp, device, args, epoch, rank, world_size))
        if rank == 0:
            print_epoch(f"{name}  DDP   ", *ddp_epochs[-1])

    weights = zip(normal_model.state_dict().values(), model.state_dict().values())
    differences = [(a.double() - b.double()).abs().max().item() for a, b in weights]
    steps = args.epochs * math.ceil(len(loaders[1]) / args.grad_accum_steps)
    step_seconds = sum(seconds for *_, seconds in ddp_epochs) / steps
    step_ms = measure_step(ddp_model, dataset, step_seconds, args, device)
    if rank == 0:
        figures.update(world_size=world_size, global_batch_size=batch)
        figures["normal"] = summarise("Normal", normal_epochs)
        figures["ddp"] = summarise("DDP", ddp_epochs)
        speedup = figures["normal"]["seconds"] / figures["ddp"]["seconds"]
        ratios = [one[3] / other[3] for one, other in zip(normal_epochs, ddp_epochs)]
        figures.update(speedup=speedup, speedup_range=[min(ratios), max(ratios)])
        figures.update(efficiency=speedup / world_size, ddp_step_ms=step_ms)
        figures["normal_step_ms"] = figures["normal"]["seconds"] / steps * 1000
        figures["max_weight_difference"] = max(differences)
        store.set("figures", json.dumps(figures))


def train_loop(
    model, loader, optimizer, device, args, epoch, rank=0, world_size=1, after_step=None
):
    """Train one epoch. Without DDP around `model`, this is ordinary training.

    After each optimizer step but the last, calls `after_step(epoch, steps, samples)`,
    those done so far. Returns the mean loss, the accuracy (0 to 1) and the number of
    samples, all of these over all ranks, and the seconds that it took.
    """
    autocast = nullcontext()
    if args.amp:
        autocast = torch.autocast(device.type, torch.bfloat16)
    no_sync = getattr(model, "no_sync", nullcontext)  # only DDP has it
    batches, samples = len(loader), len(loader.sampler)  # of this rank
    step_size = args.grad_accum_steps * loader.batch_size
    # Dropout differs by rank and epoch; a whole epoch that is repeated repeats it.
    torch.manual_seed(args.seed + epoch * world_size + rank)
    # Sums stay on the device: reading one, with .item(), waits for the GPU.
    loss_sum, correct = torch.zeros(2, dtype=torch.float64, device=device)
    seen = 0
    model.train()
    start = last_print = time.perf_counter()
    for batch, (inputs, labels) in enumerate(loader, start=1):
        inputs = inputs.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        # A step takes `grad_accum_steps` batches, the last step takes the rest.
        # Divide by the samples of the whole step: then each sample weighs the same.
        in_step = min(step_size, samples - seen // step_size * step_size)
        step_ends = batch % args.grad_accum_steps == 0 or batch == batches
        # DDP 6: synchronise. backward() averages the gradients over all ranks while it
        # computes them. In no_sync(), which must enclose the forward pass as well, it
        # averages nothing: once per step is enough.
        with nullcontext() if step_ends else no_sync():
            with autocast:
                outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs.float(), labels)
            (loss * (len(labels) / in_step)).backward()
        seen += len(labels)
        loss_sum.add_(loss.detach(), alpha=len(labels))
        correct += (outputs.argmax(dim=1) == labels).sum()
        if step_ends:
            optimizer.step()  # with the same gradients on all ranks
            optimizer.zero_grad()
            if after_step and batch < batches:
                after_step(epoch, batch // args.grad_accum_steps, seen * world_size)
        if rank == 0 and time.perf_counter() - last_print > 5:
            last_print = time.perf_counter()
            rate = seen * world_size / (last_print - start)
            mean = loss_sum.item() / seen
            print(f"  batch {batch}/{batches}  loss {mean:.4f}  {rate:,.0f} samples/s")
    # DDP 7: measure globally. The mean of rank 0's samples is not the mean of all.
    totals = torch.stack([loss_sum, correct, loss_sum.new_tensor(seen)])
    if world_size > 1:
        dist.all_reduce(totals)  # each rank now has the sum over all ranks
    loss_sum, correct, seen = totals.tolist()
    return loss_sum / seen, correct / seen, int(seen), time.perf_counter() - start


def print_epoch(name, loss, accuracy, samples, seconds):
    rate = f"{samples / seconds:,.0f} samples/s"
    print(f"{name}  loss {loss:.4f}  accuracy {accuracy:.1%}  {rate:>21}")


def summarise(name, epochs):
    """Print how long a training took; return its figures."""
    loss, accuracy, _, _ = epochs[-1]
    _, _, samples, seconds = map(sum, zip(*epochs))
    print(f"{name} training time: {seconds:.2f} seconds")
    figures = {"seconds": seconds, "samples_per_second": samples / seconds}
    return dict(figures, loss=loss, accuracy=accuracy)


def make_loaders(dataset, samples, num_workers, args, device):
    """Return two loaders of at most `samples`: for normal training, and this rank's.

    A batch of the first contains what all ranks have in theirs.
    """
    indices, world_size = range(min(samples, len(dataset))), dist.get_world_size()
    ours = DistributedSampler(indices, seed=args.seed)
    everything = DistributedSampler(indices, num_replicas=1, rank=0, seed=args.seed)
    # If parts would be unequal, the samplers of the ranks repeat samples. Do the same.
    everything.num_samples = everything.total_size = ours.total_size
    options, size = (num_workers, device), args.batch_size
    normal_loader = make_loader(dataset, everything, size * world_size, *options)
    return normal_loader, make_loader(dataset, ours, size, *options)


def check_gradients(normal_model, ddp_model, dataset, args, device):
    """Compare the gradients of both models, with their first weights; return figures.

    (After training, even right weights differ: training amplifies rounding.) Takes two
    whole optimizer steps, if there are as many, and the epoch's incomplete one; without
    BatchNorm and dropout, which differ by rank, then as in training. Warms up a GPU.
    """
    step = args.batch_size * args.grad_accum_steps * dist.get_world_size()
    samples = 2 * step + len(dataset) % step
    loaders = make_loaders(dataset, samples, 0, args, device)
    states = copy.deepcopy([normal_model.state_dict(), ddp_model.state_dict()])
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would round too much
    differences = []
    for training in (False, True):  # in this order: training changes BatchNorm
        # In evaluation mode, cuDNN has no backward pass for RNNs.
        with torch.backends.cudnn.flags(enabled=training, allow_tf32=False):
            normal = step_gradients(normal_model, loaders[0], training, args, device)
            ranks = dist.get_rank(), dist.get_world_size()
            ddp = step_gradients(ddp_model, loaders[1], training, args, device, *ranks)
        pairs = zip(normal, ddp)
        relative = [(a - b).norm() / a.norm().clamp(min=1e-30) for a, b in pairs]
        differences.append(torch.stack(relative).max().item())
    torch.set_float32_matmul_precision(precision)
    normal_model.load_state_dict(states[0])
    ddp_model.load_state_dict(states[1])

    limit = 0.2 if args.amp else 1e-4  # mistakes give much more
    without, difference = differences
    names = {type(module).__name__ for module in ddp_model.modules()}
    names = sorted(n for n in names if "BatchNorm" in n or "Dropout" in n)
    text = f"DDP is WRONG: gradients are not normal training's ({difference:.0e})."
    if not math.isfinite(difference):
        text = "The gradients are not finite: there is nothing to compare."
    elif difference < limit:
        text = f"DDP is right: its gradients are normal training's ({difference:.0e})."
    elif without < limit:
        text = (
            f"DDP is right: without {' and '.join(names) or 'dropout'}, its gradients"
            f" are normal training's ({without:.0e}). With it ({difference:.0e}), they"
            " differ as expected: each rank has its own statistics and random numbers."
        )
    if dist.get_rank() == 0:
        print(textwrap.fill(text, 80))
    figures = {"same_gradients": difference < limit, "gradient_difference": difference}
    figures["right"] = math.isfinite(difference) and (
        difference < limit or without < limit
    )
    weights = [p for p in ddp_model.parameters() if p.requires_grad]
    figures["gradient_bytes"] = sum(p.numel() * p.element_size() for p in weights)
    return figures


def step_gradients(model, loader, training, args, device, rank=0, world_size=1):
    """Return the gradients of each optimizer step in an epoch, each as one vector.

    `training` says in which mode the layers are. The learning rate is 0.
    """
    gradients = []

    def keep(*_):
        parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(parts).float().cpu())

    def set_mode(module, _):
        module.train(training)

    optimizer = make_optimizer(model, 0.0)
    optimizer.register_step_pre_hook(keep)
    hook = model.register_forward_pre_hook(set_mode)
    with redirect_stdout(None):
        train_loop(model, loader, optimizer, device, args, 0, rank, world_size)
    hook.remove()
    return gradients


def measure_step(model, dataset, seconds, args, device):
    """Return where the time of a DDP step goes, in ms; afterwards, `model` is useless.

    Times three loops, in turns: as in training; without averaging gradients; and also
    without loading, with one batch that stays on the device. `seconds`: of one step.
    """
    ranks = dist.get_rank(), dist.get_world_size()
    steps = [max(5, int(0.06 / seconds))]
    dist.broadcast_object_list(steps)  # rank 0's, for all
    samples = steps[0] * args.batch_size * args.grad_accum_steps * ranks[1]
    _, loader = make_loaders(dataset, samples, args.num_workers, args, device)
    batch = [tensor.to(device) for tensor in next(iter(loader))]

    class KeptBatch(list):  # in place of a loader
        sampler, batch_size = loader.sampler, loader.batch_size

    kept = KeptBatch([batch] * len(loader))
    optimizer = make_optimizer(model, args.learning_rate)

    def time_step(batches, context):
        with context(), redirect_stdout(None):
            result = train_loop(model, batches, optimizer, device, args, 0, *ranks)
        return result[3] * 1000 / math.ceil(len(loader) / args.grad_accum_steps)

    loops = (loader, nullcontext), (loader, model.no_sync), (kept, model.no_sync)
    number = 6 if steps[0] > 5 else 3
    rounds = [[time_step(*loop) for loop in loops] for _ in range(number)]
    whole, local, compute = (statistics.median(ms) for ms in zip(*rounds[1:]))
    local = min(local, whole)  # or noise could make a part negative
    compute = min(compute, local)
    return {"data": local - compute, "compute": compute, "sync": whole - local}


def print_report(runs, args):
    """Print a table with a line for each world size, then a section for each."""
    print("\n world  global   normal      DDP          in single  of ideal       same")
    print("  size   batch  seconds  seconds  speedup     epochs   speedup  gradients")
    for run in runs:
        low, high = run["speedup_range"]
        same = "yes" if run["same_gradients"] else "see above" if run["right"] else "NO"
        print(
            f"{run['world_size']:6} {run['global_batch_size']:7,}"
            f" {run['normal']['seconds']:8.2f} {run['ddp']['seconds']:8.2f}"
            f" {run['speedup']:8.2f} {f'{low:.2f}-{high:.2f}':>10}"
            f" {run['efficiency']:9.0%} {same:>10}"
        )
    for run in runs:
        step, normal = sum(run["ddp_step_ms"].values()), run["normal_step_ms"]
        print(f"\nworld size {run['world_size']}: a DDP step takes {step:.2f} ms")
        print(f"(a normal step, with the global batch, {normal:.2f} ms)")
        for part, ms in run["ddp_step_ms"].items():
            print(f"  {part:7} {ms:8.2f} ms  {'#' * round(50 * ms / step)}")
        print(textwrap.fill(verdict(run, args), 80, break_on_hyphens=False))


def verdict(run, args):
    """Return in words what the figures show, why, and which flag would help."""
    n, speedup, (low, high) = run["world_size"], run["speedup"], run["speedup_range"]
    how = "DDP makes no clear difference" if low < high else "One epoch cannot tell"
    if low < high and (low > 1 and speedup > 1.1 or high < 1 and speedup < 0.9):
        how = "DDP is faster" if speedup > 1 else "DDP is slower"
    text = f"{how}: {speedup:.2f} times the speed of normal training"
    if n == 1:
        return f"{text}. With one process, no speedup is possible."
    text += f", where {n} would be ideal."
    devices = torch.cuda.device_count() or args.cores
    if n > devices:
        return f"{text} {n} processes share {devices} devices: use no more than that."
    if run["efficiency"] > 0.9:
        return text
    data, compute, sync = (run["ddp_step_ms"][k] for k in ("data", "compute", "sync"))
    step = data + compute + sync
    ideal = step * run["efficiency"]
    if sync > data + compute - ideal:
        reason = f"Synchronising {run['gradient_bytes']:,} bytes of gradients takes"
        advice = f"--grad_accum_steps {2 * args.grad_accum_steps} does it half as often"
        return f"{text} {reason} {sync:.2f} of {step:.2f} ms: {advice}."
    if data > compute:
        advice = f"try --num_workers {args.num_workers + 2}"
        return f"{text} Loading takes {data:.2f} of {step:.2f} ms: {advice}."
    reason = f"Even without synchronising, a step takes {data + compute:.2f} ms, not"
    advice = f"try --batch_size {2 * args.batch_size}"
    return f"{text} {reason} {ideal:.2f} ms: {advice}."


def choose_device(local_rank):
    """Return this process's GPU, shared if there are too few, or else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # first of all, or each rank takes memory on GPU 0
    return device


def choose_backend(backend, local_world_size, error):
    """Return `backend` or, if None, NCCL if there is a GPU for each process here."""
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if backend == "nccl" and gpus == 0:
        error("--backend nccl needs a CUDA GPU; use --backend gloo")
    return backend or ("nccl" if local_world_size <= gpus else "gloo")


def make_optimizer(model, learning_rate):
    """Return Adam, from PyTorch 2.4 on the fused one, which is faster."""
    fused = torch.__version__ >= "2.4"  # compares versions, not strings
    return torch.optim.Adam(model.parameters(), lr=learning_rate, fused=fused)


def make_loader(dataset, sampler, batch_size, num_workers, device):
    """Return a DataLoader of the samples that `sampler` draws."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,  # or each epoch would start them again
        pin_memory=device.type == "cuda",  # non_blocking copies need it
    )


def collate(batch):
    """Return a batch: of a list of samples, or the tuple that __getitems__ returned."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def open_store(error):
    """Return the store where the ranks meet, at MASTER_ADDR and MASTER_PORT.

    Without MASTER_PORT, at any free port. On failure, calls `error(message)`.
    """
    address = os.environ.get("MASTER_ADDR") or "localhost"
    port = os.environ.get("MASTER_PORT") or "0"
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.create_server((address, int(port)), family=family)
    except (OSError, OverflowError, ValueError) as reason:
        error(f"cannot listen at MASTER_ADDR={address} MASTER_PORT={port}: {reason}")
    host, port = server.getsockname()[:2]
    options = {"is_master": True, "wait_for_workers": False}
    try:
        # Given this socket, the store listens at this address only. (In PyTorch 2.6,
        # libuv, the default, cannot take one.)
        socket_options = {"master_listen_fd": server.fileno(), "use_libuv": False}
        store = dist.TCPStore(host, port, **options, **socket_options)
        server.detach()
    except TypeError:  # older than that option, as PyTorch 2.0
        server.close()
        store = dist.TCPStore(host, port, **options)
    return store


def make_parser():
    """Return a parser with the flags of both scripts, and a function that adds more."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawTextHelpFormatter)
    parser.description = __doc__

    def add(flag, minimum, default, help):
        def number(text):
            if minimum <= type(minimum)(text) < float("inf"):  # false for NaN, too
                return type(minimum)(text)
            raise argparse.ArgumentTypeError(f"{text} is not a number from {minimum}")

        help = f"{help} (default: {default})"
        parser.add_argument(flag, type=number, default=default, metavar="N", help=help)

    add("--epochs", 1, 5, "passes over the dataset")
    add("--batch_size", 1, 64, "samples per process and batch")
    add("--grad_accum_steps", 1, 1, "batches per optimizer step")
    add("--learning_rate", 0.0, 0.01, "of Adam")
    add("--dataset_length", 1, 20000, "samples in the dataset")
    add("--input_size", 1, 100, "features per sample")
    add("--num_workers", 0, 0, "DataLoader workers per process")
    add("--seed", 0, 0, "of weights, data and shuffling")
    add("--timeout", 1.0, 600.0, "seconds that a rank waits for others")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")
    help = "default: nccl if each process has a GPU to itself, else gloo"
    parser.add_argument("--backend", choices=["nccl", "gloo"], help=help)
    return parser, add


def parse_args():
    """Return the arguments and the store. Exits with code 2 if they are invalid."""
    parser, _ = make_parser()
    count, add = torch.cuda.device_count() or 2, parser.add_argument
    help = "processes; several numbers are compared (default: one per GPU, or 2)"
    add("--world_size", type=int, nargs="+", default=[count], metavar="N", help=help)
    add("--json", metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    args.cores = len(affinity(0))  # on Linux, those that this process may use
    most = max(16, args.cores, count)
    if not all(1 <= n <= most for n in args.world_size):
        parser.error(f"--world_size must be from 1 to {most}")
    args.backend = choose_backend(args.backend, max(args.world_size), parser.error)
    if args.json:
        try:
            open(args.json, "a").close()
        except OSError as reason:
            parser.error(f"--json: {reason}")
    return args, open_store(parser.error)


if __name__ == "__main__":
    main()
