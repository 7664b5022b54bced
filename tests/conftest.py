"""How the tests start the real scripts, and make sure that nothing is left of them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = TORCHRUN + ["--standalone", "--nproc_per_node=2", "torchrun_ddp.py"]
DDP = [sys.executable, "ddp.py"]
# A pytest that was started in the background is deaf to Ctrl-C, and so are its children.
signal.signal(signal.SIGINT, signal.default_int_handler)

SETTINGS = ("MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "TORCHELASTIC_")


def pytest_addoption(parser):
    parser.addoption(
        "--clean-exits",
        type=int,
        default=0,
        metavar="N",
        help="run each script N times in a row and count the clean exits",
    )
    parser.addoption(
        "--random-kills",
        type=int,
        default=4,
        metavar="N",
        help="kill torchrun_ddp.py N times at random moments (default: 4)",
    )


class Run:
    """One command that runs in a folder of its own; `kill_all` leaves nothing of it.

    Every process it starts inherits a mark in its environment, by which `processes`
    finds it, whatever has become of its parents.
    """

    def __init__(self, command, folder, env):
        self.mark = uuid.uuid4().hex
        self.folder = folder
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(SETTINGS)}
        # torchrun prints a notice if it has to choose this; the scripts' own output is
        # what the tests look at.
        inherited.setdefault("OMP_NUM_THREADS", "1")
        inherited["CUDA_VISIBLE_DEVICES"] = ""  # unless `env` shows GPUs: test_cuda.py
        if command[:2] == DDP:
            del inherited["OMP_NUM_THREADS"]
        self.out, self.err = folder / "stdout", folder / "stderr"
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=str(folder),
                env=dict(inherited, DDP_TEST_MARK=self.mark, **(env or {})),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self):
        return self.out.read_text(errors="replace")

    @property
    def stderr(self):
        return self.err.read_text(errors="replace")

    def processes(self):
        found = []
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("DDP_TEST_MARK") == self.mark
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                pass
        return found

    def ranks(self):
        """Return the training processes, rank 0 first, without DataLoader workers."""
        others = [p for p in self.processes() if p.pid != self.process.pid]
        mine = [p for p in others if p.ppid() == self.process.pid]
        tracker = "multiprocessing.resource_tracker"
        return sorted(
            (p for p in mine if tracker not in " ".join(p.cmdline())),
            key=lambda p: p.pid,
        )

    def wait_for(self, text, timeout=60):
        """Wait until the command has printed `text`."""
        end = time.monotonic() + timeout
        while text not in self.stdout:
            assert self.process.poll() is None, self.stdout + self.stderr
            assert time.monotonic() < end, f"no {text!r} in {self.stdout + self.stderr}"
            time.sleep(0.05)

    def wait(self, timeout=100):
        """Wait for the end of the command, and return its exit code."""
        return self.process.wait(timeout)

    def all_gone(self, timeout=20):
        """Return whether all its processes end by themselves within `timeout`."""
        end = time.monotonic() + timeout
        while self.processes():
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def kill_all(self):
        while self.processes():
            for process in self.processes():
                try:
                    process.send_signal(signal.SIGKILL)
                except psutil.NoSuchProcess:
                    pass
            time.sleep(0.05)
        self.process.wait()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Return the last snapshot of an uninterrupted run with some flags; run each once."""
    known = {}

    def reference(flags):
        if flags not in known:
            folder = tmp_path_factory.mktemp("reference")
            shutil.copy(str(ROOT / "torchrun_ddp.py"), str(folder))
            save = ["--snapshot_path", "snapshot.pt"]
            run = Run([*STANDALONE, *flags.split(), *save], folder, None)
            try:
                assert run.wait() == 0, run.stderr
            finally:
                run.kill_all()
            known[flags] = torch.load(str(folder / "snapshot.pt"), weights_only=True)
        return known[flags]

    return reference


@pytest.fixture
def folder(tmp_path):
    """An empty folder with a copy of each script, and nothing else of this project."""
    for name in ("ddp.py", "torchrun_ddp.py"):
        shutil.copy(str(ROOT / name), str(tmp_path))
    return tmp_path


@pytest.fixture
def start(folder):
    """Start a command in `folder`; when the test ends, so do all its processes."""
    runs = []

    def start(command, env=None):
        runs.append(Run(command, folder, env))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_all()


@pytest.fixture
def finish(start):
    """Run a command to its end, and check that it leaves no process behind."""

    def finish(command, code=0, env=None):
        run = start(command, env)
        assert run.wait() == code, run.stdout + run.stderr
        assert run.all_gone(), f"left behind: {run.processes()}"
        return run

    return finish


def edit(path, *changes):
    """Replace each (old, new) once in a copy of a script; `old` has to be there."""
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} times in {path.name}: {old}"
        text = text.replace(old, new)
    path.write_text(text)


def epoch_lines(output):
    """Return (loss, accuracy) of every epoch line, as printed."""
    return re.findall(
        r"^epoch \d+/\d+  loss (\S+)  accuracy (\S+)%", output, re.MULTILINE
    )


def training(run, where):
    """Wait until `run` is in mid-training: in DDP training, if it is ddp.py."""
    if where == DDP:
        run.wait_for("DDP training:")
        seen = run.stdout.count("\nepoch")
        end = time.monotonic() + 60
        while run.stdout.count("\nepoch") < seen + 3:
            assert run.process.poll() is None and time.monotonic() < end, run.stderr
            time.sleep(0.05)
    else:
        run.wait_for("epoch 3/")


@pytest.fixture(params=[DDP, STANDALONE], ids=["ddp", "torchrun"])
def command(request, folder):
    """Either script's command, to be run with epochs without end."""
    # Normal training, which comes first in ddp.py, would never end with so many.
    call = "run(world_size, False, args, store, folder)"
    short = call.replace("args", "argparse.Namespace(**dict(vars(args), epochs=1))")
    edit(folder / "ddp.py", (call, short))
    return request.param
