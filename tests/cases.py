"""Run parts of the scripts in real processes, many cases in one start.

    python cases.py FILE

FILE has, in JSON, a list of pairs: a number of processes, and a list of cases. They run
one after the other. A case is a dict: "run" names one of the functions below; "flags" are the scripts'; "args" are more arguments; all else names what of
models.py takes the place of a part: {"run": "check", "MyModel": "CNN"}. Rank 0 prints a
line of JSON for each case: what the function returned. All cases share a folder, so one
can go on with what another has saved.
"""

import collections
import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import models
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import ddp
import torchrun_ddp

DEFAULTS = "--dataset_length 40 --batch_size 8 --input_size 64 --epochs 1"
CPU = torch.device("cpu")
# .item(); torch.tensor(x) and new_tensor(x); .to(device)
WAITING = ["_local_scalar_dense", "lift_fresh", "_to_copy"]
DEFINITIONS = "MyDataset MyModel make_datasets make_model compute_loss count_items"
DEFINITIONS += " COUNTS_DIFFER collate make_optimizer make_scheduler wrap_in_ddp"
DEFINITIONS = DEFINITIONS.split()
STORES = []  # of this process: the first, and one for each comparison


def compare(args):
    """Return the figures of a whole comparison, what it printed, and its result."""
    args.json = str(Path(tempfile.gettempdir(), f"{dist.get_rank()} {os.getppid()}"))
    STORES.append(dist.PrefixStore(str(len(STORES)), STORES[0]))
    with printed() as says:
        result = ddp.compare(args, CPU, STORES[-1])
    if dist.get_rank() > 0:
        return None
    figures = json.loads(Path(args.json).read_text())
    Path(args.json).unlink()
    return {**figures, "says": " ".join(says.getvalue().split()), "result": result}


def check(args):
    """Return the same, without measuring the parts of a step."""
    figures = {"ddp_step_ms": {"data": 0, "compute": 1, "sync": 0}}
    figures.update(steps_per_epoch=1, compute_ms_by_rank=[1] * args.world_size)
    assert hasattr(ddp, "measure_step")
    with replaced(measure_step=lambda *_: figures):
        return compare(args)


def train(args):
    """Return the lines that torchrun_ddp.py prints, also if it refuses to train."""
    return trained(args)[1]


def weights(args):
    """Return the weights after a training with torchrun_ddp.py, and its lines."""
    trainer, lines = trained(args)
    return [[p.flatten().tolist() for p in trainer.model.parameters()], lines]


def rates(args):
    """Return the learning rate of each step, and the lines."""
    found, train_step = [], torchrun_ddp.Trainer.train_step

    def step(trainer, *arguments):
        found.append(trainer.optimizer.param_groups[0]["lr"])
        train_step(trainer, *arguments)

    with replaced(torchrun_ddp.Trainer, train_step=step):
        return [found, train(args)]


def trained(args):
    trainer, stays = None, replaced(leave_group=lambda: None)
    with printed() as says, stays, contextlib.suppress(SystemExit):
        trainer = torchrun_ddp.Trainer(args, CPU)
        trainer.train()
    return trainer, says.getvalue().splitlines()


def interrupted(args):
    """Return the lines of a training that ends after some steps, as by a kill."""
    train_step, steps = torchrun_ddp.Trainer.train_step, itertools.count()

    def step(*arguments):
        if next(steps) == args.steps:
            sys.exit()
        train_step(*arguments)

    with replaced(torchrun_ddp.Trainer, train_step=step):
        return train(args)


def buffers(args):
    """Return rank 0's and, after a validation, all ranks' sums of the buffers."""
    trainer, _ = trained(args)
    trainer.train_epoch()  # since the last validation, they have changed
    own = float(sum(buffer.sum() for buffer in trainer.model.buffers()))
    others = torchrun_ddp.gather_from_all(own)
    trainer.validate()
    ends = torchrun_ddp.gather_from_all(
        float(sum(b.sum() for b in trainer.model.buffers()))
    )
    return [others[1], ends] if ends[0] == own else [own, []]


def killed_in_validation(args):
    with replaced(torchrun_ddp.Trainer, validate=models.killed):
        return train(args)


def other_snapshots(args):
    """Return the same where each rank has a folder of its own, with another snapshot."""
    rank = dist.get_rank()
    args.snapshot_path = f"snapshot of rank {rank}.pt"
    with printed():
        trainer = torchrun_ddp.Trainer(args, CPU)
    trainer.epochs_done = 1 + rank
    torchrun_ddp.save_snapshot(trainer, args.snapshot_path)
    return train(args)


def example(args):
    """Return what both scripts print with a file of definitions, and when one resumes."""
    args.snapshot_path = f"{Path(args.definitions).stem}.pt"
    with replaced(**{name: vars(ddp)[name] for name in DEFINITIONS}):
        with printed() as says:
            for script in (ddp, torchrun_ddp):
                script.use_definitions(args.definitions)
        lines = {"found": says.getvalue().splitlines(), "first": train(args)}
        figures = compare(args)
        args.epochs += 1
        return {**lines, "again": train(args), "compare": figures}


def waits(args):
    """Return what a step reads from tensors, or makes on the host and moves.

    On a CPU, nothing waits; but these are the operations that would, on a GPU.
    """
    seen, train_step = collections.Counter(), torchrun_ddp.Trainer.train_step

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            name, options = function.overloadpacket.__name__, options or {}
            if name != "_to_copy" or "device" in options:  # else only a new dtype
                seen[name] += 1
            return function(*arguments, **options)

    def watched(*arguments):
        with Watch():
            train_step(*arguments)

    def count(batch, count_items=torchrun_ddp.count_items):
        number = count_items(batch)  # of the CPU, which need not wait
        return float(number.numpy()) if torch.is_tensor(number) else number

    counts = replaced(count_items=count)
    with replaced(torchrun_ddp.Trainer, train_step=watched), counts:
        train(args)
    assert seen["addmm"] or seen["mm"], seen  # it has seen the model at all
    return {name: seen[name] for name in WAITING if seen[name]}


@contextlib.contextmanager
def printed():
    """Give what is printed, on either stream, while this context lasts."""
    says = io.StringIO()
    with contextlib.redirect_stdout(says), contextlib.redirect_stderr(says):
        yield says


@contextlib.contextmanager
def replaced(*places, **parts):
    """Let parts of the scripts, or of a class, be others while this context lasts."""
    before = []
    for place in places or (ddp, torchrun_ddp):
        for name in filter(vars(place).__contains__, parts):
            before.append((place, name, vars(place)[name]))
            setattr(place, name, parts[name])
    assert before or not parts, f"there is no {list(parts)}"
    try:
        yield
    finally:
        for place, name, part in before:
            setattr(place, name, part)


def worker(rank, world_size, port, cases):
    torch.set_num_threads(1)
    # As ddp.py's worker does it.
    if sys.version_info < (3, 12):
        os.register_at_fork(before=lambda: time.sleep(0.05))
    mp.set_start_method(None, force=True)
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    STORES.append(store)
    for case in cases:
        if rank == 0:  # shown if it fails
            print(case, file=sys.stderr)
        case.pop("slow", None)
        run = globals()[case.pop("run")]
        sys.argv = ["ddp.py", *DEFAULTS.split(), *case.pop("flags", "").split()]
        args = ddp.parse_args()
        more = {"cores": 2, "threads": 1, "save_every": 0, "snapshot_path": None}
        vars(args).update({**more, "world_size": world_size, **case.pop("args", {})})
        with replaced(**{name: getattr(models, part) for name, part in case.items()}):
            result = run(args)
        if rank == 0:
            print(json.dumps(result), flush=True)
    ddp.leave_group()


if __name__ == "__main__":
    for world_size, cases in json.loads(Path(sys.argv[1]).read_text()):
        options = {"is_master": True, "wait_for_workers": False}
        store = dist.TCPStore("127.0.0.1", 0, **options)
        if cases:
            mp.spawn(worker, (world_size, store.port, cases), world_size)
