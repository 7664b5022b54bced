"""Measure how fast torchrun_ddp.py trains, next to others that do the same job.

    pip install -r tests/requirements-benchmark.txt && python tests/benchmark.py

Needs Linux. All train the same model on the same data, on the CPU, with DDP, in the same
processes, with one thread each. They take turns, an epoch each, in alternating order:
ours (train_epoch, loader, sampler and optimizer of torchrun_ddp.py), Hugging Face
Accelerate and Lightning Fabric (as their documentation writes a loop), the loop of
PyTorch's DDP tutorial (plain Adam), and the limit: only index_select, DDP and fused Adam,
no DataLoader. All but the limit read the same dataset: with the linear model, whole
batches of MyDataset (__getitems__); with the CNN, single samples.
"""

import argparse
import itertools
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from operator import truediv
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.distributed.nn  # before joining a group: see DDP 9 in torchrun_ddp.py
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torchrun_ddp

SETTINGS = {  # samples, shape of one, batch size per process
    "32768 x 100, 64": (32768, [100], 64),
    "131072 x 100, 1024": (131072, [100], 1024),
    "32768 x 1024, 1024": (32768, [1024], 1024),
    "CNN, 4096, 128": (4096, [1, 16, 16], 128),
}
CONTENDERS = ["ours", "accelerate", "fabric", "tutorial", "limit"]
CAPTION = """PyTorch {}, {} cores, {} turns

Thousands of samples per second, of all processes together: medians of the turns. The last
columns are ours over the fastest of the three peers, and over the limit: medians of the
ratios of pairs of turns. Settings: samples x features (or CNN, images), batch size per
process. The CNN has twice as many turns.
"""
ROW = "| {:18} | {:>5}" + " | {:>10}" * 5 + " | {:>5} | {:>6} |"


class Samples(TensorDataset):
    """Single samples, no read of a whole batch; TensorDataset's own read is slower."""

    def __getitem__(self, index):
        return self.tensors[0][index], self.tensors[1][index]


def make_model(shape):
    torch.manual_seed(0)
    if len(shape) == 1:
        return torchrun_ddp.MyModel(shape[0])
    layers = [nn.Conv2d(1, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 3 * 3, 2))


# Each contender returns a generator that trains one epoch whenever it is advanced.
def ours(dataset, model, batch_size):
    device = torch.device("cpu")
    sampler = DistributedSampler(dataset, seed=0, drop_last=True)
    batches = BatchSampler(sampler, batch_size, drop_last=True)
    args = argparse.Namespace(precision="float32", grad_accum_steps=1, num_workers=0)
    vars(args).update(batch_size=batch_size, max_grad_norm=0.0, learning_rate=0.01)
    loader = torchrun_ddp.make_loader(dataset, batches, args, device)
    optimizer = torchrun_ddp.make_optimizer(model, args)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    training = torchrun_ddp.Training(optimizer, None, scaler)
    model = torchrun_ddp.wrap(model)
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        torchrun_ddp.train_epoch(model, loader, training, args, device)
        yield


def accelerate(dataset, model, batch_size):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = loader_of(dataset, batch_size, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    prepared = accelerator.prepare(model, loader, optimizer)
    return usual_epochs(*prepared, accelerator.backward)


def fabric(dataset, model, batch_size):
    from lightning_fabric import Fabric

    lightning = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    lightning.launch()
    loader = lightning.setup_dataloaders(loader_of(dataset, batch_size, shuffle=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, optimizer = lightning.setup(model, optimizer)
    return usual_epochs(model, loader, optimizer, lightning.backward)


def tutorial(dataset, model, batch_size):
    loader = loader_of(dataset, batch_size, sampler=DistributedSampler(dataset))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return usual_epochs(model, loader, optimizer, torch.Tensor.backward)


def loader_of(dataset, batch_size, **options):
    """Return an ordinary DataLoader, which keeps whole batches as they are."""
    collate = torchrun_ddp.collate
    return DataLoader(
        dataset, batch_size, collate_fn=collate, drop_last=True, **options
    )


def usual_epochs(model, loader, optimizer, backward):
    for epoch in itertools.count():
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for inputs, labels in loader:
            optimizer.zero_grad()
            backward(nn.functional.cross_entropy(model(inputs), labels))
            optimizer.step()
        yield


def limit(dataset, model, batch_size):
    tensors = getattr(dataset, "tensors", None) or (dataset.inputs, dataset.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for epoch in itertools.count():
        order = torch.randperm(len(dataset), generator=torch.manual_seed(epoch))
        for rows in order[dist.get_rank() :: dist.get_world_size()].split(batch_size):
            if len(rows) < batch_size:
                break  # as all others, with drop_last
            inputs, labels = (t.index_select(0, rows) for t in tensors)
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


# torchrun starts one of these two; what rank 0 returns is the result.
def race(setting, contenders, repeats):
    """Let the contenders take turns; return the seconds of the epochs of each."""
    dist.init_process_group("gloo")
    length, shape, batch_size = setting
    dataset = torchrun_ddp.MyDataset(length, torch.Size(shape).numel())
    if len(shape) > 1:
        dataset = Samples(dataset.inputs.view(length, *shape), dataset.labels)
    trains = {
        c: globals()[c](dataset, make_model(shape), batch_size) for c in contenders
    }
    seconds = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name in contenders[:: -1 if turn % 2 else 1]:
            dist.barrier()
            start = time.perf_counter()
            next(trains[name])
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}  # the first warms up


def start_up(command, launched):
    """Run a script, or ("bare") a step of `limit`; return seconds to step 1, peak MiB."""
    steps = []
    register_optimizer_step_post_hook(lambda *_: steps.append(time.time()))
    if command:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    else:
        race((128, [100], 64), ["limit"], repeats=0)
    # Not getrusage(): its peak includes that of torchrun, which started this process.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return [steps[0] - launched, int(peak.group(1)) / 1024]


def be_rank(task, file, **arguments):
    result = globals()[task](**arguments)
    if dist.is_initialized():
        torchrun_ddp.leave_group()
    if os.environ["RANK"] == "0":
        Path(file).write_text(json.dumps(result))


def launch(world_size, task, **arguments):
    """Run a task under torchrun; return its result."""
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps(dict(arguments, task=task, file=folder + "/result.json"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={world_size}", __file__, "--rank", job]
        env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        subprocess.run(command, env=env, stdout=subprocess.DEVNULL, check=True)
        return json.loads(Path(folder, "result.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=20, help="turns (default: 20)")
    parser.add_argument("--json", type=Path, help="file for all that was measured")
    parser.add_argument("--rank", help=argparse.SUPPRESS)  # be started by torchrun
    args = parser.parse_args()
    if args.rank:
        return be_rank(**json.loads(args.rank))

    figures = {"torch": torch.__version__, "cores": os.cpu_count(), "races": []}
    print(CAPTION.format(torch.__version__, os.cpu_count(), args.repeats))
    head = ROW.format("setting", "procs", *CONTENDERS, "/peer", "/limit")
    print(head, re.sub(r"[^|]", "-", head), sep="\n")
    speeds = []
    for name, world_size in itertools.product(SETTINGS, (1, 2)):
        job = {"setting": SETTINGS[name], "contenders": CONTENDERS}
        repeats = args.repeats * (2 if "CNN" in name else 1)
        times = launch(world_size, "race", repeats=repeats, **job)
        speed = {k: SETTINGS[name][0] / median(v) / 1000 for k, v in times.items()}
        cells = [f"{speed[contender]:.1f}" for contender in CONTENDERS]
        for other in (max(CONTENDERS[1:4], key=speed.get), "limit"):
            cells.append(f"{median(map(truediv, times[other], times['ours'])):.2f}")
        print(ROW.format(name, world_size, *cells), flush=True)
        figures["races"].append([name, world_size, times])
        speeds.append(speed)
    print("\nSpeed of two processes over that of one, ratios of the medians:")
    for name, one, two in zip(SETTINGS, speeds[::2], speeds[1::2]):
        print(f"- {name}:", *(f"{k} {two[k] / one[k]:.2f}" for k in ("ours", "limit")))
    commands = {"ours": [torchrun_ddp.__file__, "--epochs=1"], "bare": None}
    figures["start_up"] = {"ours": [], "bare": []}
    for name in list(commands) * max(1, args.repeats // 2):
        job = {"command": commands[name], "launched": time.time()}
        figures["start_up"][name].append(launch(2, "start_up", **job))
    for name, results in figures["start_up"].items():
        seconds, peak = map(median, zip(*results))
        print(f"{name}: first step after {seconds:.2f} s, peak memory {peak:.0f} MiB")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
