"""Measure how fast torchrun_ddp.py trains, next to others that do the same job.

    pip install -r tests/requirements-benchmark.txt && python tests/benchmark.py

Needs Linux. All train one model on the same data, on the CPU, with DDP, in the same
processes, with one thread each. They take turns, an epoch each, in alternating order:
ours (the Trainer of torchrun_ddp.py), Hugging Face Accelerate and Lightning Fabric (as
their documentation writes a loop), the loop of PyTorch's DDP tutorial (plain Adam), and
the limit: only index_select, DDP and fused Adam. The others compute an epoch's mean
loss and accuracy over all ranks (the peers also take turns without that), and read the
same dataset: whole batches for the linear model, single samples for the other models.
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
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.distributed.nn  # before joining a group: see guard_process in the script
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torchrun_ddp

SETTINGS = {  # model, samples (whole batches), shape of one, batch size per process
    "32768 x 100, 64": ("linear", 32768, [100], 64),
    "131072 x 100, 1024": ("linear", 131072, [100], 1024),
    "32768 x 1024, 1024": ("linear", 32768, [1024], 1024),
    "CNN, 4096, 128": ("CNN", 4096, [1, 16, 16], 128),
    "transformer, 2048, 64": ("transformer", 2048, [32], 64),
}
PEERS = ["accelerate", "fabric", "tutorial"]
WITHOUT = [peer + ", no metrics" for peer in PEERS]
CONTENDERS = ["ours", *PEERS, *WITHOUT, "limit"]
CAPTION = """PyTorch {}, {} cores, {} turns

Thousands of samples per second of all processes: medians of the turns (CNN: twice as
many). "no metrics" is the fastest peer without metrics. The last columns are ours over
the fastest peer, over "no metrics", and over the limit: medians of the ratios of turns.
Settings: samples x features, or model and samples; batch size per process.
"""
ROW = "| {:21} | {:>5}" + " | {:>10}" * 6 + " | {:>5} | {:>11} | {:>6} |"


class Samples(TensorDataset):  # whose own __getitem__ is slower
    def __getitem__(self, index):
        return self.tensors[0][index], self.tensors[1][index]


class Texts(TensorDataset):
    def __getitem__(self, index):
        return {"tokens": self.tensors[0][index], "labels": self.tensors[1][index]}


def make_dataset(kind, length, shape):
    dataset = torchrun_ddp.MyDataset(length, torch.Size(shape).numel())
    if kind == "CNN":
        return Samples(dataset.inputs.view(length, *shape), dataset.labels)
    if kind == "transformer":
        tokens = torch.randint(100, (length, *shape), generator=torch.manual_seed(0))
        return Texts(tokens, dataset.labels)
    return dataset


def make_model(kind, shape):
    torch.manual_seed(0)
    if kind == "linear":
        return torchrun_ddp.MyModel(*shape)
    if kind == "transformer":
        layer = nn.TransformerEncoderLayer(64, 4, dim_feedforward=256, batch_first=True)
        layers = [nn.Embedding(100, 64), nn.TransformerEncoder(layer, 2)]
        layers += [nn.AdaptiveAvgPool2d((1, None)), nn.Flatten()]  # mean over tokens
        return nn.Sequential(*layers, nn.Linear(64, 2))
    layers = [nn.Conv2d(1, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 3 * 3, 2))


# ours, usual_epochs and limit are generators. Advancing one trains an epoch.
def ours(dataset, model, batch_size):
    torchrun_ddp.make_datasets = lambda args: (dataset, None)
    torchrun_ddp.make_model = lambda args: model
    if isinstance(dataset, Texts):
        of_pair = torchrun_ddp.compute_loss
        torchrun_ddp.compute_loss = lambda model, batch: of_pair(model, batch.values())
        torchrun_ddp.count_items = lambda batch: len(batch["labels"])
    sys.argv = ["torchrun_ddp.py", f"--batch_size={batch_size}"]
    trainer = torchrun_ddp.Trainer(torchrun_ddp.parse_args(), torch.device("cpu"))
    while True:
        means = trainer.train_epoch()[0]
        trainer.epochs_done, trainer.batches_done = trainer.epochs_done + 1, 0
        yield means["loss"], means["accuracy"]


# A peer prepares all three. It also returns its backward, and its mean over the ranks.
def accelerate(model, loader, optimizer):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(model, loader, optimizer)
    mean_over_ranks = partial(accelerator.reduce, reduction="mean")
    return *prepared, accelerator.backward, mean_over_ranks


def fabric(model, loader, optimizer):
    from lightning_fabric import Fabric

    lightning = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    lightning.launch()
    model, optimizer = lightning.setup(model, optimizer)
    loader = lightning.setup_dataloaders(loader)
    return model, loader, optimizer, lightning.backward, lightning.all_reduce


def tutorial(model, loader, optimizer):
    def reduce(means):
        dist.all_reduce(means)
        return means / dist.get_world_size()

    model = DistributedDataParallel(model)
    return model, loader, optimizer, torch.Tensor.backward, reduce


def usual_epochs(peer, metrics, dataset, model, batch_size):
    sampler = DistributedSampler(dataset) if peer is tutorial else None
    options = {"sampler": sampler, "shuffle": sampler is None, "drop_last": True}
    loader = DataLoader(dataset, batch_size, collate_fn=torchrun_ddp.collate, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model, loader, optimizer, backward, reduce = peer(model, loader, optimizer)
    for epoch in itertools.count():
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        loss_sum, correct = torch.zeros(()), torch.zeros(())
        for batch in loader:
            inputs, labels = batch.values() if isinstance(batch, dict) else batch
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs, labels)
            backward(loss)
            optimizer.step()
            if metrics:
                loss_sum += loss.detach()  # all batches are full: all weigh the same
                correct += (outputs.argmax(dim=1) == labels).sum()
        means = torch.stack([loss_sum, correct / batch_size]) / len(loader)
        yield reduce(means).tolist() if metrics else None


def limit(dataset, model, batch_size):
    tensors = getattr(dataset, "tensors", None) or (dataset.inputs, dataset.labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    for epoch in itertools.count():
        order = torch.randperm(len(dataset), generator=torch.manual_seed(epoch))
        for rows in order[dist.get_rank() :: dist.get_world_size()].split(batch_size):
            inputs, labels = (t.index_select(0, rows) for t in tensors)
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield


# torchrun starts one of these two; what rank 0 returns is the result.
def race(setting, repeats, contenders=CONTENDERS):
    """Let the contenders take turns; return their seconds per epoch and last means."""
    dist.init_process_group("gloo")
    torch.set_flush_denormal(True)  # tiny gradients slow CPUs, for some sooner
    kind, length, shape, batch_size = setting
    dataset, trains = make_dataset(kind, length, shape), {}
    for name in contenders:
        function, _, without = name.partition(", ")
        train = globals()[function]
        if function in PEERS:
            train = partial(usual_epochs, train, not without)
        trains[name] = train(dataset, make_model(kind, shape), batch_size)
    seconds, means = {name: [] for name in contenders}, {}
    for turn in range(repeats + 1):
        for name in contenders[:: -1 if turn % 2 else 1]:
            dist.barrier()
            start = time.perf_counter()
            means[name] = next(trains[name])
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}, means  # [0] warms up


def start_up(command, launched):
    """Run a script, or ("bare") a step of limit; return seconds to step 1, peak MiB."""
    steps = []
    register_optimizer_step_post_hook(lambda *_: steps.append(time.time()))
    if command:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
    else:
        race(("linear", 128, [100], 64), 0, ["limit"])
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
    columns = ["ours", *PEERS, "no metrics", "limit"]
    head = ROW.format("setting", "procs", *columns, "/peer", "/no metrics", "/limit")
    print(head, re.sub(r"[^|]", "-", head), sep="\n")
    for name, world_size in itertools.product(SETTINGS, (1, 2)):
        setting, repeats = SETTINGS[name], args.repeats * (2 if "CNN" in name else 1)
        times, means = launch(world_size, "race", setting=setting, repeats=repeats)
        speed = {k: setting[1] / median(v) / 1000 for k, v in times.items()}
        peer, without = (max(group, key=speed.get) for group in (PEERS, WITHOUT))
        cells = [f"{speed[k]:.1f}" for k in ("ours", *PEERS, without, "limit")]
        for other in (peer, without, "limit"):
            cells.append(f"{median(map(truediv, times[other], times['ours'])):.2f}")
        print(ROW.format(name, world_size, *cells), flush=True)
        figures["races"].append([name, world_size, times, means])
    print()
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
