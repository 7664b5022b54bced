r"""Train with DistributedDataParallel (DDP). torchrun starts this file in each process:

    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py

"auto" is one process per GPU or, without GPUs, per core. On two machines with 8 GPUs
each, run this on the first (here 10.0.0.1), and with --node_rank=1 on the second:

    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 \
        --master_port=29500 torchrun_ddp.py

To train your own model, replace MyDataset, MyModel and compute_loss (and collate, where
samples cannot simply be stacked). Nothing else depends on what is in a batch.

A rank is a process's number, or the process; the world size is how many there are. A
collective is a call by which ranks exchange data: all ranks must make it, or the others
hang. Comments "DDP 1" to "DDP 9" mark what makes ordinary training distributed, in the
order in which it runs: the last, DDP 9, is at the end of main.
"""

import argparse
import copy
import ctypes
import gc
import os
import platform
import sys
import time
from array import array
from collections import namedtuple
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # imported later, it would keep the group alive: DDP 9
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
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


@record  # torchrun's report then contains the error of a rank that failed
def main():
    # DDP 1: launch. torchrun runs this in every process that it starts.
    if sys.platform == "linux":  # die with torchrun, instead of training on alone
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    sys.stdout.reconfigure(line_buffering=True)  # lines appear at once, in files too
    args = parse_args()
    # DDP 2: take a device, then join the others. (Local rank: rank on this machine.)
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    join(args, device)
    train(args, device)
    # DDP 9: leave, once the DDP model is freed: if anything still holds the group, Gloo
    # can abort at exit (https://github.com/pytorch/pytorch/issues/190489).
    gc.collect()
    dist.destroy_process_group()


def train(args, device):
    """Train with DDP, from the start or from the snapshot."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # DDP 3: same start. The seed gives all ranks the same data. DDP, when it wraps the
    # model, sends rank 0's weights to all ranks.
    torch.manual_seed(args.seed)
    length, size = args.dataset_length, args.input_size
    dataset = MyDataset(length, size, args.seed)
    validation_set = MyDataset(max(1, length // 10), size, args.seed, train=False)
    model = MyModel(size).to(device)
    optimizer = make_optimizer(model, args.learning_rate)
    scaler = make_scaler(args.precision, device)
    epochs_done, samples_done = load_snapshot(args, model, optimizer, scaler)
    ddp_model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # DDP 4: shard. Each rank reads its own part of the dataset. DistributedSampler makes
    # the parts equal: it repeats a few samples. Validation must count each just once.
    sampler = ResumableSampler(dataset, seed=args.seed)
    sampler.skip = samples_done // world_size
    batch_sampler = BatchSampler(sampler, args.batch_size, drop_last=False)
    loader = make_loader(dataset, batch_sampler, args, device)
    part = range(rank, len(validation_set), world_size)
    batch_sampler = BatchSampler(part, args.batch_size, drop_last=False)
    validation_loader = make_loader(validation_set, batch_sampler, args, device)

    def on_step(steps, samples):
        if rank == 0 and args.save_every and steps % args.save_every == 0:
            samples += sampler.skip * world_size
            save_snapshot(args, model, optimizer, scaler, sampler.epoch, samples)

    seconds = 0
    for epoch in range(epochs_done, args.epochs):
        sampler.set_epoch(epoch)  # DDP 5: reshuffle, or every epoch has the same order
        # For dropout and augmentation: different on each rank, and in each epoch.
        torch.manual_seed(args.seed + epoch * world_size + rank)
        # DDP 6 and 7, synchronise and measure globally, are in train_loop.
        result = train_loop(ddp_model, loader, optimizer, scaler, device, args, on_step)
        sampler.skip = 0  # later epochs are whole
        seconds += result.seconds
        if rank == 0:  # DDP 8: rank 0 alone reports and saves
            rate = format_rate(result.samples, result.seconds)
            print(
                f"epoch {epoch + 1}/{args.epochs}  loss {result.loss:.4f}"
                f"  accuracy {result.accuracy:.1%}  {rate} samples/s"
            )
            if args.snapshot_path:
                save_snapshot(args, model, optimizer, scaler, epoch + 1, 0)
        loss, accuracy = evaluate(model, validation_loader, device, args)
        if rank == 0:
            print(f"  validation  loss {loss:.4f}  accuracy {accuracy:.1%}")
    if rank == 0:
        print(f"DDP training time: {seconds:.2f} seconds")


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


def evaluate(model, loader, device, args):
    """Return the mean loss and the accuracy (0 to 1) over the samples of all ranks.

    Pass it the model without DDP, which synchronises buffers in each forward pass, and
    can hang where ranks have unequal numbers of batches.
    """
    for buffer in model.buffers():  # BatchNorm's: use rank 0's, which are what is saved
        dist.broadcast(buffer, 0)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right, samples
    model.eval()
    with torch.no_grad(), make_autocast(args.precision, device):
        for batch in loader:
            loss, count, right = compute_loss(model, to_device(batch, device))
            sums[0] += loss.double() * count
            sums[1] += right
            sums[2] += count
    dist.all_reduce(sums)
    loss_sum, right_sum, samples = sums.tolist()
    return loss_sum / samples, right_sum / samples


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


def join(args, device):
    """Join the process group; torchrun's variables give rank and address."""
    timeout = timedelta(seconds=args.timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store survives restarts, with addresses of dead ranks: use new keys.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    if rank == 0:  # it chooses for all ranks, as their GPUs may differ
        store.set("precision", choose_precision(args.amp, device))
    args.precision = store.get("precision").decode()
    if os.environ["LOCAL_RANK"] == "0":
        here = f"{os.environ['LOCAL_WORLD_SIZE']} of {world_size} processes"
        how = f"{device.type}, backend {args.backend}, {args.precision}"
        print(f"{platform.node()}: {here} on {how}")
    group = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    dist.init_process_group(args.backend, **group)


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


class ResumableSampler(DistributedSampler):
    """A DistributedSampler that leaves out its rank's first `skip` samples."""

    skip = 0

    def __iter__(self):
        return iter(list(super().__iter__())[self.skip :])

    def __len__(self):
        return super().__len__() - self.skip


def save_snapshot(args, model, optimizer, scaler, epoch, samples):
    """Save the state after `epoch` epochs and `samples` more samples, of all ranks."""
    may_change = "epochs num_workers backend precision timeout snapshot_path save_every"
    settings = {k: v for k, v in vars(args).items() if k not in may_change.split()}
    snapshot = {"epoch": epoch, "samples": samples, "settings": settings}
    snapshot["model"] = model.state_dict()  # without DDP, or keys begin with "module."
    snapshot["optimizer"] = optimizer.state_dict()
    snapshot["scaler"] = scaler.state_dict()
    os.makedirs(os.path.dirname(os.path.abspath(args.snapshot_path)), exist_ok=True)
    # A crash at any moment leaves a whole file, the old one or the new one.
    with open(args.snapshot_path + ".tmp", "wb") as file:
        torch.save(snapshot, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(args.snapshot_path + ".tmp", args.snapshot_path)


def load_snapshot(args, model, optimizer, scaler):
    """Continue from rank 0's snapshot, if any; return its `epoch` and `samples`.

    Ends all ranks, with exit code 1, if it cannot be loaded or does not fit.
    """
    path, rank = args.snapshot_path, dist.get_rank()
    snapshot = {"epoch": 0, "samples": 0, "scaler": {}}
    snapshot["optimizer"] = optimizer.state_dict()
    if rank == 0 and path and os.path.exists(path):
        try:
            # weights_only: a snapshot is data and must not run code.
            snapshot = torch.load(path, map_location="cpu", weights_only=True)
            for name, value in snapshot["settings"].items():
                if value != vars(args).get(name):
                    raise ValueError(f"it was made with --{name} {value}")
            model.load_state_dict(snapshot.pop("model"))  # DDP sends it to the others
            optimizer.load_state_dict(snapshot["optimizer"])
            where = "{epoch} epochs and {samples} samples done".format(**snapshot)
            print(f"{path}: {where}, resuming")
        except Exception as reason:  # noqa: BLE001, a damaged file can raise anything
            print(f"cannot resume from {path}: {reason!r:.300}", file=sys.stderr)
            snapshot = None

    def from_rank_0(value):
        message = [value]
        dist.broadcast_object_list(message, 0)
        return message[0]

    state = snapshot["optimizer"].pop("state") if snapshot else {}
    snapshot = from_rank_0(snapshot)
    if snapshot is None:
        gc.collect()  # as at DDP 9
        dist.destroy_process_group()
        sys.exit(1)
    # The optimizer's state follows, one parameter at a time: NCCL sends through GPU
    # memory, and resuming must not need more of it than training.
    state = {key: from_rank_0(state.get(key)) for key in from_rank_0(list(state))}
    if rank > 0:
        optimizer.load_state_dict({**snapshot["optimizer"], "state": state})
    if snapshot["scaler"]:  # empty, if the GPUs that saved it needed none
        scaler.load_state_dict(snapshot["scaler"])
    return snapshot["epoch"], snapshot["samples"]


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
    parser, add = make_parser()
    add("--save_every", int, 0, 0, "also save after N, 2N, ... steps of an epoch")
    help = "save to FILE after every epoch, and resume from it if it exists"
    parser.add_argument("--snapshot_path", metavar="FILE", help=help)
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun, as --help shows")
    if args.save_every and not args.snapshot_path:
        parser.error("--save_every needs --snapshot_path")
    local_world_size = int(os.environ["LOCAL_WORLD_SIZE"])
    args.backend = choose_backend(args.backend, local_world_size, parser.error)
    return args


if __name__ == "__main__":
    main()
