"""Compare normal training with DistributedDataParallel (DDP) training.

Does DDP compute the right gradients? Is it faster? If not, why not?

    python ddp.py

starts one process per GPU of this machine. Without a GPU, it starts two that share the
cores. Two equal models take turns, an epoch each: the first process trains one
normally, on its own, and all processes together train the other with DDP. In a step,
both ways use the same samples. With DDP, each process computes its share of them. In
normal training, one process computes all of them, batch after batch, and adds up the
gradients. For real training, or several machines, use torchrun_ddp.py.

Part 1 defines the data and the model: edit it, or write your versions to a file that
you pass with --definitions. (That can be your edited copy of torchrun_ddp.py, too.)
Part 2 launches the processes and trains. Comments mark the main things that a script
for one GPU does not need, with the same numbers as in torchrun_ddp.py: DDP 1 launch, 2
join, 3 same data, 4 shard, 5 wrap, 6 rank 0 prints, 7 reshuffle, 8 measure, 9 leave.
Part 3 compares gradients. Part 4 measures time. Part 5 has flags, helpers that you can
look up when you meet them, the code that starts the processes, and guards against rare
failures.

The world size is the number of processes. Each has a rank, from 0 to world size - 1. A
collective, such as all_reduce, is an exchange between all ranks. All have to make the
same calls: if one does not, the others wait, and fail after --timeout seconds.
"""

import argparse
import copy
import ctypes
import dataclasses
import gc
import importlib
import io
import json
import math
import os
import random
import signal
import socket
import sys
import textwrap
import time
import traceback
import zlib
from contextlib import nullcontext
from datetime import timedelta
from itertools import islice
from multiprocessing import resource_tracker
from statistics import median, median_low

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from dotenv import load_dotenv
from torch import nn
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


# ---- Part 2: launching the processes, and training both ways. ----


def main():
    args = parse_args()
    store = open_store()  # a small key-value server, where the processes meet
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"PyTorch {torch.__version__} on {kind}, {args.backend}, {args.precision}")
    global_batch = args.batch_size * args.grad_accum_steps * args.world_size
    line = f"world size {args.world_size}, global batch {global_batch:,}"
    print(line if kind == "cuda" else f"{line}, {args.cores} cores", flush=True)
    # DDP 1: launch. Start the processes. Each calls run_rank(rank, *arguments).
    launch(run_rank, (args, store.host, store.port), args.world_size)


def run_rank(rank, args, host, port):
    """Join the other processes, compare, and leave. Runs in each new process."""
    prepare_process(rank, args)
    # DDP 2: first take a GPU, as all processes would otherwise use GPU 0. Then join
    # the process group of all processes. They meet at the store of main(). The backend
    # moves the data that they exchange: nccl is for GPUs, and gloo also works on CPUs.
    device = choose_device(rank)
    if args.definitions:
        use_definitions(args.definitions)  # instead of those in part 1
    store = dist.TCPStore(host, port)  # a client of that store
    limit = timedelta(seconds=args.timeout)
    dist.init_process_group(
        args.backend, store=store, rank=rank, world_size=args.world_size, timeout=limit
    )
    gather_from_all(None)  # the first exchange connects the processes, or fails here
    try:
        is_right = compare(args, device, store)
    except Exception:  # noqa: BLE001
        # launch() ends all processes if one fails, and would show only one error.
        traceback.print_exc()
        sys.exit(1)
    leave_group()
    sys.exit(0 if is_right else 1)


def compare(args, device, store):
    """Check DDP, train both ways, report. Return False if this rank finds DDP wrong."""
    rank = dist.get_rank()
    ddp_trainer, normal_trainer = make_trainers(args, device, store)
    figures = check_gradients(ddp_trainer, normal_trainer)
    results = {"normal": [], "ddp": []}  # what train_epoch returns, for each epoch
    for epoch in range(args.epochs):
        # The two ways take turns in going first, so that neither is favoured.
        for way in ("normal", "ddp") if epoch % 2 == 0 else ("ddp", "normal"):
            if way == "ddp":
                results["ddp"].append(ddp_trainer.train_epoch(epoch))
            elif rank == 0:
                results["normal"].append(normal_trainer.train_epoch(epoch))
            # The others wait for rank 0, so that all start together. As normal training
            # may take longer than --timeout, they wait without a limit.
            others_wait_for_rank_0(store, f"epoch {epoch}, {way}")
        if rank == 0:  # DDP 6: only rank 0 prints results
            print_epoch(epoch, args, results)
    figures["same_weights"] = compare_weights(ddp_trainer.model)  # between ranks
    figures.update(measure_step(ddp_trainer, results["ddp"]))
    if rank == 0:
        report(figures, results, args)
    # If a rank exits with code 1, launch() ends the others. So none of them leaves
    # before rank 0 has reported.
    others_wait_for_rank_0(store, "report")
    is_wrong = figures.get("same_gradients") is False  # only rank 0 can know
    return figures["same_weights"] and not is_wrong


def make_trainers(args, device, store):
    """Return a trainer with DDP and, on rank 0, one without (None on other ranks)."""
    # DDP 3: the same data. With the same seed, all ranks make the same dataset. Rank 0
    # goes first: if it downloads files, the others find them.
    rank = dist.get_rank()
    seed_everything(args.seed)
    if rank == 0:
        dataset, _ = make_datasets(args)  # this script does not validate
    others_wait_for_rank_0(store, "make_datasets")
    if rank > 0:
        dataset, _ = make_datasets(args)
    compare_data(dataset, args)
    seed_everything(args.seed)
    model = make_model(args)
    ddp_trainer = Trainer(args, device, dataset, model, is_ddp=True)
    normal_trainer = None
    if rank == 0:
        seed_everything(args.seed)
        second = make_model(args)  # some models cannot be copied by copy.deepcopy
        second.load_state_dict(model.state_dict())
        normal_trainer = Trainer(args, device, dataset, second, is_ddp=False)
    check_models(ddp_trainer, normal_trainer)  # stops if they cannot be compared
    return ddp_trainer, normal_trainer


class Trainer:
    """Trains a model with DDP, as one of several ranks, or normally, on its own."""

    def __init__(self, args, device, dataset, model, is_ddp):
        self.args, self.device, self.is_ddp = args, device, is_ddp
        self.communicates = is_ddp  # measure_step() turns this off for a while
        self.rank = dist.get_rank() if is_ddp else 0
        self.num_ranks = args.world_size if is_ddp else 1
        # DDP 4: shard. In each epoch, all ranks shuffle alike, and each gets its
        # part of the samples. If their order is a b c d, a step with batches of 2 has
        #     with DDP:  a c on rank 0, b d on rank 1
        #     normally:  a b, then c d
        # Samples at the end of the dataset, too few for one more batch per rank, are
        # never used.
        samples_at_once = args.batch_size * args.world_size  # a batch per rank
        num_samples = len(dataset) // samples_at_once * samples_at_once
        indices = range(num_samples)  # the sampler only needs their number
        self.sampler = DistributedSampler(
            indices, self.num_ranks, self.rank, shuffle=True, seed=args.seed
        )
        batch_sampler = BatchSampler(self.sampler, args.batch_size, drop_last=True)
        self.loader = make_loader(dataset, batch_sampler, args)
        self.batches_per_step = args.grad_accum_steps
        if not is_ddp:
            self.batches_per_step *= args.world_size
        self.num_steps = math.ceil(len(self.loader) / self.batches_per_step)

        self.model = model.to(device)
        self.model_to_call = self.model
        self.no_sync = nullcontext  # normal training has nothing to turn off
        if is_ddp:
            # DDP 5: wrap. This sends the weights of rank 0 to all ranks. To train, call
            # the wrapped model: only then does backward() average the gradients over
            # the ranks. So all ranks take the same step and keep equal weights.
            self.model_to_call = wrap_in_ddp(self.model)  # shares the weights
            self.no_sync = self.model_to_call.no_sync
        self.optimizer = make_optimizer(self.model, args)
        total_steps = args.epochs * self.num_steps
        self.scheduler = make_scheduler(self.optimizer, total_steps, args)
        use_scaler = args.precision == "float16"  # for gradients too small for float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=use_scaler)
        self.autocast = nullcontext()
        if args.precision != "float32":
            self.autocast = torch.autocast(device.type, getattr(torch, args.precision))

    def train_epoch(self, epoch):
        """Train for one epoch. Return its mean metrics, samples and seconds."""
        self.sampler.set_epoch(epoch)  # DDP 7: reshuffle in every epoch
        # Random numbers, for dropout and augmentation, should differ between epochs and
        # between ranks.
        seed_everything(self.args.seed + epoch * self.num_ranks + self.rank)
        metrics = Metrics(self.device)
        self.model_to_call.train()
        start = time.perf_counter()
        batches = iter(self.loader)
        # Read the batches of a step. The last step of an epoch may have fewer.
        while step_batches := list(islice(batches, self.batches_per_step)):
            self.train_step(step_batches, metrics)
            del step_batches  # frees these batches before the next ones are read
        means, counts = metrics.means(of_all_ranks=self.is_ddp)  # waits for the GPU
        seconds = time.perf_counter() - start
        if not COUNTS_DIFFER and len(set(counts)) > 1 and self.rank == 0:
            print("WARNING: the ranks' item counts differ: set COUNTS_DIFFER = True")
        samples = len(self.loader) * self.args.batch_size * self.num_ranks
        return {"means": means, "samples": samples, "seconds": seconds}

    def train_step(self, batches, metrics):
        """Take one optimizer step. With DDP, all ranks take it together."""
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
            average_now = is_last and self.communicates
            with nullcontext() if average_now else self.no_sync():
                with self.autocast:
                    batch = to_device(batch, self.device, non_blocking=True)
                    loss, sums = compute_loss(self.model_to_call, batch)
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
        In normal training, there is only one rank.
        """
        own_items = sum(counts)
        items_per_rank = own_items  # which is the mean if all have equally many
        if COUNTS_DIFFER and self.communicates:
            total = torch.full((), own_items, device=self.device)
            dist.all_reduce(total)  # adds up the numbers of all ranks
            items_per_rank = total / self.num_ranks
        # A batch without items gets 0. (If no rank has any, 0 / 0 would be NaN.)
        return [count / items_per_rank if count else 0.0 for count in counts]


class Metrics:
    """Adds up what compute_loss returns; gives means over all items."""

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

    def means(self, of_all_ranks):
        """Return means, and items by rank. If of_all_ranks, all have to call this."""
        sums = {name: value.item() for name, value in self.sums.items()}
        # DDP 8: measure globally. The mean of one rank covers only its own items.
        by_rank = [(sums, self.count)]
        if of_all_ranks:
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


# ---- Part 3: does DDP compute the right gradients? ----


def check_gradients(ddp_trainer, normal_trainer):
    """On one batch per rank, compare DDP's gradients with those of normal training.

    This does not check accumulation, clipping or the optimizer, and does not change
    the weights. Rank 0 prints the result, and returns figures.
    """
    # Every rank reads a batch, as in training. Rank 0 gets all of them, for normal
    # training. That way, both see the same random augmentation. (A view would be sent
    # with the whole tensor behind it, so this sends copies.)
    batch = to_device(next(iter(ddp_trainer.loader)), "cpu", copy=True)
    batches = [None] * ddp_trainer.num_ranks if ddp_trainer.rank == 0 else None
    dist.gather_object(batch, batches)
    found = take_gradients(ddp_trainer, [batch])
    if ddp_trainer.rank > 0:
        return {}  # only rank 0 knows
    expected = take_gradients(normal_trainer, batches)
    difference, name = largest_difference(expected, found)
    # In tests on CPUs, right gradients differed by up to 1e-6, from rounding, and wrong
    # ones by 0.03 or more. GPUs and low precision round more.
    tolerance = 1e-3
    has_16_bits = any(gradient.element_size() < 4 for gradient in found.values())
    is_low = has_16_bits or ddp_trainer.args.precision != "float32"
    if is_low or ddp_trainer.device.type == "cuda":
        tolerance = 1e-2
    same = difference < tolerance
    if not same:
        # Is it wrong, or only noise? See how much normal training differs from itself.
        # If the noise is large, or over a tenth of the difference, we cannot tell.
        noise, _ = largest_difference(expected, take_gradients(normal_trainer, batches))
        if noise > 0.1 or difference < 10 * noise:
            same = None
    text = f"""DDP is right: on one batch per rank, its gradients match those of normal
        training (largest relative difference: {difference:.1g})."""
    if same is False:
        text = f"""DDP is WRONG: its gradients differ from those of normal training, by
            {difference:.1g} (relative difference) in {name}. See "Wrong" in the
            README."""
    elif same is None:
        text = """Cannot tell if DDP is right: even without DDP, two runs give different
            gradients, or infinite ones. See "Not repeatable" in the README."""
    print_wrapped(text)
    size = sum(gradient.nbytes for gradient in expected.values())
    figures = {"same_gradients": same, "gradient_difference": difference}
    return {**figures, "differs_most": name, "gradient_bytes": size}


def take_gradients(trainer, batches):
    """Return the gradients, by parameter. Weights and buffers stay as they were.

    With DDP, `batches` has the batch of this rank, and backward() averages over the
    ranks. In normal training, `batches` has those of all ranks.
    """
    counts = [float(count_items(batch)) for batch in batches]
    factors = trainer.loss_factors(counts)
    # With N ranks, the factors of normal training contain a division by N. DDP divides
    # by N later, after backward(). In low precision, that is rounded differently. So
    # here, normal training divides later, too. (There is no GradScaler: gradients that
    # are too small for float16 are 0 both ways.)
    divide_later = 1 if trainer.is_ddp else len(batches)  # DDP does it already
    model = trainer.model
    state = copy.deepcopy(model.state_dict())
    trainer.model_to_call.train()
    for batch, factor in zip(batches, factors):
        seed_everything(trainer.args.seed)  # for the same dropout
        model.load_state_dict(state)  # BatchNorm's statistics may have changed
        with trainer.autocast:
            # a copy, because compute_loss may change the batch, as by batch.pop()
            batch = to_device(copy.copy(batch), trainer.device)
            loss, _ = compute_loss(trainer.model_to_call, batch)
        (loss * (factor * divide_later)).backward()
    model.load_state_dict(state)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            gradients[name] = gradient.detach().to_dense().cpu() / divide_later
    model.zero_grad()
    return gradients


def largest_difference(expected, found):
    """Return the largest relative difference, and the parameter that has it.

    It is relative to the norm of the parameter's gradient or, if that is nearly 0 (as
    for a bias before BatchNorm), to a thousandth of the norm of all gradients.
    """
    norms = {name: gradient.norm().item() for name, gradient in expected.items()}
    smallest = max(1e-3 * math.hypot(*norms.values()), 1e-30)
    differences = {}
    for name, norm in norms.items():
        difference = (found[name] - expected[name]).norm().item()
        difference /= max(norm, smallest)
        differences[name] = difference if math.isfinite(difference) else math.inf
    name = max(differences, key=differences.get)
    return differences[name], name


# ---- Part 4: is DDP faster? If not, why not? ----


def print_epoch(epoch, args, results):
    print(f"epoch {epoch + 1}/{args.epochs}")
    for name, way in (("normal", "normal"), ("DDP   ", "ddp")):
        result = results[way][-1]
        rate = f"{result['samples'] / result['seconds']:,.1f} samples/s"
        print(f"  {name}  {as_text(result['means'])}  {rate}")


def median_step_ms(results, num_steps):
    """Return the ms per step in the median epoch. If possible, skip the first one."""
    seconds = median(result["seconds"] for result in results[1:] or results)
    return 1000 * seconds / num_steps


def measure_step(ddp_trainer, results):
    """Return figures: how many ms a DDP step takes for data, computing, and averaging.

    All ranks have to call this, after training: it changes the weights.
    """
    whole_ms = median_step_ms(results, ddp_trainer.num_steps)
    # Repeat steps for about 0.4 seconds. All ranks take as many as rank 0.
    repeats = max(2, round(400 / gather_from_all(whole_ms)[0]))
    batches = list(islice(ddp_trainer.loader, 4 * ddp_trainer.batches_per_step))
    # As the model overfits these few batches, its gradients become tiny, in the end too
    # small for normal floats. CPUs are slow with those (denormals), so round them to 0.
    torch.set_flush_denormal(True)
    # Time steps on batches that have been read, and then also without averaging:
    #     data = whole step - step on batches that have been read
    #     sync = that step - the same step without averaging
    # What remains is "compute". (min() keeps noise from making a part negative.)
    no_data_ms = min(time_steps(ddp_trainer, batches, repeats), whole_ms)
    ddp_trainer.communicates = False
    compute_ms = min(time_steps(ddp_trainer, batches, repeats), no_data_ms)
    torch.set_flush_denormal(False)
    parts = {"data": whole_ms - no_data_ms, "compute": compute_ms}
    parts["sync"] = no_data_ms - compute_ms
    figures = {"steps_per_epoch": ddp_trainer.num_steps, "ddp_step_ms": parts}
    return {**figures, "compute_ms_by_rank": gather_from_all(compute_ms)}


def time_steps(trainer, batches, repeats):
    """Return the mean ms of a step on batches that have been read already."""
    size = trainer.batches_per_step
    steps = [batches[i : i + size] for i in range(0, len(batches), size)]
    trainer.scheduler = None  # it has done all of its steps
    metrics = Metrics(trainer.device)
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first step was a warm-up
            wait_for_gpu()
            start = time.perf_counter()
        step = [copy.copy(batch) for batch in steps[repeat % len(steps)]]
        trainer.train_step(step, metrics)
    wait_for_gpu()
    return 1000 * (time.perf_counter() - start) / repeats


def report(figures, results, args):
    """Print times and a verdict. With --json, write all figures to that file."""
    figures.update(results)
    for name, way in (("Normal", "normal"), ("DDP", "ddp")):
        seconds = sum(result["seconds"] for result in results[way])
        print(f"{name} training time: {seconds:.2f} seconds")
    parts = figures["ddp_step_ms"]
    ddp_ms = sum(parts.values())
    pairs = list(zip(results["normal"], results["ddp"]))
    ratios = [normal["seconds"] / ddp["seconds"] for normal, ddp in pairs[1:] or pairs]
    figures["speedup_range"] = [min(ratios), max(ratios)]
    normal_ms = median_step_ms(results["normal"], figures["steps_per_epoch"])
    figures["normal_step_ms"], figures["speedup"] = normal_ms, normal_ms / ddp_ms
    print(f"\nA step takes {normal_ms:.2f} ms normally, and {ddp_ms:.2f} ms with DDP:")
    for part, ms in parts.items():
        print(f"  {part:7} {ms:8.2f} ms  {'#' * round(50 * ms / ddp_ms)}")
    print(f"(sync averages {figures['gradient_bytes']:,} bytes of gradients)")
    print_wrapped(f"{verdict(figures, args)} {advice(figures, args)}")
    if args.json:
        figures["torch"] = torch.__version__
        has_gpu = torch.cuda.is_available()
        figures["device"] = torch.cuda.get_device_name() if has_gpu else "cpu"
        with open(args.json, "w") as file:
            json.dump({**vars(args), **figures}, file, indent=1)


def verdict(figures, args):
    """Return in words whether DDP is faster, and compared with what."""
    speedup, (lowest, highest) = figures["speedup"], figures["speedup_range"]
    how = "DDP makes no clear difference"
    if args.epochs <= 2:
        how = "Too few epochs to tell"
    elif lowest > 1 and speedup > 1.1 and args.world_size > 1:
        how = "DDP is faster"
    elif highest < 1 and speedup < 0.9:
        how = "DDP is slower"
    has_gpu = torch.cuda.is_available()
    used = "one GPU" if has_gpu else f"{args.threads} of {args.cores} cores"
    return f"""{how}: {speedup:.2f} times the speed of normal training ({lowest:.2f} to
        {highest:.2f} per epoch), where {args.world_size} would be ideal. Normal
        training used {used}, and batches of {args.batch_size}."""


def advice(figures, args):
    """Return in words what limits the speed of DDP, and what would help."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices, kind = (gpus, "GPUs") if gpus else (args.cores, "cores")
    data, compute, sync = figures["ddp_step_ms"].values()
    by_rank = figures["compute_ms_by_rank"]
    slowest, usual = max(by_rank), median_low(by_rank)  # the faster of two ranks
    if args.world_size == 1:
        return "With one process, DDP cannot be faster."
    if args.world_size > devices:
        return f"""{args.world_size} processes share {devices} {kind}: start at most
            {devices}."""
    text = ""
    if gpus:
        text = f"""A single GPU may be faster with larger batches. To find out, compare
            these samples/s with those of --world_size 1 --batch_size
            {args.world_size * args.batch_size}. """
    # Waiting for the slowest rank counts as sync. If it is most of sync, say so.
    if slowest > 1.2 * usual and slowest - usual > sync / 2:
        return f"""{text}Rank {by_rank.index(slowest)} computes {slowest / usual:.1f}
            times as long as a typical rank, and the others wait for it."""
    if data > max(compute, sync):
        workers = args.num_workers + 2
        return f"{text}Loading data takes the longest: try --num_workers {workers}."
    speedup_without_sync = figures["normal_step_ms"] / (data + compute)
    if speedup_without_sync < 1.1:
        return f"""{text}There is too little work to share, or the processes slow each
            other down: try a larger model or batch, or an idle machine."""
    if sync < 0.2 * (data + compute + sync):
        return f"{text}The largest part of a step is computing, as it should be."
    return f"""{text}Averaging gradients takes up much of a step. Without it, the
        speedup would be {speedup_without_sync:.1f}. To come closer to that, accumulate
        gradients, as with --grad_accum_steps {4 * args.grad_accum_steps}. This enlarges
        the global batch, so you may have to tune the learning rate again."""


def print_wrapped(text):
    words = " ".join(text.split())  # without the line breaks and indents of the source
    print(textwrap.fill(words, 80, break_on_hyphens=False))


# ---- Part 5: flags, helpers and guards. ----


def parse_args():
    parser = argparse.ArgumentParser(
        usage="python ddp.py [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    env_file = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".env")
    try:
        load_dotenv(env_file)  # sets MASTER_ADDR and MASTER_PORT, if it exists
    except UnicodeDecodeError as reason:
        parser.error(f"{env_file}: {reason}")
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
        ("--world_size", gpus or 2, 1, "processes: one per GPU or, without GPUs, 2"),
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
    add("--json", metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    for flag, _, smallest, _ in numbers:
        if not smallest <= getattr(args, flag[2:]) < math.inf:  # refuses NaN, too
            parser.error(f"{flag} must be finite, and at least {smallest}")
    if args.definitions:
        name, ending = os.path.splitext(os.path.basename(args.definitions))
        if not os.path.isfile(args.definitions) or ending != ".py" or "." in name:
            parser.error(f"{args.definitions} is not a file with a name like mine.py")
    # NCCL 2.30 can share GPUs, too, if this variable is set. It is meant for tests.
    can_share = args.backend == "gloo" or "NCCL_MULTI_RANK_GPU_ENABLE" in os.environ
    if not can_share and args.world_size > gpus:
        problem = f"--backend nccl needs a GPU for each process, and there are {gpus}"
        parser.error(f"{problem}: use --backend gloo, or a smaller --world_size")
    args.cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # on Linux, the cores that we may use
        args.cores = len(os.sched_getaffinity(0))
    args.threads = max(1, args.cores // args.world_size)
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


def wait_for_gpu():
    """Wait until the GPU, if there is one, has done all of its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def others_wait_for_rank_0(store, event):
    """Let the other ranks wait until rank 0 calls this, too, for the same event.

    They can wait here for longer than --timeout. Each event needs a new name.
    """
    if dist.get_rank() == 0:
        store.set(event, "done")
    store.wait([event], timedelta(days=20))  # in effect, no limit


def as_text(means):
    return "  ".join(f"{name} {mean:.4f}" for name, mean in means.items())


def stop(reason):
    """Print the reason once, and end. All ranks have to call this."""
    if dist.get_rank() == 0:
        print(reason, file=sys.stderr, flush=True)
    leave_group()
    sys.exit(1)


# Processes. torchrun would replace most of this.


def open_store():
    """Return a store that listens at MASTER_ADDR and MASTER_PORT only.

    The default is a free port of this machine.
    """
    address = os.environ.get("MASTER_ADDR") or "localhost"
    port = os.environ.get("MASTER_PORT") or "0"
    try:
        listener = socket.create_server((address, int(port)))
    except (OSError, OverflowError, ValueError) as reason:
        problem = f"MASTER_ADDR={address} MASTER_PORT={port}: {reason}"
        print(f"ddp.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
    host, port = listener.getsockname()
    return dist.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,  # libuv, the default, cannot take a socket in PyTorch 2.6
    )


def launch(function, arguments, num_processes):
    """Start the processes. If one fails, end the others, and exit with its code."""
    try:
        # Block Ctrl-C while the processes start. They inherit that, so only this
        # process reacts to it.
        resource_tracker.ensure_running()  # starting it later would unblock Ctrl-C
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        processes = mp.spawn(function, arguments, num_processes, join=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        while not processes.join():  # raises an error if a process has failed
            pass
    except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
        code = getattr(error, "exit_code", None)  # 1 or 2: the process has said why
        sys.exit(code if code in (1, 2) else f"ddp.py: {error}")
    finally:
        for process in mp.active_children():
            process.kill()


def prepare_process(rank, args):
    """Set up this process: guards, threads, and the variables that torchrun sets."""
    guard_process(args)
    if os.getppid() != mp.parent_process().pid:  # the parent has ended already
        sys.exit(1)
    # mp.spawn has set "spawn", which DataLoader workers would use, too. Undo that.
    mp.set_start_method(None, force=True)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(args.world_size)
    torch.set_num_threads(args.threads)


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


def check_models(ddp_trainer, normal_trainer):
    """Stop if the two ways share a model, or if normal training cannot train it."""
    own = set(ddp_trainer.model.parameters())
    others = normal_trainer.model.parameters() if normal_trainer else []
    if any(gather_from_all(not own.isdisjoint(others))):
        stop("make_model has to return a new model on each call")
    modules = ddp_trainer.model_to_call.modules()
    if any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        stop("SyncBatchNorm needs several ranks, and normal training has only one")


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
    try:
        main()
    except KeyboardInterrupt:  # Ctrl-C
        sys.exit(130)
