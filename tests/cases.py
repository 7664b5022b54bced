"""Run parts of the scripts in real processes, many cases in one start.

    python cases.py WORLD_SIZE JSON

A case is a dict: "run" names one of the functions below; "flags" are the scripts'; all
else names what stands in for a part of the scripts: {"run": "check", "MyModel": "CNN"}.
Rank 0 prints a line of JSON for each case: what the function returned.
"""

import contextlib
import copy
import gc
import io
import json
import random
import sys
import time

import models
import numpy
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ddp
import torchrun_ddp

DEFAULTS = "--dataset_length 40 --batch_size 8 --input_size 64 --epochs 1"
CPU = torch.device("cpu")


def models_of(args):
    """Return the dataset, a DDP model and, on rank 0, the normal model."""
    torch.manual_seed(args.seed)
    dataset = ddp.MyDataset(args.dataset_length, args.input_size, args.seed)
    wrapped = ddp.DistributedDataParallel(ddp.MyModel(args.input_size))
    normal = None
    if dist.get_rank() == 0:
        torch.manual_seed(args.seed)
        normal = ddp.MyModel(args.input_size)
        normal.load_state_dict(wrapped.module.state_dict())
    return dataset, wrapped, normal


def state(*trained):
    """Return what the check must not change."""
    generators = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1]
    found = [[generators[0].tolist(), generators[1], generators[2].tolist()]]
    for model in filter(None, trained):
        found.append([value.tolist() for value in model.state_dict().values()])
        found.append([module.training for module in model.modules()])
        found.append([p.grad is None for p in model.parameters()])
    return found


def check(args):
    """Return the figures of ddp.check, what it said, and whether it changed nothing."""
    dataset, wrapped, normal = models_of(args)
    normal_args = copy.copy(args)
    normal_args.grad_accum_steps *= dist.get_world_size()
    models = (normal, normal_args), (wrapped, args)
    before = state(wrapped, normal)
    store = dist.PrefixStore(f"check {next(count)}", STORE[0])
    with contextlib.redirect_stdout(io.StringIO()) as says:
        figures = ddp.check(*models, dataset, CPU, store)
    words = " ".join(says.getvalue().split())
    return {**figures, "says": words, "unchanged": before == state(wrapped, normal)}


def weights(args):
    """Return the weights at the end of normal and of DDP training."""
    trained, ends = [], []
    prepare = ddp.prepare

    def note(model, *more):
        trained.append(model)
        return prepare(model, *more)

    def end(*_):
        for model in trained:
            ends.append([value.tolist() for value in model.state_dict().values()])
        return {"data": 0, "compute": 1, "sync": 0}

    with replaced(prepare=note, measure_step=end):
        compare(args)
    return ends


def compare(args):
    """Return the figures of a whole comparison."""
    store = dist.PrefixStore(f"compare {next(count)}", STORE[0])
    place = dist.get_rank(), dist.get_world_size()
    with contextlib.redirect_stdout(None):
        ddp.compare(*place, args, CPU, store)
    return json.loads(store.get("figures")) if place[0] == 0 else None


def train(args):
    """Return the lines that torchrun_ddp.py prints, and whether ranks ended equal."""
    ended = []
    original = torchrun_ddp.evaluate

    def note(model, *more):
        # Gloo survives what NCCL does not: a collective that some ranks leave out.
        assert not hasattr(model, "no_sync"), "evaluated with DDP around the model"
        ended[:] = [value.double().sum().item() for value in model.parameters()]
        return original(model, *more)

    with contextlib.redirect_stdout(io.StringIO()) as says, replaced(evaluate=note):
        torchrun_ddp.train(args, CPU)
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, ended)
    equal = all(one == of_all[0] for one in of_all)
    return {"lines": says.getvalue().splitlines(), "equal": equal}


def order(args):
    """Return the batches of normal training, and those that each rank reads."""
    normal, ours = ddp.make_batch_samplers(args.dataset_length, args)
    of_all = [None] * dist.get_world_size()
    for each in (normal, ours):
        each.sampler.set_epoch(3)
    dist.all_gather_object(of_all, list(ours))
    return [list(normal), len(normal), of_all]


def step(args):
    """Return the parts of a step, as shares of 1."""
    dataset, model, _ = models_of(args)
    batch_sampler = ddp.make_batch_samplers(len(dataset), args)[1]
    loader = ddp.make_loader(dataset, batch_sampler, args, CPU)
    training = ddp.prepare(model, loader, CPU, args)
    with contextlib.redirect_stdout(None):
        epochs = [ddp.train_loop(*training) for _ in range(3)]
    parts = ddp.measure_step(training, epochs)
    return {name: part / sum(parts.values()) for name, part in parts.items()}


def synchronisations(args):
    """Return how often an epoch's gradients are synchronised."""
    dataset, model, _ = models_of(args)
    calls = []

    def hook(_, bucket):
        calls.append(bucket.index())
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    model.register_comm_hook(None, hook)
    batch_sampler = ddp.make_batch_samplers(len(dataset), args)[1]
    loader = ddp.make_loader(dataset, batch_sampler, args, CPU)
    ddp.train_loop(*ddp.prepare(model, loader, CPU, args))
    return len(calls)


STORE, count = [], iter(range(10000))


@contextlib.contextmanager
def replaced(**parts):
    """Let parts of the scripts be others, while this context lasts."""
    before = {}
    for script in (ddp, torchrun_ddp):
        for name in filter(vars(script).__contains__, parts):
            before[script, name] = vars(script)[name]
            vars(script)[name] = parts[name]
    try:
        yield
    finally:
        for (script, name), part in before.items():
            vars(script)[name] = part


def worker(rank, world_size, port, cases):
    torch.set_num_threads(1)
    STORE.append(dist.TCPStore("127.0.0.1", port))
    store = dist.PrefixStore("group", STORE[0])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for case in cases:
        run = globals()[case.pop("run")]
        sys.argv = ["ddp.py", *DEFAULTS.split(), *case.pop("flags", "").split()]
        args = ddp.make_parser()[0].parse_args()
        more = {"backend": "gloo", "cores": 2, "save_every": 0, "snapshot_path": None}
        vars(args).update({**more, **case.pop("args", {})})
        parts = {name: getattr(models, part) for name, part in case.items()}
        with replaced(**parts):
            args.precision = ddp.choose_precision(args.amp, CPU)
            step = args.batch_size * args.grad_accum_steps * world_size
            args.global_batch_size = step
            result = run(args)
        if rank == 0:
            print(json.dumps(result), flush=True)
    STORE.clear()
    gc.collect()
    time.sleep(0.3)  # PyTorch 2.0 can hang if its thread is still freeing a message
    dist.destroy_process_group()


if __name__ == "__main__":
    world_size, cases = int(sys.argv[1]), json.loads(sys.argv[2])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(worker, (world_size, store.port, cases), world_size)
