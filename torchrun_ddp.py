# /// script
# requires-python = ">=3.8"
# dependencies = ["torch>=2.0", "numpy"]
# ///
"""Train a model with DistributedDataParallel (DDP), launched by torchrun.

torchrun starts this file as many times as you ask it to, one process for each GPU or,
without GPUs, a few that share the CPU:

    torchrun --standalone --nproc_per_node=2 torchrun_ddp.py

On two machines with 8 GPUs each, run this on the first, whose address is 10.0.0.1, and
with --node_rank=1 on the other:

    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 \\
        --master_port=29500 torchrun_ddp.py

To make it yours, replace MyModel and MyDataset. Comments "DDP 1" to "DDP 9" mark all
that makes this distributed training; ddp.py has the same numbers.
"""

import os

PARENT = os.getppid()  # before the slow imports: it could die meanwhile, unnoticed

import argparse
import contextlib
import gc
import io
import itertools
import re
import signal
import sys
import threading
import time
import uuid
import warnings
from array import array
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # before the group is joined: leave_group() says why
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate


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


def join_group(args):
    """Join the other ranks; torchrun's environment variables say who and where.

    `dist.init_process_group(args.backend)` would do, but for restarts: torchrun's store
    outlives them, and with it the addresses of ranks that are gone, which new ranks
    would call (https://github.com/pytorch/pytorch/issues/167288). So rank 0 makes up a
    name for a part of the store that only this attempt uses. Each other rank says hello
    with a random token, and waits for the answer to that token, which is the name. Rank
    0 may find an old hello first, so it answers until all have arrived.

    Raises RuntimeError if they do not within `--timeout`.
    """
    timeout = timedelta(seconds=args.timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    name, deadline = uuid.uuid4().hex, time.monotonic() + args.timeout
    if rank > 0:
        token = name
        store.set(f"hello {rank}", token)
        name = store.get(f"answer {token}").decode()  # get() waits until it is there
        store.add(f"arrived {name}", 1)
    while rank == 0 and store.add(f"arrived {name}", 0) < world_size - 1:
        for other in range(1, world_size):
            store.set(f"answer {store.get(f'hello {other}').decode()}", name)
        if time.monotonic() > deadline:
            raise RuntimeError(f"timed out after {args.timeout:g} s waiting for ranks")
        time.sleep(0.05)
    # DDP 2: join the others
    dist.init_process_group(
        args.backend,
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


class ResumingSampler(DistributedSampler):
    """A DistributedSampler that leaves out what an interrupted epoch has trained."""

    def __init__(self, dataset, seed, epoch, trained):
        super().__init__(dataset, seed=seed)
        # `trained` counts the samples of all ranks. If it does not divide evenly by
        # their number, which may be another now, the remainder is drawn again.
        self.interrupted_epoch, self.trained = epoch, trained // self.num_replicas

    def skipped(self):
        """Return how many of this rank's samples the current epoch leaves out."""
        return self.trained if self.epoch == self.interrupted_epoch else 0

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.skipped(), None)

    def __len__(self):
        return super().__len__() - self.skipped()


def load_snapshot(args):
    """Return the snapshot to resume from, or None if there is none yet.

    Exits with code 2 if it does not fit this run, or none can be saved in its place.
    """
    path = args.snapshot_path
    temporary = temporary_path(path)
    try:
        open(temporary, "wb").close()
        os.remove(temporary)
    except OSError as error:
        fail(f"argument --snapshot_path: cannot write {temporary}: {error.strerror}")
    if not os.path.lexists(path):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a broken file: it is refused below
            # weights_only: a snapshot is data, and has no business to run code.
            snapshot = torch.load(path, map_location="cpu", weights_only=True)
        settings = snapshot["settings"]
        for name, value in fixed_settings(args).items():
            if settings[name] != value:
                raise ValueError(f"it was made with --{name} {settings[name]}")
        MyModel(args.input_size).load_state_dict(snapshot["model"])
    except Exception as error:  # noqa: BLE001, a broken file can raise anything
        sentence = str(error).split("\n")[0].split(". ")[0]
        reason = f"{type(error).__name__}: {sentence}"
        fail(f"argument --snapshot_path: cannot resume from {path}: {reason}")
    return snapshot


def fixed_settings(args):
    """Return the flags that have to stay the same from start to end of a training."""
    names = ["input_size", "dataset_length", "batch_size", "grad_accum_steps"]
    names += ["learning_rate", "seed", "amp"]
    return {name: getattr(args, name) for name in names}


def temporary_path(path):
    """Return where a snapshot is written, in the folder it will be renamed in."""
    return os.path.realpath(path) + ".tmp"


def write_snapshot(path, data):
    """Write a file so that, whatever happens, the old or the new one is there."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not is_orphan():  # if torchrun is gone, its next launch may use the file
            os.replace(temporary, os.path.realpath(path))
    except OSError as error:
        raise OSError(error.errno, f"cannot save {path}: {error.strerror}") from error


def make_save(args, model, optimizer, sampler):
    """Return rank 0's `save(epoch, step)`: it saves if a snapshot is due there.

    One is due after each epoch (step 0) and, inside epochs, after every `save_every`
    batches. It is written in the background, or all ranks would have to wait for a slow
    disk. One that falls due while another is being written is skipped, but for the last.
    """
    writer, writing = ThreadPoolExecutor(max_workers=1), None

    def save(epoch, step):
        nonlocal writing
        # This is called once in `grad_accum_steps` batches; one is due the first time
        # after each multiple of `save_every`.
        in_epoch = args.save_every and step % args.save_every < args.grad_accum_steps
        last = epoch == args.epochs
        if not (step == 0 or in_epoch) or (writing and not writing.done() and not last):
            return
        if writing:
            writing.result()  # raises what went wrong with it
        seen = (sampler.skipped() + step * args.batch_size) if step else 0  # per rank
        snapshot = {
            "model": model.module.state_dict(),  # of the module: no "module." in keys
            "optimizer": optimizer.state_dict(),
            "epoch": epoch,
            "step": seen // args.batch_size,  # batches of a rank in this epoch
            "trained": seen * dist.get_world_size(),  # samples of all ranks in it
            "settings": fixed_settings(args),
        }
        buffer = io.BytesIO()
        torch.save(snapshot, buffer)
        writing = writer.submit(write_snapshot, args.snapshot_path, buffer.getvalue())
        if last:
            writing.result()

    return save


def parse_args():
    parser = make_parser(
        "Train with DistributedDataParallel (DDP). To be launched by torchrun.",
        "torchrun --standalone --nproc_per_node=2 torchrun_ddp.py --epochs 10",
    )
    snapshots = parser.add_argument_group("snapshots")
    snapshots.add_argument(
        "--snapshot_path",
        metavar="FILE",
        help="resume from FILE if it exists, and save to it after every epoch",
    )
    snapshots.add_argument(
        "--save_every",
        type=number(int, 0, 10**9),
        default=0,
        metavar="N",
        help="also save after every N batches of an epoch (default: %(default)s)",
    )
    args = parse(parser)
    if "LOCAL_RANK" not in os.environ:
        fail("run it as: torchrun --standalone --nproc_per_node=2 torchrun_ddp.py")
    try:
        args.backend = choose_backend(args.backend, int(os.environ["LOCAL_WORLD_SIZE"]))
    except ValueError as error:
        fail(f"argument --backend: {error}")
    if args.save_every and not args.snapshot_path:
        fail("argument --save_every: it needs --snapshot_path as well")
    return args


def train(args, device, snapshot):
    """Train, from the start or from rank 0's snapshot."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(
            f"DDP training: {world_size} processes on {device.type} ({args.backend}),"
            f" global batch size {args.batch_size * world_size}",
            flush=True,
        )
    # Rank 0 hands its snapshot to the others: all start at the same place, and hosts
    # need no file system in common.
    handed = [snapshot]
    dist.broadcast_object_list(handed)
    snapshot = handed[0] or {"epoch": 0, "step": 0, "trained": 0}
    finished = snapshot["epoch"] >= args.epochs
    if rank == 0 and handed[0]:
        print(
            f"{args.snapshot_path}: {snapshot['epoch']} epochs, {snapshot['step']} batches"
            f" done; {'nothing is left to train' if finished else 'resuming'}",
            flush=True,
        )
    if finished:
        return

    torch.manual_seed(args.seed)  # DDP 3: the same weights on every rank
    dataset = MyDataset(args.dataset_length, args.input_size, args.seed)
    model = MyModel(args.input_size).to(device)
    optimizer = make_optimizer(model, args.learning_rate)
    if handed[0]:
        model.load_state_dict(snapshot["model"])
        optimizer.load_state_dict(snapshot["optimizer"])
    # DDP 3, 6: sends rank 0's weights to all, and makes backward() synchronise.
    model = DistributedDataParallel(model)
    # DDP 4: each rank its part
    sampler = ResumingSampler(
        dataset, args.seed, snapshot["epoch"], snapshot["trained"]
    )
    loader = make_loader(dataset, sampler, args.batch_size, args.num_workers, device)
    save = None
    if rank == 0 and args.snapshot_path:  # DDP 8
        save = make_save(args, model, optimizer, sampler)
    seconds, _, _ = train_loop(
        model, loader, optimizer, device, args, snapshot["epoch"], save
    )
    if rank == 0:
        print(f"DDP training time: {seconds:.2f} seconds", flush=True)


@record  # puts the traceback of a rank that fails into torchrun's report
def main():  # DDP 1: torchrun runs this in every process it starts
    args = parse_args()
    end_with_parent()
    snapshot = None
    if args.snapshot_path and os.environ["RANK"] == "0":
        snapshot = load_snapshot(args)
    device = own_device(int(os.environ["LOCAL_RANK"]))
    try:
        join_group(args)
        train(args, device, snapshot)
    except RuntimeError as error:
        if not re.search("timed out|timeout|connection", str(error), re.IGNORECASE):
            raise
        raise RuntimeError(
            f"rank {os.environ['RANK']} lost another rank: it died, or the network did, or"
            f" it was stuck for over {args.timeout:g} seconds (--timeout)"
        ) from error
    leave_group()  # DDP 9


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        # After the terminal's, torchrun sends one of its own, which would interrupt this.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(130)
    except Exception:
        # Once is enough: torchrun reports the traceback when it will not try again.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "not torchrun")
        if restarts != os.environ.get("TORCHELASTIC_MAX_RESTARTS"):
            raise
        sys.exit(1)
