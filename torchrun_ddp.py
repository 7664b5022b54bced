r"""Train with DistributedDataParallel (DDP). torchrun starts this file in each process:

    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py

"auto" is one process per GPU or, without GPUs, per core. On two machines with 8 GPUs
each, run this on both; 10.0.0.1 is one of them:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d \
        --rdzv_endpoint=10.0.0.1:29500 --rdzv_id=1 torchrun_ddp.py

To train your own model, write a Python file and add --definitions FILE. What it defines
of the ten definitions below, from MyDataset down to the function `wrap`, replaces the
one here. Or edit them here. No other line makes a dataset or a model, or knows what is
in a batch. ddp.py takes the same file, and shows what DDP does with your model.

Together, the processes are a process group. Each has a number, its rank; the world
size is how many there are. A collective is a call by which ranks exchange data, such as
an all-reduce, which adds up their tensors. All ranks must make it: a rank waits for the
others, up to --timeout. The backend that does it is NCCL between GPUs, otherwise Gloo.

Comments "DDP 1" to "DDP 9" mark what makes ordinary training distributed, numbered in
the order in which it happens: 1, 2 and 9 are in main; 3, 4, 5 and 8 in train; 6 in
accumulate_gradients; 7 in Metrics.
"""

import argparse
import copy
import ctypes
import gc
import importlib
import math
import os
import platform
import random
import re
import sys
import time
from collections import namedtuple
from contextlib import nullcontext
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
import torch.distributed.nn  # an optimizer imports it: later, it would hold the group
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
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


@record  # torchrun's report then contains the error of a rank that failed
def main():
    # DDP 1: launch. torchrun runs this in every process that it starts. If one of them
    # fails, torchrun ends the others.
    args = parse_args()
    if sys.platform == "linux":  # if torchrun is killed, the kernel kills this process
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    # Before Python 3.12, forking a DataLoader worker can hang while a thread of Gloo
    # frees a message: wait for that first.
    if sys.version_info < (3, 12):
        os.register_at_fork(before=lambda: time.sleep(0.05))
    sys.stdout.reconfigure(line_buffering=True)  # lines appear at once, in files too
    # DDP 2: own a device, then join the others. (Local rank: rank on this machine.)
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    if args.definitions:
        use_definitions(args.definitions)
    dist.init_process_group(args.backend, timeout=timedelta(seconds=args.timeout))
    dist.all_reduce(torch.zeros(1, device=device))  # NCCL connects here, or fails
    if os.environ["LOCAL_RANK"] == "0":
        here = f"{os.environ['LOCAL_WORLD_SIZE']} of {dist.get_world_size()} processes"
        how = f"{device.type}, backend {args.backend}, {args.precision}"
        print(f"{platform.node()}: {here} on {how}")
    train(args, device)
    leave_group()  # DDP 9: leave


Training = namedtuple("Training", "optimizer scheduler scaler")
EpochResult = namedtuple("EpochResult", "loss accuracy samples seconds")


def train(args, device):
    """Train with DDP, from the start or from the snapshot."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # DDP 3: same start. All ranks must make the same datasets: here, by the seed. DDP,
    # when it wraps the model (below), sends rank 0's weights to all ranks.
    seed_everything(args.seed)
    dataset, validation_set = make_datasets(args)
    model = make_model(args).to(device)
    check_data(dataset, args, device)
    # DDP 4: shard. Each rank trains on its own part of the dataset. All parts have
    # equally many batches, all full: a few samples are left out, not always the same.
    # A step takes world_size * batch_size * grad_accum_steps samples (an epoch's last
    # step can take fewer): the global batch. Choose the learning rate for it.
    sampler = DistributedSampler(dataset, seed=args.seed, drop_last=True)
    batch_sampler = BatchSampler(sampler, args.batch_size, drop_last=True)
    whole_loader = make_loader(dataset, batch_sampler, args, device)
    # Validation takes each sample once: DistributedSampler would repeat or drop some.
    shard = range(rank, len(validation_set), world_size)
    validation_batches = BatchSampler(shard, args.batch_size, drop_last=False)
    validation_loader = make_loader(validation_set, validation_batches, args, device)

    steps = args.epochs * math.ceil(len(whole_loader) / args.grad_accum_steps)
    optimizer = make_optimizer(model, args)
    scheduler = make_scheduler(optimizer, steps, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "float16")
    training = Training(optimizer, scheduler, scaler)
    epochs_done, samples_done = load_snapshot(args, model, training)
    # Batches that each rank skips. The ranks take samples in turn, from one order: so
    # this is right with another number of ranks, too.
    skip = samples_done // (args.batch_size * world_size)
    if skip == len(whole_loader):  # too few samples are left for so many ranks
        epochs_done, skip = epochs_done + 1, 0
    ddp_model = wrap(model)  # shares its weights with `model`

    def save_if_due(batches_done):  # with `epoch` and `skip` of the loop below
        if batches_done % (args.save_every * args.grad_accum_steps) == 0:
            samples = (skip + batches_done) * args.batch_size * world_size
            save_snapshot(args, model, training, epoch, samples)

    after_step = save_if_due if args.save_every else None
    seconds = 0
    for epoch in range(epochs_done, args.epochs):
        sampler.set_epoch(epoch)  # DDP 5: reshuffle, or every epoch has the same order
        # For dropout and augmentation: different on each rank, and in each epoch.
        seed_everything(args.seed + epoch * world_size + rank)
        loader = whole_loader
        if skip:  # go on where the snapshot was taken
            loader = make_loader(dataset, list(batch_sampler)[skip:], args, device)
        # DDP 6 and 7, synchronise and measure globally, are in what this calls.
        result = train_epoch(ddp_model, loader, training, args, device, after_step)
        seconds += result.seconds
        skip = 0
        if rank == 0:  # DDP 8: rank 0 alone prints results and saves
            line = f"epoch {epoch + 1}/{args.epochs}  loss {result.loss:.4f}"
            rate = f"{result.samples / result.seconds:,.2f} samples/s"
            print(f"{line}  accuracy {result.accuracy:.1%}  {rate}")
            if args.snapshot_path:
                save_snapshot(args, model, training, epoch + 1, 0)
        # All ranks validate, each on its shard. This has collectives, too.
        loss, accuracy = evaluate(ddp_model, validation_loader, args, device)
        if rank == 0:
            print(f"  validation  loss {loss:.4f}  accuracy {accuracy:.1%}")
        # All ranks have equal weights, unless something has trained without DDP.
        norms = [p.norm(1).item() for p in model.parameters() if p.requires_grad]
        check_same(norms, "the ranks' weights differ. README: Different weights")
    if rank == 0:
        print(f"DDP training time: {seconds:.2f} seconds")


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


def evaluate(ddp_model, loader, args, device):
    """Return the mean loss and the accuracy, 0 to 1, over the whole validation set."""
    model, metrics = ddp_model.module, Metrics(device)
    # All ranks take rank 0's buffers (BatchNorm's statistics), as snapshots do.
    for name, buffer in model.named_buffers():
        if ddp_model.broadcast_buffers and name not in ddp_model.parameters_to_ignore:
            contiguous = buffer.contiguous()  # broadcast needs it
            dist.broadcast(contiguous, 0)
            buffer.copy_(contiguous)
    # Not through DDP: that has collectives, and some ranks have more batches.
    model.eval()
    with torch.no_grad(), autocast(args, device):
        for batch in loader:
            count = as_number(count_items(batch))
            loss, correct = compute_loss(model, to_device(batch, device))
            metrics.add(loss, correct, count)
    return metrics.means()


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


def load_snapshot(args, model, training):
    """Load the snapshot, if there is one. Return the epochs and the samples done."""
    path, done, problem = args.snapshot_path, (0, 0), ""
    if path and dist.get_rank() == 0:  # if it cannot be written, fail now
        open(path + ".tmp", "wb").close()
        os.remove(path + ".tmp")
    if path and os.path.exists(path):
        try:
            # weights_only: a snapshot is data and must not run code.
            snapshot = torch.load(path, map_location="cpu", weights_only=True)
            settings, old = fixed_settings(args, training), snapshot["settings"]
            changed = [f"--{k} {v}" for k, v in old.items() if settings[k] != v]
            if changed:
                raise ValueError(f"it was made with {', '.join(changed)}")
            model.load_state_dict(snapshot["model"])
            for name, part in training._asdict().items():
                if part and snapshot[name]:  # a scaler's is empty without float16
                    part.load_state_dict(snapshot[name])
            done = snapshot["epoch"], snapshot["samples"]
        except Exception as error:  # noqa: BLE001, a damaged file can raise anything
            problem = f"cannot resume from {path}: {error!r:.900}"
    same = check_same((done, problem))
    if problem or not same:
        stop(problem or f"{path} is not the same on all machines: use a shared folder")
    if done != (0, 0) and dist.get_rank() == 0:
        print(f"{path}: {done[0]} epochs and {done[1]} samples done, resuming")
    return done


def fixed_settings(args, training):
    """Return the settings that must be the same when a training is resumed."""
    names = "batch_size grad_accum_steps learning_rate max_grad_norm dataset_length"
    settings = {key: getattr(args, key) for key in f"{names} input_size seed".split()}
    # A scheduler is made for so many epochs.
    return {**settings, "epochs": args.epochs if training.scheduler else None}


def save_snapshot(args, model, training, epoch, samples):
    """Save the state after `epoch` epochs and `samples` more samples, of all ranks."""
    if not all(p.isfinite().all() for p in model.parameters()):
        sys.exit("the weights are not finite any more: the last snapshot is kept")
    snapshot = {"epoch": epoch, "samples": samples}
    snapshot["settings"] = fixed_settings(args, training)
    snapshot["model"] = model.state_dict()  # without DDP, or keys begin with "module."
    for name, part in training._asdict().items():
        snapshot[name] = part.state_dict() if part else None
    # A crash at any moment leaves a whole file, the old one or the new one.
    with open(args.snapshot_path + ".tmp", "wb") as file:
        torch.save(snapshot, file)
        file.flush()
        os.fsync(file.fileno())
    torch.load(file.name, mmap=True, weights_only=True)  # fail now, not when resuming
    os.replace(file.name, args.snapshot_path)


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


def parse_args():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    help = "save to FILE after every epoch, and resume from it if it exists"
    parser.add_argument("--snapshot_path", metavar="FILE", help=help)
    help = "also save after N, 2N, ... steps of an epoch"
    parser.add_argument("--save_every", type=int, default=0, metavar="N", help=help)
    args, env = parse_flags(parser), os.environ
    if "LOCAL_RANK" not in env:
        parser.error("start it with torchrun, as --help shows")
    if args.save_every < 0 or (args.save_every and not args.snapshot_path):
        parser.error("--save_every needs --snapshot_path, and a number from 1")
    too_few = int(env["LOCAL_RANK"]) >= torch.cuda.device_count()
    if args.backend == "nccl" and too_few and "NCCL_MULTI_RANK_GPU_ENABLE" not in env:
        parser.error("fewer GPUs than processes: --backend gloo lets them share")
    # Restarted ranks would find addresses of dead ones in the store of torchrun.
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        needs = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and c10d or --standalone"
        parser.error(f"torchrun --max_restarts needs {needs}. README: Long runs")
    return args


if __name__ == "__main__":
    main()
