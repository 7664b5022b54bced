"""Measure how fast torchrun_ddp.py trains, next to others that do the same job.

    pip install -r tests/requirements-benchmark.txt && python tests/benchmark.py

All train the same model on the same data, with DDP, in the same processes, with one
thread each, and take turns: an epoch of one, an epoch of the next. What is told is the
median of the samples per second, and ratios of what one run measured; the absolute
figures belong to the machine. The contenders:

  ours        train_loop() of torchrun_ddp.py, imported, with all it takes along
  stripped    the same without metrics, progress, accumulation, autocast and saves
  limit       what can be had: no DataLoader, index_select, fused Adam, DDP
  accelerate  Hugging Face Accelerate, as its documentation writes a loop
  fabric      Lightning Fabric, as its documentation writes a loop
  tutorial    as PyTorch's DDP tutorials write it: single samples, default collation
"""

import argparse
import contextlib
import inspect
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torchrun_ddp

PEERS = ["accelerate", "fabric", "tutorial"]
SETTINGS = [  # samples, features, batch size
    (32768, 100, 64),
    (131072, 100, 1024),
    (32768, 1024, 1024),
]
# In a function, and with this import: what leave_group() says holds for it as well.
BARE = """
import torch, torch.distributed as dist, torch.distributed.nn
from torch.nn.parallel import DistributedDataParallel
def step():
    model = DistributedDataParallel(torch.nn.Linear(100, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(64, 100)).sum().backward()
    optimizer.step()
dist.init_process_group("gloo")
step()
dist.destroy_process_group()
"""


class Samples(Dataset):
    """MyDataset without its read of a whole batch: what an ordinary dataset is."""

    def __init__(self, dataset):
        self.inputs, self.labels = dataset.inputs, dataset.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.inputs[index], self.labels[index]


def strip(train_loop):
    """Return train_loop without what a bare loop would not have.

    It is made from the real one's source, so that it is the same in all else.
    """
    source = inspect.getsource(train_loop)

    def cut(first, last, instead=""):
        nonlocal source
        start = source.index(first)
        end = source.index(last, start)
        source = source[:start] + instead + source[end:]

    cut(
        "            # A group of batches",
        "            seen += len(labels)\n",
        "            loss_function(model(inputs), labels).backward()\n"
        "            optimizer.step()\n"
        "            optimizer.zero_grad()\n",
    )
    cut("            seen += len(labels)\n", "        # DDP 7")
    cut(
        "        # DDP 7", "    return clock", "        seen = loss_sum = correct = 1\n"
    )
    names = dict(vars(torchrun_ddp))
    exec(compile(source, "stripped", "exec"), names)  # noqa: S102
    return names["train_loop"]


def ours(
    dataset,
    args,
    loop=torchrun_ddp.train_loop,
    make_optimizer=torchrun_ddp.make_optimizer,
    snapshot_path=None,
):
    device = torch.device("cpu")
    model = torchrun_ddp.MyModel(args.input_size)
    optimizer = make_optimizer(model, 0.01)
    model = DistributedDataParallel(model)
    sampler = torchrun_ddp.ResumingSampler(dataset, 0, 0, 0)
    loader = torchrun_ddp.make_loader(dataset, sampler, args.batch_size, 0, device)
    flags = {"grad_accum_steps": 1, "amp": False, "seed": 0, "learning_rate": 0.01}
    flags.update(save_every=0, snapshot_path=snapshot_path)
    args = argparse.Namespace(**vars(args), **flags)
    save = None
    if snapshot_path and dist.get_rank() == 0:
        save = torchrun_ddp.make_save(args, model, optimizer, sampler)

    def epoch(number):
        args.epochs = number + 1
        loop(model, loader, optimizer, device, args, number, save)

    return epoch


def stripped(dataset, args):
    return ours(dataset, args, strip(torchrun_ddp.train_loop))


def saving(dataset, args):
    return ours(dataset, args, snapshot_path=args.folder + "/snapshot.pt")


# Ours without one of the choices that make it fast, each.


class FromList(torchrun_ddp.MyDataset):
    """MyDataset that leaves the list of indices to torch.tensor()."""

    def __init__(self, dataset):
        self.inputs, self.labels = dataset.inputs, dataset.labels

    def __getitems__(self, indices):
        rows = torch.tensor(indices)
        return self.inputs.index_select(0, rows), self.labels.index_select(0, rows)


def without_getitems(dataset, args):
    return ours(Samples(dataset), args)


def without_array(dataset, args):
    return ours(FromList(dataset), args)


def without_fused(dataset, args):
    def adam(model, learning_rate):
        return torch.optim.Adam(model.parameters(), lr=learning_rate)

    return ours(dataset, args, make_optimizer=adam)


def with_item(dataset, args):
    source = inspect.getsource(torchrun_ddp.train_loop)
    line = "            loss_sum.add_(loss.detach(), alpha=len(labels))\n"
    assert source.count(line) == 1
    source = source.replace(line, "            loss_sum += loss.item() * len(labels)\n")
    names = dict(vars(torchrun_ddp))
    exec(compile(source, "with item", "exec"), names)  # noqa: S102
    return ours(dataset, args, names["train_loop"])


def limit(dataset, args):
    model = DistributedDataParallel(torchrun_ddp.MyModel(args.input_size))
    optimizer = torchrun_ddp.make_optimizer(model, 0.01)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def epoch(number):
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(dataset), generator=generator)[rank::world_size]
        for indices in order.split(args.batch_size):
            inputs = dataset.inputs.index_select(0, indices)
            labels = dataset.labels.index_select(0, indices)
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def accelerate(dataset, args):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torchrun_ddp.MyModel(args.input_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = DataLoader(Samples(dataset), batch_size=args.batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch(_number):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()

    return epoch


def fabric(dataset, args):
    from lightning_fabric import Fabric

    lightning = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    lightning.launch()
    model = torchrun_ddp.MyModel(args.input_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer = lightning.setup(model, optimizer)
    loader = DataLoader(Samples(dataset), batch_size=args.batch_size, shuffle=True)
    loader = lightning.setup_dataloaders(loader)

    def epoch(_number):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            lightning.backward(loss)
            optimizer.step()

    return epoch


def tutorial(dataset, args):
    model = DistributedDataParallel(torchrun_ddp.MyModel(args.input_size))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    dataset = Samples(dataset)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=args.batch_size, sampler=sampler)

    def epoch(number):
        sampler.set_epoch(number)
        for inputs, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    return epoch


def all_reduce(_dataset, args):
    """Nothing but what a step cannot do without: 1000 times the gradients' exchange."""
    gradients = torch.zeros(2 * args.input_size + 2)

    def epoch(_number):
        for _ in range(1000):
            dist.all_reduce(gradients)

    return epoch


def race(args):
    """Be one rank: let the contenders take turns, and write down their seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    dataset = torchrun_ddp.MyDataset(args.dataset_length, args.input_size)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        epochs = {name: globals()[name](dataset, args) for name in args.contenders}
        seconds = {name: [] for name in epochs}
        for number in range(args.repeats + 1):
            # Turn about, lest one always runs after the same other.
            for name in list(epochs)[:: 1 if number % 2 else -1]:
                dist.barrier()
                start = time.perf_counter()
                epochs[name](number)
                dist.barrier()
                if number > 0:  # the first is to warm up
                    seconds[name].append(time.perf_counter() - start)
    if dist.get_rank() == 0:
        Path(args.folder, "seconds.json").write_text(json.dumps(seconds))
    del epochs
    torchrun_ddp.leave_group()


def torchrun(world_size, *command):
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + [f"--nproc_per_node={world_size}", *map(str, command)],
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.DEVNULL,
        check=True,
    )


def measure(setting, world_size, contenders, repeats):
    """Return the seconds per epoch that each contender took, time after time."""
    with tempfile.TemporaryDirectory() as folder:
        names = ["dataset_length", "input_size", "batch_size"]
        job = dict(zip(names, setting), contenders=contenders, repeats=repeats)
        torchrun(world_size, __file__, "--race", json.dumps(dict(job, folder=folder)))
        return json.loads(Path(folder, "seconds.json").read_text())


def record(job):
    """Run a script as it is, and note when its first step ends, and its memory."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def note(*_):
        if not times:
            times.append(time.time() - job["start"])

    times = []
    register_optimizer_step_post_hook(note)
    sys.argv = job["command"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    runpy.run_path(sys.argv[0], run_name="__main__")
    if os.environ["RANK"] == "0":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        Path(job["file"]).write_text(json.dumps({"seconds": times[0], "bytes": peak}))


def observe(world_size, *command):
    """Run a script under torchrun; return what `record` notes of rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        job = {"command": command, "file": folder + "/record", "start": time.time()}
        torchrun(world_size, __file__, "--record", json.dumps(job))
        return json.loads(Path(folder, "record").read_text())


def median_speed(result):
    """Return the median samples per second of each contender, over all processes."""
    samples = result["setting"][0]
    return {k: samples / statistics.median(v) for k, v in result["seconds"].items()}


def ratio(result, other):
    """Return our speed over another's; of a turn each, as machines change their mind."""
    pairs = zip(result["seconds"][other], result["seconds"]["ours"])
    return statistics.median(theirs / ours for theirs, ours in pairs)


def print_speed(results):
    names = ["ours", "stripped", "limit", *PEERS]
    print("Samples per second of all processes, medians; +- half of the middle half")
    print("world  samples x features, batch" + "".join(f"{n:>12}" for n in names))
    for result in results:
        length, size, batch = result["setting"]
        print(
            f"{result['world_size']:5}  {f'{length:,} x {size:,}, {batch:,}':>24}",
            end="",
        )
        for name in names:
            first, middle, last = statistics.quantiles(result["seconds"][name], n=4)
            around = (last - first) / 2 / middle
            print(f"{median_speed(result)[name]:11,.0f} {around:3.0%}", end="")
        print()
    print("\nRatios of the samples per second, medians over the epochs of each turn")
    for result in results:
        best = max(PEERS, key=median_speed(result).get)
        length, size, batch = result["setting"]
        print(
            f"{result['world_size']:5}  {f'{length:,} x {size:,}, {batch:,}':>24}"
            f"  ours / {best} (the best peer) {ratio(result, best):.2f}"
            f"  / limit {ratio(result, 'limit'):.2f}"
            f"  / stripped {ratio(result, 'stripped'):.2f}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag, kind, default, metavar, help):
        help += " (default: %(default)s)"
        parser.add_argument(
            flag, type=kind, default=default, metavar=metavar, help=help
        )

    add("--repeats", int, 15, "N", "epochs to time of each contender")
    add("--starts", int, 5, "N", "starts to time of each script")
    add("--json", Path, None, "FILE", "write all that was measured to FILE")
    parser.add_argument("--race", help=argparse.SUPPRESS)  # be a rank
    parser.add_argument("--record", help=argparse.SUPPRESS)  # be a rank
    args = parser.parse_args()
    if args.race:
        return race(argparse.Namespace(**json.loads(args.race)))
    if args.record:
        return record(json.loads(args.record))

    figures = {"torch": torch.__version__, "cores": os.cpu_count()}
    print(
        f"PyTorch {torch.__version__}, {os.cpu_count()} cores, a thread per process\n"
    )

    contenders = ["ours", "stripped", "limit", *PEERS]
    figures["speed"] = [
        {
            "setting": setting,
            "world_size": world_size,
            "seconds": measure(setting, world_size, contenders, args.repeats),
        }
        for setting in SETTINGS
        for world_size in (1, 2)
    ]
    print_speed(figures["speed"])

    seconds = measure(SETTINGS[0], 2, ["all_reduce"], args.repeats)["all_reduce"]
    figures["all_reduce"] = seconds
    first, middle, last = statistics.quantiles(seconds, n=4)
    print(
        f"\nAn all-reduce of 808 bytes between two processes: {middle:.2f} ms, in half"
        f" of the thousands {first:.2f} to {last:.2f} ms"
    )

    one, two = (median_speed(result) for result in figures["speed"][-2:])
    print(
        f"Samples per second of two processes over one's, {SETTINGS[-1]}:"
        f" ours {two['ours'] / one['ours']:.2f}, limit {two['limit'] / one['limit']:.2f}"
    )

    figures["choices"] = {}
    choices = ["without_getitems", "without_array", "without_fused", "with_item"]
    # In one process: between two, the noise of synchronising drowns small differences.
    print("\nWhat a choice buys: our speed over ours without it, world size 1")
    for setting in SETTINGS[:2]:
        seconds = measure(setting, 1, ["ours", *choices], args.repeats)
        figures["choices"][str(setting)] = seconds
        for name in choices:
            print(f"  {setting}  {name:16} {ratio({'seconds': seconds}, name):.2f}")

    seconds = measure(SETTINGS[-1], 1, ["ours", "saving"], args.repeats)
    figures["saving"] = seconds
    pairs = zip(seconds["saving"], seconds["ours"])
    cost = statistics.median(saving - without for saving, without in pairs)
    print(f"A snapshot after each epoch, of 2,050 parameters: {cost * 1000:.1f} ms")

    figures["growth"] = {}
    for world_size in (1, 2, 4):
        seconds = measure(SETTINGS[0], world_size, ["ours"], args.repeats)["ours"]
        steps = SETTINGS[0][0] / SETTINGS[0][2] / world_size
        step = statistics.median(seconds) / steps * 1000
        figures["growth"][world_size] = step
        print(f"A step of {world_size} processes, batch size 64 each: {step:.2f} ms")

    script = str(ROOT / "torchrun_ddp.py")
    with tempfile.TemporaryDirectory() as folder:
        bare = folder + "/bare.py"
        Path(bare).write_text(BARE)
        starts = {"ours": [], "bare": []}
        for _ in range(args.starts):
            starts["ours"].append(observe(2, script)["seconds"])
            starts["bare"].append(observe(2, bare)["seconds"])
        figures["first_step_seconds"] = starts
        ours, bare_start = (statistics.median(starts[k]) for k in ("ours", "bare"))
        print(
            f"\nFrom the command to the first step: {ours:.2f} s, a bare script"
            f" {bare_start:.2f} s; ratio {ours / bare_start:.2f}"
        )
        base = observe(2, bare)["bytes"]
    figures["memory"] = {"bare": base}
    for length in (1000, 250_000, 1_000_000):
        size = length * (100 * 4 + 8)
        flags = ["--dataset_length", length, "--batch_size", 1024, "--epochs", 1]
        peak = observe(2, script, *map(str, flags))["bytes"]
        figures["memory"][size] = peak
        print(
            f"Peak memory of a process, dataset {size / 2**20:.0f} MiB: {peak / 2**20:.0f}"
            f" MiB; dataset and bare script: {(size + base) / 2**20:.0f} MiB, ratio"
            f" {peak / (size + base):.2f}"
        )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
