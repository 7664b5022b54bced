"""Run parts of ddp.py in real processes, many cases in one start.

    python cases.py WORLD_SIZE JSON

A case is a dict: "run" names one of the functions below; "flags" are ddp.py's; all else
names what stands in for a part of ddp.py: {"run": "check", "MyModel": "CNN"}. Rank 0
prints a line of JSON for each case: what the function returned.
"""

import contextlib
import gc
import json
import sys

import models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import ddp

DEFAULTS = "--dataset_length 40 --batch_size 8 --input_size 64 --epochs 1"


def check(args):
    """Return the figures of check_gradients, and whether it leaves the models alone."""
    torch.manual_seed(args.seed)
    dataset = ddp.MyDataset(args.dataset_length, args.input_size, args.seed)
    normal, model = ddp.MyModel(args.input_size), ddp.MyModel(args.input_size)
    normal.load_state_dict(model.state_dict())
    wrapped = ddp.DistributedDataParallel(model)
    before = [value.clone() for value in model.state_dict().values()]
    figures = ddp.check_gradients(normal, wrapped, dataset, args, torch.device("cpu"))
    after = zip(before, normal.state_dict().values(), model.state_dict().values())
    unchanged = all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in after)
    return {**figures, "unchanged": unchanged}


def weights(args):
    """Return the weights at the end of normal and of DDP training."""
    trained, ends, make_optimizer = [], [], ddp.make_optimizer

    def note(model, learning_rate):
        trained.append(model)
        return make_optimizer(model, learning_rate)

    def end(*_):
        for model in trained[-2:]:  # those before are of the check
            ends.append([value.tolist() for value in model.state_dict().values()])
        return {"data": 0, "compute": 0, "sync": 0}

    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore(f"weights {next(count)}", STORE[0])
    with replaced(make_optimizer=note, measure_step=end):
        ddp.compare(rank, world_size, args, torch.device("cpu"), store)
    return ends


def step(args):
    """Return the parts of a step, in ms."""
    dataset = ddp.MyDataset(args.dataset_length, args.input_size, args.seed)
    model = ddp.DistributedDataParallel(ddp.MyModel(args.input_size))
    return ddp.measure_step(model, dataset, 0.02, args, torch.device("cpu"))


def synchronisations(args):
    """Return how often an epoch's gradients are synchronised."""
    dataset = ddp.MyDataset(args.dataset_length, args.input_size, args.seed)
    model = ddp.DistributedDataParallel(ddp.MyModel(args.input_size))
    calls = []

    def hook(_, bucket):
        calls.append(bucket.index())
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    model.register_comm_hook(None, hook)
    device, optimizer = torch.device("cpu"), ddp.make_optimizer(model, 0.01)
    _, loader = ddp.make_loaders(dataset, len(dataset), 0, args, device)
    place = dist.get_rank(), dist.get_world_size()
    ddp.train_loop(model, loader, optimizer, device, args, 0, *place)
    return len(calls)


STORE, count = [], iter(range(1000))


@contextlib.contextmanager
def replaced(**parts):
    """Let parts of ddp.py be others, while this context lasts."""
    before = {name: getattr(ddp, name) for name in parts}
    vars(ddp).update(parts)
    yield
    vars(ddp).update(before)


def worker(rank, world_size, port, cases):
    torch.set_num_threads(1)
    STORE.append(dist.TCPStore("127.0.0.1", port))
    store = dist.PrefixStore("group", STORE[0])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    for case in cases:
        run = globals()[case.pop("run")]
        sys.argv = ["ddp.py", *DEFAULTS.split(), *case.pop("flags", "").split()]
        args = ddp.make_parser()[0].parse_args()
        parts = {name: getattr(models, part) for name, part in case.items()}
        with contextlib.redirect_stdout(None), replaced(**parts):
            result = run(args)
        if rank == 0:
            print(json.dumps(result), flush=True)
    STORE.clear()
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    world_size, cases = int(sys.argv[1]), json.loads(sys.argv[2])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(worker, (world_size, store.port, cases), world_size)
