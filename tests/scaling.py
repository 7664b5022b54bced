"""Measure how torchrun_ddp.py scales on networks of given speed, up to eight machines.

    python tests/scaling.py

Needs Linux, root, ip and tc (iproute2), and ten minutes. A machine is a network namespace
with one rank, started by torchrun. A bridge joins them. Token bucket filters (tbf) at
both ends of a cable limit what its machine sends and receives. Nothing is left at the end.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

from torch import __version__, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torchrun_ddp

STEPS, EPOCHS = 4, 4  # optimizer steps per epoch; epochs measured on each link
LINKS = [1000, 200, 50]  # Mbit/s
FRAME = 1514 / 1448  # bytes of an Ethernet frame / bytes of gradients in it
CAPTION = f"""PyTorch {__version__}, {os.cpu_count()} cores. Step in ms: measured / predicted. Predicted is
the step of one machine (times machines / cores, if there are fewer cores) and, for N
machines, bytes * 2 (N-1) / N / bandwidth * {FRAME:.3f} (headers). Left out ("-") if the step
without a limit takes more than half of it: the cores are measured then, not the link.
"""
signals = []  # received: measure() then ends the script


def ten_layers(size):
    layers = [(nn.Linear(size, size, bias=False), nn.ReLU()) for _ in range(10)]
    return nn.Sequential(*sum(layers, ()))


def compressing(model, **options):
    model = DistributedDataParallel(model, **options)
    model.register_comm_hook(None, fp16_compress_hook)
    return model


VARIANTS = {  # what a run gets in the place of MyModel and DistributedDataParallel
    "float16": (torchrun_ddp.MyModel, compressing),
    "25 MB": (ten_layers, DistributedDataParallel),
    "2 MB": (ten_layers, partial(DistributedDataParallel, bucket_cap_mb=2)),
}


def call(command, check=True):
    """Run ip or tc, in a session of its own: there, Ctrl-C does not reach it."""
    options = {"capture_output": True, "text": True, "start_new_session": True}
    result = subprocess.run(command.split(), check=False, **options)
    if check and result.returncode:
        sys.exit(f"{command}: {result.stderr.strip()}")
    return result.stdout


@contextmanager
def network(count):
    """Make machines; yield both ends of each cable, and a list of processes to kill."""
    bridge, *names = [f"scaling{os.getpid()}-{n}" for n in range(count + 1)]
    ends, processes = [], []
    try:
        call(f"ip netns add {bridge}")
        call(f"ip -n {bridge} link add bridge up type bridge")
        for n, name in enumerate(names, start=1):
            call(f"ip netns add {name}")
            call(f"ip -n {name} link set lo up")
            call(f"ip -n {name} link add cable type veth peer cable{n} netns {bridge}")
            call(f"ip -n {name} addr add 10.99.0.{n}/24 dev cable")
            call(f"ip -n {name} link set cable up")
            call(f"ip -n {bridge} link set cable{n} up master bridge")
            ends += [(name, "cable"), (bridge, f"cable{n}")]
        yield ends, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
        for name in [*names, bridge]:
            while Path("/var/run/netns", name).exists():
                pids = call(f"ip netns pids {name}", check=False)
                call(f"kill -9 {pids}" if pids else f"ip netns del {name}", check=False)


def measure(machines, links, size, batch=2, accumulate=1, variant=None):
    """Train; return the seconds of a step on each link (None: without a limit)."""
    samples = machines * batch * accumulate  # of a step
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}"]
    command += ["--nproc_per_node=1", "--master_addr=10.99.0.1", "--node_rank"]
    script = [__file__, variant] if variant else [torchrun_ddp.__file__]
    flags = f"--epochs=1000000 --learning_rate=0 --dataset_length={samples * STEPS}"
    flags += f" --input_size={size} --batch_size={batch}"
    script += f"{flags} --grad_accum_steps={accumulate}".split()

    def epochs(count, wait=0):
        """Wait for so many epochs and seconds; return the rates of all epochs."""
        end = time.monotonic() + wait
        while True:
            rates = re.findall(r"(?m)^epoch .* (\S+) samples/s\n", log.read_text())
            if len(rates) >= count and time.monotonic() >= end:
                return [float(rate.replace(",", "")) for rate in rates]
            if signals:
                sys.exit(128 + signals[0])
            if any(run.poll() is not None for run in runs):
                sys.exit(f"{log.read_text()}\nA rank has ended.")
            time.sleep(0.05)

    seconds = {}
    with tempfile.TemporaryDirectory() as folder, network(machines) as (ends, runs):
        log = Path(folder, "log")
        env = dict(os.environ, GLOO_SOCKET_IFNAME="cable", OMP_NUM_THREADS="1")
        env.update(TMPDIR=folder, CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1")
        with log.open("w") as out:
            options = {"stdout": out, "stderr": out, "start_new_session": True}
            for rank, (name, _) in enumerate(ends[::2]):
                start = ["ip", "netns", "exec", name, *command, str(rank), *script]
                runs.append(subprocess.Popen(start, env=env, **options))
        epochs(1)
        for link in links:
            for name, device in ends if link else []:
                tbf = f"tbf rate {link}mbit burst 256kb latency 50ms"
                call(f"tc -n {name} qdisc replace dev {device} root {tbf}")
            first = len(epochs(0)) + 1  # the epoch in between saw both links
            seconds[link] = samples / median(epochs(first + EPOCHS, 2)[first:])
    return seconds


def row(*cells):
    print("|", " | ".join(f"{cell:>15}" for cell in cells), "|", flush=True)


def main():
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        print("scaling.py needs root, ip and tc (iproute2).", file=sys.stderr)
        sys.exit(2)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    print(CAPTION)
    row("bytes", "machines", "no limit", *[f"{link} Mbit/s" for link in LINKS])
    row(*["-" * 15] * (3 + len(LINKS)))
    for size in (125000, 1250000):
        one = measure(1, [None], size)[None]
        row(size * 8, 1, f"{one * 1000:.1f}", *["-"] * len(LINKS))
        for machines in (2, 4, 8):
            steps = measure(machines, [None, *LINKS], size)
            cells = [f"{steps[None] * 1000:.1f}"]
            for link in LINKS:
                ring = size * 8 * 2 * (machines - 1) / machines * FRAME / link / 125000
                predicted = one * max(1, machines / os.cpu_count()) + ring
                cell = f"{steps[link] * 1000:.1f} / {predicted * 1000:.1f}"
                cells.append("-" if steps[None] > predicted / 2 else cell)
            row(size * 8, machines, *cells)
    print(f"\n{size * 8} bytes, 2 machines, {link} Mbit/s: samples/s")
    row("remedy", "measured", "predicted")
    ring, base = size * 8 * FRAME / link / 125000, None
    for name, batches, share, change in [
        ("none", 1, 1, {}),
        ("accumulate 4", 4, 1, {"accumulate": 4}),
        ("batch x 4", 4, 1, {"batch": 8}),
        ("float16 hook", 1, 0.5, {"variant": "float16"}),
    ]:
        step = measure(2, [None, link], size, **change)[link]
        rates = [4 * batches / s for s in (step, batches * one + share * ring)]
        base = base or rates
        row(name, *[f"{rate:.2f} ({rate / b:.2f} x)" for rate, b in zip(rates, base)])

    size, batch = 512, 3072
    one = measure(1, [None], size, batch, 1, "25 MB")[None]
    # Further batches are not averaged: this is what two machines compute at once.
    steps = [measure(2, [None], size, batch, k, "25 MB")[None] for k in (1, 3)]
    compute = (steps[1] - steps[0]) / 2
    link = round(10 * size**2 * 4 / compute / 125000)
    ring = measure(2, [None, link], size, 1, 1, "25 MB")[link]  # little computing
    print(f"\n10 layers, {40 * size**2} bytes, 2 machines, {link} Mbit/s: ms of a step")
    row("computing", f"{compute * 1000:.0f}", "one machine", f"{one * 1000:.0f}")
    row("averaging", f"{ring * 1000:.0f}")
    row("buckets", "no limit", "step", "hidden")
    for variant in ("25 MB", "2 MB"):
        steps = measure(2, [None, link], size, batch, 1, variant)
        hidden = 1 - (steps[link] - compute) / ring
        row(variant, *[f"{s * 1000:.0f}" for s in steps.values()], f"{hidden:.0%}")


if __name__ == "__main__":
    if sys.argv[1:]:
        replaced = VARIANTS[sys.argv.pop(1)]
        torchrun_ddp.MyModel, torchrun_ddp.DistributedDataParallel = replaced
        torchrun_ddp.main()
    else:
        main()
