r"""Train with DistributedDataParallel (DDP). torchrun starts this file in each process:

    torchrun --standalone --nproc_per_node=2 torchrun_ddp.py

Use one process per GPU or, without GPUs, two. On two machines with 8 GPUs each, run
this on the first, whose address is 10.0.0.1, and with --node_rank=1 on the second:

    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=10.0.0.1 \
        --master_port=29500 torchrun_ddp.py

To train your own model, replace MyDataset, MyModel and, in train_loop, the loss and the
accuracy. Comments "DDP 1" to "DDP 9" mark the steps that make ordinary training
distributed. A rank is one process, or its number.
"""

import argparse
import ctypes
import gc
import os
import platform
import sys
import time
from array import array
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.nn  # if imported later, it holds the group: see DDP 9
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
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


@record  # torchrun's report then contains the error of a rank that failed
def main():
    # DDP 1: launch. torchrun runs this in every process that it starts.
    if sys.platform == "linux":  # die with torchrun, instead of training on alone
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    sys.stdout.reconfigure(line_buffering=True)  # lines appear at once, in files too
    args = parse_args()
    # DDP 2: take a device, then join the others. (Local rank: rank on this machine.)
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    if os.environ["LOCAL_RANK"] == "0":
        count = "{LOCAL_WORLD_SIZE} of {WORLD_SIZE} processes".format(**os.environ)
        print(f"{platform.node()}: {count} on {device.type}, backend {args.backend}")
    join(args)
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
    dataset = MyDataset(args.dataset_length, args.input_size, args.seed)
    model = MyModel(args.input_size).to(device)
    optimizer = make_optimizer(model, args.learning_rate)
    first_epoch, done = load_snapshot(args, model, optimizer)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    # DDP 4: shard. Each rank reads its own part of the dataset.
    sampler = ResumableSampler(dataset, seed=args.seed)
    sampler.start = done // world_size  # where the epoch resumes
    loader = make_loader(dataset, sampler, args.batch_size, args.num_workers, device)

    def after_step(epoch, step, samples):
        if rank == 0 and args.save_every and step % args.save_every == 0:
            samples += sampler.start * world_size
            save_snapshot(args, model, optimizer, epoch, samples)

    begin = time.perf_counter()
    for epoch in range(first_epoch, args.epochs):
        sampler.set_epoch(epoch)  # DDP 5: reshuffle, or every epoch has the same order
        # DDP 6 and 7, synchronise and measure globally, are in train_loop.
        loss, accuracy, samples, seconds = train_loop(
            model, loader, optimizer, device, args, epoch, rank, world_size, after_step
        )
        sampler.start = 0  # later epochs are whole
        if rank == 0:  # DDP 8: rank 0 alone reports and saves
            print(
                f"epoch {epoch + 1}/{args.epochs}  loss {loss:.4f}"
                f"  accuracy {accuracy:.1%}  {samples / seconds:,.0f} samples/s"
            )
            if args.snapshot_path:
                save_snapshot(args, model, optimizer, epoch + 1, 0)
    if rank == 0:
        print(f"DDP training time: {time.perf_counter() - begin:.2f} seconds")


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


def join(args):
    """Join the process group; torchrun's variables give rank and address."""
    timeout = timedelta(seconds=args.timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun's store survives restarts, with addresses of dead ranks: use new keys.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    group = {"store": store, "rank": rank, "world_size": world_size, "timeout": timeout}
    dist.init_process_group(args.backend, **group)


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


class ResumableSampler(DistributedSampler):
    """A DistributedSampler that leaves out its rank's first `start` samples."""

    start = 0

    def __iter__(self):
        return iter(list(super().__iter__())[self.start :])

    def __len__(self):
        return super().__len__() - self.start


def save_snapshot(args, model, optimizer, epoch, samples):
    """Save the state after `epoch` epochs and `samples` more samples, of all ranks."""
    may_change = "epochs num_workers backend timeout snapshot_path save_every"
    settings = {k: v for k, v in vars(args).items() if k not in may_change.split()}
    snapshot = {"epoch": epoch, "samples": samples, "settings": settings}
    snapshot["model"] = model.module.state_dict()  # without DDP's "module." in the keys
    snapshot["optimizer"] = optimizer.state_dict()
    os.makedirs(os.path.dirname(os.path.abspath(args.snapshot_path)), exist_ok=True)
    # A crash at any moment leaves a whole file, the old one or the new one.
    with open(args.snapshot_path + ".tmp", "wb") as file:
        torch.save(snapshot, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(args.snapshot_path + ".tmp", args.snapshot_path)


def load_snapshot(args, model, optimizer):
    """Continue from rank 0's snapshot, if any; return its `epoch` and `samples`."""
    path, sent = args.snapshot_path, [None, 0, 0]  # optimizer state, epoch, samples
    if dist.get_rank() == 0 and path and os.path.exists(path):
        try:
            # weights_only: a snapshot is data and must not run code.
            snapshot = torch.load(path, map_location="cpu", weights_only=True)
            for name, value in snapshot["settings"].items():
                if value != vars(args).get(name):
                    raise ValueError(f"it was made with --{name} {value}")
            model.load_state_dict(snapshot["model"])  # DDP sends it to the other ranks
            sent = [snapshot[key] for key in ("optimizer", "epoch", "samples")]
            print(f"{path}: {sent[1]} epochs and {sent[2]} samples done, resuming")
        except Exception as error:  # noqa: BLE001, a damaged file can raise anything
            print(f"cannot resume from {path}: {error!r:.300}", file=sys.stderr)
            sent = [None, None, None]
    dist.broadcast_object_list(sent)
    state, epoch, samples = sent
    if epoch is None:
        dist.destroy_process_group()
        sys.exit(1)
    if state:
        optimizer.load_state_dict(state)
    return epoch, samples


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
    parser, add = make_parser()
    add("--save_every", 0, 0, "also save after every N optimizer steps of an epoch")
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
