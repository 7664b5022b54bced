"""Train a model with DistributedDataParallel (DDP), on one machine or on several.

torchrun starts this script several times: with "auto", once per GPU (or per core, if
there is no GPU). The README has the command for several machines.

    torchrun --standalone --nproc_per_node=auto torchrun_ddp.py

Part 1 defines the data and the model: edit it, or write your versions to a file that
you pass with --definitions. Part 2 trains. Comments mark the main things that a script
for one GPU does not need: DDP 1 launch, 2 join, 3 same data, 4 shard, 5 wrap, 6 rank 0
prints and saves, 7 reshuffle, 8 measure, 9 leave. Part 3 saves and resumes. Part 4 has
flags, helpers, and guards against rare failures. DDP works without the guards.

The world size is the number of processes. Each has a rank, from 0 to world size - 1,
and a local rank, its number on its own machine. A collective, such as all_reduce, is an
exchange between all ranks. All have to make the same calls: if one does not, the others
wait, and fail after --timeout seconds.
"""

import argparse
import ctypes
import dataclasses
import gc
import importlib
import io
import math
import os
import random
import sys
import time
import zlib
from contextlib import nullcontext
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler

# ---- Part 1: the data and the model. Replace what you need to. ----


class MyDataset(Dataset):
    """Random inputs of shape (size,), with random labels 0 and 1."""

    def __init__(self, length, size, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(length, size, generator=generator)
        self.labels = torch.randint(2, (length,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices):
        """Return a batch. Optional, but faster than a __getitem__ per sample."""
        rows = torch.LongTensor(indices)
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)


class MyModel(nn.Module):
    """One linear layer, from inputs of shape (batch, input_size) to (batch, 2)."""

    def __init__(self, input_size):
        super().__init__()
        self.linear = nn.Linear(input_size, 2)

    def forward(self, inputs):
        return self.linear(inputs)


def make_datasets(args):
    """Return a training set and a validation set (or None), the same on all ranks."""
    length, size = args.dataset_length, args.input_size
    validation_set = MyDataset(length // 10 or 1, size, seed=args.seed + 1)
    return MyDataset(length, size, seed=args.seed), validation_set


def make_model(args):
    return MyModel(args.input_size)


def compute_loss(model, batch):
    """Return the mean loss of a batch, and a dict of sums to report.

    The loss is a mean over items: samples, or tokens. Each sum, such as the number of
    correct answers, will be divided by the total number of items, and printed by name.
    Call model(...), not one of its methods: in training, the model is wrapped in DDP,
    which averages gradients only after such a call.

    If a batch has no items, for example only padding, its mean loss is 0 / 0 = NaN.
    Training multiplies it by 0, and backward() starts from this 0, not from the NaN. So
    with cross_entropy, all gradients are 0. But if you compute sum / count yourself,
    they are 0 * (1 / 0) = NaN. To avoid that, divide by max(count, 1).
    """
    inputs, labels = batch
    outputs = model(inputs)
    loss = nn.functional.cross_entropy(outputs, labels)
    return loss, {"accuracy": (outputs.argmax(dim=1) == labels).sum()}


def count_items(batch):
    """Return the number of items that compute_loss averages over."""
    _, labels = batch
    return len(labels)


# Set this to True if count_items can differ between ranks, as numbers of tokens do. In
# each step, the ranks then exchange these numbers, so that all items count equally.
COUNTS_DIFFER = False


def collate(samples):
    """Make a batch from a list of samples. (__getitems__ may have made it already.)"""
    if isinstance(samples, list):
        return torch.utils.data.default_collate(samples)
    return samples


def make_optimizer(model, args):
    return torch.optim.Adam(model.parameters(), args.learning_rate, fused=True)


def make_scheduler(optimizer, total_steps, args):
    """Return a scheduler or None. Its step() is called after each optimizer step."""
    return  # None: the learning rate stays constant


def wrap_in_ddp(model):
    """Return the model with DDP around it. Options of DDP go here."""
    # gradient_as_bucket_view: DDP would otherwise store the gradients twice.
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


# ---- Part 2: training. ----


@record  # so that torchrun's error report shows the exception of the failed rank
def main():
    # DDP 1: launch. torchrun has started all processes, and ends all if one fails.
    args = parse_args()
    guard_process(args)  # against rare failures: see part 4
    # DDP 2: first take a GPU, as all processes would otherwise use GPU 0. Then join
    # the process group of all processes. torchrun has set RANK, LOCAL_RANK, WORLD_SIZE
    # and the address where they meet, in the environment. The backend moves the data
    # that they exchange: nccl is for GPUs, and gloo also works on CPUs.
    device = choose_device(int(os.environ["LOCAL_RANK"]))
    if args.definitions:
        use_definitions(args.definitions)  # instead of those in part 1
    dist.init_process_group(args.backend, timeout=timedelta(seconds=args.timeout))
    gather_from_all(None)  # the first exchange connects the processes, or fails here
    if dist.get_rank() == 0:
        how = f"{device.type}, {args.backend}, {args.precision}"
        print(f"world size {dist.get_world_size()} on {how}")
    trainer = Trainer(args, device)
    trainer.train()
    del trainer  # frees the DDP model, or else Gloo could crash when Python exits
    leave_group()


class Trainer:
    """Trains and validates a model on all ranks, and saves it on rank 0."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # DDP 3: the same data. With the same seed, all ranks make the same datasets.
        # One rank of each machine goes first, in case files have to be downloaded.
        seed_everything(args.seed)
        is_first = os.environ["LOCAL_RANK"] == "0"
        if is_first:
            self.dataset, validation_set = make_datasets(args)
        gather_from_all(None)  # a barrier: the others wait here, at most --timeout
        if not is_first:
            self.dataset, validation_set = make_datasets(args)
        compare_data(self.dataset, args)

        # DDP 4: shard. In each epoch, each rank trains on its own part of the shuffled
        # data. All parts have the same number of full batches. What is left over is not
        # used in this epoch. Choose the learning rate for the global batch, which is
        # what all ranks together process in an optimizer step.
        self.samples_at_once = args.batch_size * self.world_size  # a batch per rank
        self.global_batch = self.samples_at_once * args.grad_accum_steps
        self.sampler = DistributedSampler(
            self.dataset, self.world_size, self.rank, seed=args.seed, drop_last=True
        )
        # This gives a list of indices per batch, so a resumed epoch can skip batches.
        self.batch_sampler = BatchSampler(self.sampler, args.batch_size, drop_last=True)
        self.loader = make_loader(self.dataset, self.batch_sampler, args)
        self.validation_loader = None
        if validation_set is not None:
            # Every sample is used exactly once. (DistributedSampler would repeat some.)
            # Some ranks may have one batch more than others. That does no harm, because
            # validate() uses the model without DDP, and so exchanges nothing per batch.
            own = range(self.rank, len(validation_set), self.world_size)
            batch_sampler = BatchSampler(own, args.batch_size, drop_last=False)
            self.validation_loader = make_loader(validation_set, batch_sampler, args)

        seed_everything(args.seed)  # again, as reading data may have drawn numbers
        self.model = make_model(args).to(device)
        self.optimizer = make_optimizer(self.model, args)
        steps_per_epoch = math.ceil(len(self.loader) / args.grad_accum_steps)
        self.total_steps = args.epochs * steps_per_epoch
        self.scheduler = make_scheduler(self.optimizer, self.total_steps, args)
        use_scaler = args.precision == "float16"  # for gradients too small for float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=use_scaler)
        self.autocast = nullcontext()
        if args.precision != "float32":
            self.autocast = torch.autocast(device.type, getattr(torch, args.precision))
        self.epochs_done = 0
        self.batches_done = 0  # by this rank, in the current epoch
        self.snapshot_id = None  # tells this run's snapshots from those of other runs
        self.settings = settings_to_keep(self)  # what must not change when resuming
        if args.snapshot_path:
            load_snapshot(self, args.snapshot_path)  # on all ranks
        # DDP 5: wrap. This sends the weights of rank 0 to all ranks. From now on, call
        # ddp_model to train: only then does backward() average the gradients over the
        # ranks. So all ranks take the same step, and keep the same weights.
        self.ddp_model = wrap_in_ddp(self.model)  # shares its weights with self.model

    def train(self):
        """Run the remaining epochs: train, save, validate."""
        total_seconds = 0
        while self.epochs_done < self.args.epochs:
            means, samples, seconds = self.train_epoch()
            compare_weights(self.model)  # warns if they differ between ranks
            total_seconds += seconds
            self.epochs_done += 1
            self.batches_done = 0
            if self.rank == 0:  # DDP 6: only rank 0 prints results and saves
                line = f"epoch {self.epochs_done}/{self.args.epochs}  {as_text(means)}"
                print(f"{line}  {samples / seconds:,.2f} samples/s")
                if self.args.snapshot_path:
                    save_snapshot(self, self.args.snapshot_path)
            if self.validation_loader is not None:
                means = self.validate()  # all ranks do this together
                if self.rank == 0:
                    print(f"  validation  {as_text(means)}")
        if self.rank == 0:
            print(f"DDP training time: {total_seconds:.2f} seconds")

    def train_epoch(self):
        """Train for the rest of an epoch. Return mean metrics, samples and seconds."""
        self.sampler.set_epoch(self.epochs_done)  # DDP 7: reshuffle in every epoch
        # Random numbers, for dropout and augmentation, should differ between epochs and
        # between ranks.
        seed_everything(self.args.seed + self.epochs_done * self.world_size + self.rank)
        epoch_loader = self.loader
        if self.batches_done:  # resumed inside this epoch: read only what is left of it
            index_lists = list(self.batch_sampler)[self.batches_done :]
            epoch_loader = make_loader(self.dataset, index_lists, self.args)
        self.ddp_model.train()
        metrics = Metrics(self.device)
        steps_done = 0
        start = time.perf_counter()
        batches = iter(epoch_loader)
        # Read the batches of a step. The last step of an epoch may have fewer.
        while step_batches := list(islice(batches, self.args.grad_accum_steps)):
            self.train_step(step_batches, metrics)
            steps_done += 1
            self.batches_done += len(step_batches)
            del step_batches  # frees these batches before the next ones are read
            save_now = self.args.save_every and steps_done % self.args.save_every == 0
            # After the last step of an epoch, train() saves.
            if save_now and self.rank == 0 and self.batches_done < len(self.loader):
                save_snapshot(self, self.args.snapshot_path)
        means, counts = metrics.means()  # waits for the GPU, and for all ranks
        seconds = time.perf_counter() - start
        if not COUNTS_DIFFER and len(set(counts)) > 1 and self.rank == 0:
            print("WARNING: the ranks' item counts differ: set COUNTS_DIFFER = True")
        return means, len(epoch_loader) * self.samples_at_once, seconds

    def train_step(self, batches, metrics):
        """Take one optimizer step, on these batches and those of the other ranks."""
        args = self.args
        # Count before the batches go to the GPU: reading a number from there would make
        # the CPU wait.
        counts = [float(count_items(batch)) for batch in batches]
        factors = self.loss_factors(counts)
        for index, batch in enumerate(batches):
            # DDP 5, again: .grad adds up the gradients of all batches. Only the last
            # backward() has to average this sum over the ranks. For the earlier ones,
            # no_sync() turns averaging off. The forward pass has to be inside, too,
            # because DDP decides there whether to average.
            is_last = index == len(batches) - 1
            with nullcontext() if is_last else self.ddp_model.no_sync():
                with self.autocast:
                    batch = to_device(batch, self.device, non_blocking=True)
                    loss, sums = compute_loss(self.ddp_model, batch)
                # Call backward() even for a batch without items (see compute_loss),
                # because the ranks wait for each other there.
                self.scaler.scale(loss * factors[index]).backward()
            metrics.add(loss, sums, counts[index])
        self.scaler.unscale_(self.optimizer)  # the scaler is only active in float16
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()

    def loss_factors(self, counts):
        """Return, for each batch, the factor by which its mean loss is multiplied.

        `counts` has the number of items in each batch of this rank. All items of a step
        should count equally. But a loss is a mean over its batch, and DDP averages over
        the ranks, whether they have many items or few. So the factor is
            items in the batch / mean number of items per rank in this step
        With a batch of 10 items on rank 0 and one of 30 on rank 1, DDP computes
            (10/20 * loss_0 + 30/20 * loss_1) / 2 = (10 * loss_0 + 30 * loss_1) / 40
        With 4 equally large batches on each rank, each factor is 1/4.
        """
        own_items = sum(counts)
        items_per_rank = own_items  # which is the mean if all have equally many
        if COUNTS_DIFFER:
            total = torch.full((), own_items, device=self.device)
            dist.all_reduce(total)  # adds up the numbers of all ranks
            items_per_rank = total / self.world_size
        # A batch without items gets 0. (If no rank has any, 0 / 0 would be NaN.)
        return [count / items_per_rank if count else 0.0 for count in counts]

    def validate(self):
        """Return the means of the metrics over the whole validation set."""
        # Buffers, such as BatchNorm's statistics, can differ between ranks. All ranks
        # take those of rank 0, which are also the ones that are saved.
        for buffer in self.model.buffers():
            values = buffer.contiguous()  # broadcast needs contiguous memory
            dist.broadcast(values, 0)
            buffer.copy_(values)
        metrics = Metrics(self.device)
        self.model.eval()
        with torch.no_grad(), self.autocast:
            for batch in self.validation_loader:
                count = float(count_items(batch))
                batch = to_device(batch, self.device, non_blocking=True)
                # Not ddp_model: it can exchange data in its forward pass, so all ranks
                # would have to call it equally often. Some may have fewer batches.
                loss, sums = compute_loss(self.model, batch)
                metrics.add(loss, sums, count)
        means, _ = metrics.means()
        return means


class Metrics:
    """Adds up what compute_loss returns; gives means over the items of all ranks."""

    def __init__(self, device):
        self.zero = torch.zeros((), dtype=torch.float64, device=device)
        self.sums, self.count = {}, 0

    @torch.no_grad()
    def add(self, mean_loss, sums, count):
        if count:  # the mean of no items is NaN
            self.count += count
            for name, value in {"loss": mean_loss.double() * count, **sums}.items():
                # Reading a value, as .item() does, would make the CPU wait for the GPU.
                self.sums[name] = self.sums.get(name, self.zero) + value

    def means(self):
        """Return means, and each rank's number of items. All ranks have to call it."""
        sums = {name: value.item() for name, value in self.sums.items()}
        # DDP 8: measure globally. The mean of one rank covers only its own items.
        by_rank = gather_from_all((sums, self.count))
        counts = [count for _, count in by_rank]
        totals = {}
        for rank_sums, _ in by_rank:
            for name, value in rank_sums.items():
                totals[name] = totals.get(name, 0.0) + value
        return {name: total / sum(counts) for name, total in totals.items()}, counts


def leave_group():
    """Leave the process group. Nothing may use the DDP model any more."""
    guard_exit()  # against a rare failure: see its docstring
    dist.destroy_process_group()  # DDP 9: leave


# ---- Part 3: snapshots. ----


def save_snapshot(trainer, path):
    """Save what a resumed run needs. Only rank 0 calls this."""
    if not all(p.isfinite().all() for p in trainer.model.parameters()):
        # torchrun then ends the other ranks, too.
        sys.exit("the weights are no longer finite, so no snapshot is saved")
    if os.path.exists(path):
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if saved["snapshot_id"] != trainer.snapshot_id:  # not the one of this run
            sys.exit(f"another run has saved to {path}, so this one stops")
    trainer.snapshot_id = time.time()  # two runs do not save at the same instant
    snapshot = {
        "model": trainer.model.state_dict(),  # ddp_model's keys begin with "module."
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict() if trainer.scheduler else None,
        "scaler": trainer.scaler.state_dict(),
        "epochs_done": trainer.epochs_done,
        "samples_done": trainer.batches_done * trainer.samples_at_once,
        "settings": trainer.settings,
        "global_batch": trainer.global_batch,
        "snapshot_id": trainer.snapshot_id,
    }
    # If a crash interrupts saving, the old file is still there, and complete.
    with open(path + ".tmp", "wb") as file:
        torch.save(snapshot, file)
        file.flush()
        os.fsync(file.fileno())
    # Fail now, rather than when resuming, if the file cannot be loaded.
    torch.load(file.name, map_location="cpu", mmap=True, weights_only=True)
    os.replace(file.name, path)


def load_snapshot(trainer, path):
    """Resume from the snapshot, if there is one. All ranks have to call this."""
    problem = ""
    try:
        if trainer.rank == 0:  # fail now if it cannot be written
            open(path + ".tmp", "ab").close()
        if os.path.exists(path):
            # weights_only: a snapshot is data, and must not run code.
            restore(trainer, torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001, a damaged file can raise anything
        reason = " ".join(str(error).split())[:900]
        problem = f"--snapshot_path {path}: {type(error).__name__}: {reason}"
    problems = [text for text in gather_from_all(problem) if text]
    if problems:
        stop(problems[0])
    if len(set(gather_from_all((trainer.epochs_done, trainer.batches_done)))) > 1:
        stop(f"{path} is not the same on all machines: use a shared folder")


def restore(trainer, snapshot):
    """Set the state of the trainer. Raises ValueError if its settings are different."""
    old, new = snapshot["settings"], trainer.settings
    changed = [name for name in old if old[name] != new.get(name, old[name])]
    if changed:
        changes = [f"{name} was {old[name]}, now {new[name]}" for name in changed]
        raise ValueError("; ".join(changes))
    for name in ("model", "optimizer", "scheduler", "scaler"):
        if snapshot[name]:  # a scaler has no state without float16
            getattr(trainer, name).load_state_dict(snapshot[name])
    trainer.snapshot_id = snapshot["snapshot_id"]
    trainer.epochs_done = snapshot["epochs_done"]
    # Round down: if the number of ranks has changed, a batch may be done only in part.
    # Leave at least one batch, so that the epoch is not empty.
    batches_done = snapshot["samples_done"] // trainer.samples_at_once
    trainer.batches_done = min(batches_done, len(trainer.loader) - 1)
    if trainer.rank == 0:
        samples = trainer.batches_done * trainer.samples_at_once
        print(f"resuming after {trainer.epochs_done} epochs and {samples} samples")
        if snapshot["global_batch"] != trainer.global_batch:
            change = f"{snapshot['global_batch']} to {trainer.global_batch}"
            print(f"the global batch changes from {change}; the learning rate does not")


def settings_to_keep(trainer):
    """Return, by name, what has to be the same when a run is resumed.

    That includes the options that make_optimizer has set, such as the learning rate.
    Loading a snapshot brings the old ones back, so it would silently undo your edits.
    """
    settings = {"length of the dataset": len(trainer.dataset)}
    for name in ("input_size", "seed", "max_grad_norm"):
        settings[name] = getattr(trainer.args, name)
    has_scheduler = trainer.scheduler is not None
    settings["steps of the scheduler"] = trainer.total_steps if has_scheduler else None
    settings["optimizer"] = type(trainer.optimizer).__name__
    for number, group in enumerate(trainer.optimizer.param_groups):
        for name in sorted(group.keys() - {"params"}):
            settings[f"{name} of parameter group {number}"] = str(group[name])
    return settings


# ---- Part 4: flags, helpers and guards. ----


def parse_args():
    parser = argparse.ArgumentParser(
        usage="torchrun [options of torchrun] torchrun_ddp.py [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = [  # with their defaults and smallest values
        ("--epochs", 5, 1, "passes over the dataset"),
        ("--batch_size", 64, 1, "samples per process and batch"),
        ("--grad_accum_steps", 1, 1, "batches per process and optimizer step"),
        ("--learning_rate", 0.01, 0, "passed to make_optimizer"),
        ("--max_grad_norm", 0.0, 0, "clip gradients to this norm; 0: do not clip"),
        ("--dataset_length", 20000, 1, "samples in MyDataset"),
        ("--input_size", 100, 1, "features per sample of MyDataset"),
        ("--num_workers", 0, 0, "DataLoader workers per process"),
        ("--seed", 0, 0, "seed of the weights, data and shuffling"),
        ("--timeout", 600.0, 1, "seconds to wait for a rank or a DataLoader worker"),
        ("--save_every", 0, 0, "also save every N steps of an epoch; 0: do not"),
    ]
    add = parser.add_argument
    for flag, default, _, help in numbers:
        help = f"{help} (default: {default})"
        add(flag, type=type(default), default=default, metavar="N", help=help)
    add("--precision", choices=["float32", "bfloat16", "float16"], default="float32")
    backend = "nccl" if gpus and dist.is_nccl_available() else "gloo"
    add("--backend", choices=["nccl", "gloo"], default=backend)
    help = "Python file with your versions of the definitions in part 1"
    add("--definitions", metavar="FILE", help=help)
    help = "save to FILE after every epoch, and resume from it if it exists"
    add("--snapshot_path", metavar="FILE", help=help)
    args = parser.parse_args()
    for flag, _, smallest, _ in numbers:
        if not smallest <= getattr(args, flag[2:]) < math.inf:  # refuses NaN, too
            parser.error(f"{flag} must be finite, and at least {smallest}")
    if args.definitions:
        name, ending = os.path.splitext(os.path.basename(args.definitions))
        if not os.path.isfile(args.definitions) or ending != ".py" or "." in name:
            parser.error(f"{args.definitions} is not a file with a name like mine.py")
    env = os.environ
    if "LOCAL_RANK" not in env:
        parser.error("start this script with torchrun, as --help shows")
    if args.save_every and not args.snapshot_path:
        parser.error("--save_every needs --snapshot_path")
    # NCCL 2.30 can share GPUs, too, if this variable is set. It is meant for tests.
    can_share = args.backend == "gloo" or "NCCL_MULTI_RANK_GPU_ENABLE" in env
    if not can_share and int(env["LOCAL_WORLD_SIZE"]) > gpus:
        problem = f"--backend nccl needs a GPU for each process, and there are {gpus}"
        parser.error(f"{problem}: use --backend gloo, or fewer processes")
    # Without the setting below, restarted ranks find the old ranks' addresses in
    # torchrun's store, and try to connect to dead processes.
    restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        needs = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and c10d or --standalone"
        parser.error(f"torchrun --max_restarts needs {needs}: see the README")
    return args


def use_definitions(path):
    """Replace the definitions of part 1 with those in this Python file."""
    names = ["MyDataset", "MyModel", "make_datasets", "make_model", "compute_loss"]
    names += ["count_items", "COUNTS_DIFFER", "collate", "make_optimizer"]
    names += ["make_scheduler", "wrap_in_ddp"]
    folder, file = os.path.split(os.path.abspath(path))
    sys.path.insert(0, folder)  # so that it can import its neighbours
    module = importlib.import_module(os.path.splitext(file)[0])
    found = {name: getattr(module, name) for name in names if hasattr(module, name)}
    globals().update(found)  # as if they had been written here
    if os.environ["RANK"] == "0":
        print(f"From {path}: {', '.join(found) or 'none of ' + ', '.join(names)}")
    if not found:
        sys.exit(2)


# Helpers.


def make_loader(dataset, batch_sampler, args):
    """Return a DataLoader. A batch sampler gives a list of indices for each batch."""
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,  # keep them between epochs
        timeout=args.timeout if args.num_workers else 0,
        pin_memory=torch.cuda.is_available(),  # for copies that overlap with computing
    )


def seed_everything(seed):
    """Seed PyTorch, Python and, if it has been imported, NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def choose_device(local_rank):
    """Choose the device of this process. With gloo, processes can share a GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def to_device(batch, device, **options):
    """Return a batch with its tensors on `device`. Options are those of Tensor.to()."""
    if callable(getattr(type(batch), "to", None)):  # a tensor, a graph, ...
        try:
            return batch.to(device, **options)
        except TypeError:  # it does not know these options
            return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(batch[key], device, **options) for key in batch}
    if dataclasses.is_dataclass(batch):
        parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **to_device(parts, device, **options))
    if isinstance(batch, (list, tuple)):
        parts = [to_device(part, device, **options) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def gather_from_all(value):
    """Return a list of the values of all ranks. All ranks have to call this."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def as_text(means):
    return "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())


def stop(reason):
    """Print the reason once, and end. All ranks have to call this."""
    if dist.get_rank() == 0:
        print(reason, file=sys.stderr, flush=True)
    leave_group()
    sys.exit(1)


# Guards. Each prevents a failure, or reports one that would go unnoticed.


def compare_data(dataset, args):
    """Stop if datasets differ in length or are too short; warn if samples differ."""
    length = len(dataset)
    lengths = gather_from_all(length)
    if len(set(lengths)) > 1:
        stop(f'the ranks have {lengths} samples: see "Different data" in the README')
    if length < args.batch_size * dist.get_world_size():
        stop(f"{length} samples are too few for a batch of {args.batch_size} per rank")
    seed_everything(args.seed)  # for the same samples and augmentation on all ranks
    indices = random.sample(range(length), min(args.batch_size, 8))
    batch = next(iter(make_loader(dataset, [indices], args)))
    file = io.BytesIO()
    # copy=True, because torch.save saves the whole tensor that a view belongs to
    torch.save(to_device(batch, "cpu", copy=True), file)
    checksums = gather_from_all(zlib.crc32(file.getvalue()))
    if len(set(checksums)) > 1 and dist.get_rank() == 0:
        problem = "the ranks read different samples"
        print(f'WARNING: {problem}: see "Different data" in the README')


def compare_weights(model):
    """Return whether the weights of all ranks have the same norms; warn if not."""
    norms = [p.norm(1).item() for p in model.parameters() if p.requires_grad]
    is_same = len(set(gather_from_all(str(norms)))) == 1  # as text, because NaN != NaN
    if not is_same and dist.get_rank() == 0:
        problem = "the weights of the ranks differ"
        print(f'WARNING: {problem}: see "Different weights" in the README')
    return is_same


def guard_process(args):
    """Guard against rare failures of a process. Call it before init_process_group."""
    sys.stdout.reconfigure(line_buffering=True)  # lines appear at once, in files, too
    # If the process that started this one is killed, let Linux kill this one, too.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    # Some optimizers import this module. After init_process_group, that would keep the
    # process group alive, and Gloo could abort when the process ends.
    importlib.import_module("torch.distributed.nn")
    # Before Python 3.12, a DataLoader worker can hang when it is forked while a thread
    # of Gloo frees a message. A short wait lets that thread finish.
    if args.backend == "gloo" and sys.version_info < (3, 12):
        os.register_at_fork(before=lambda: time.sleep(0.05))


def guard_exit():
    """Guard against a crash of Gloo when the process ends (pytorch issue 190489).

    That can happen if the DDP model still exists, or if a thread of Gloo is still busy.
    So free the model, and give that thread time to finish.
    """
    gc.collect()
    time.sleep(0.1)


if __name__ == "__main__":
    main()
