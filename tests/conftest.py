"""How the tests start the real scripts, and make sure that nothing is left of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that tests can import the scripts
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STANDALONE = [*TORCHRUN, "--standalone", "--nproc_per_node=2"]
SCRIPTS = {
    "ddp": [sys.executable, "ddp.py"],
    "torchrun": [*STANDALONE, "torchrun_ddp.py"],
}
# Processes of a pytest that runs in the background ignore Ctrl-C, unless told otherwise.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    def add(flag, default, help):
        parser.addoption(flag, type=int, default=default, metavar="N", help=help)

    add("--random-kills", 1, "kill training at N random moments (default: 1)")
    add("--clean-exits", 0, "run each script N times more, for its exit (default: 0)")
    parser.addoption("--all", action="store_true", help="also run the slow tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --all only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with --all"))
        if "results" in item.fixturenames:  # the first one waits for all cases
            item.add_marker(pytest.mark.timeout(1000))
    # While the cases run in the background, run tests that do not need them: first those
    # that mostly wait.
    items.sort(key=lambda item: not {"hosts", "training"} & {*item.fixturenames})
    items.sort(key=lambda item: "results" in item.fixturenames)


class Run:
    """A command that runs in a folder. `kill_all` leaves nothing of it.

    All its processes inherit a mark in their environment, by which they are found.
    """

    def __init__(self, command, folder, env):
        self.mark = uuid.uuid4().hex
        launcher = ("MASTER_", "RANK", "LOCAL_", "WORLD_SIZE", "TORCHELASTIC_", "OMP_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(launcher)}
        if TORCHRUN[-1] in command:
            inherited["OMP_NUM_THREADS"] = "1"  # or torchrun prints that it chose this
        inherited["CUDA_VISIBLE_DEVICES"] = ""  # unless `env` shows GPUs: test_cuda.py
        self.out, self.err = (folder / f"std{s} {self.mark}" for s in ("out", "err"))
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=str(folder),
                env={**inherited, "DDP_TEST_MARK": self.mark, **(env or {})},
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
            with suppress(psutil.Error):
                mine = process.environ().get("DDP_TEST_MARK") == self.mark
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self):
        """Return the training processes, rank 0 first, without DataLoader workers."""
        ranks, tracker = [], "multiprocessing.resource_tracker"
        for process in self.processes():
            with suppress(psutil.Error):  # it may end at any time
                is_child = process.ppid() == self.process.pid
                if is_child and tracker not in " ".join(process.cmdline()):
                    ranks.append(process)
        return sorted(ranks, key=lambda p: p.pid)

    def wait_until(self, condition, timeout=90):
        """Wait until `condition()` is true, while the command runs."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, self.stdout + self.stderr
            assert time.monotonic() < end, self.stdout + self.stderr
            time.sleep(0.02)

    def wait_for(self, text, timeout=90):
        """Wait until the command has printed `text`."""
        self.wait_until(lambda: text in self.stdout, timeout)

    def wait(self, timeout=100):
        """Wait for the end of the command, and return its exit code."""
        return self.process.wait(timeout)

    def all_gone(self, timeout=20):
        """Return whether all its processes end by themselves within `timeout`."""
        end = time.monotonic() + timeout
        while self.processes() and time.monotonic() < end:
            time.sleep(0.1)
        return not self.processes()

    def kill_all(self):
        while self.processes():
            for process in self.processes():
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()


@pytest.fixture
def folder(tmp_path):
    """A folder with a copy of each script and of models.py, and little else."""
    return copy_scripts(tmp_path)


def copy_scripts(folder):
    for path in ("ddp.py", "torchrun_ddp.py", "tests/models.py", "tests/cases.py"):
        shutil.copy(str(ROOT / path), str(folder))
    return folder


@pytest.fixture
def start(folder):
    """Start a command in `folder`; when the test ends, so do all its processes."""
    runs = []

    def start(command, flags="", env=None):
        runs.append(Run([*command, *flags.split()], folder, env))
        return runs[-1]

    yield start
    for run in runs:
        run.kill_all()


@pytest.fixture
def finish(start):
    """Run a command to its end, and check that it leaves no process behind."""

    def finish(command, flags="", code=0, env=None, timeout=100):
        run = start(command, flags, env)
        assert run.wait(timeout) == code, run.stdout + run.stderr
        assert run.all_gone(), f"left behind: {run.processes()}"
        return run

    return finish


@pytest.fixture(scope="session", autouse=True)
def running_cases(request, tmp_path_factory):
    """Start the cases of all test modules, and return them: they run one by one."""
    items = [item for item in request.session.items if "results" in item.fixturenames]
    if not items:
        yield
        return
    modules = list(dict.fromkeys(item.module for item in items))
    folder = copy_scripts(tmp_path_factory.mktemp("cases"))
    shutil.copytree(str(ROOT / "tests" / "examples"), str(folder / "examples"))
    keys, cases = [], []
    for world_size in (2, 1, 3):
        cases.append([world_size, []])
        for module in modules:
            for name, case in module.CASES.get(world_size, {}).items():
                if not case.get("slow") or request.config.getoption("--all"):
                    keys.append((module.__name__, world_size, name))
                    cases[-1][1].append(case)
    (folder / "cases.json").write_text(json.dumps(cases))
    env = {"TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}  # of examples
    run = Run([sys.executable, "cases.py", "cases.json"], folder, env)
    yield folder, keys, run
    run.kill_all()


@pytest.fixture(scope="session")
def all_results(running_cases):
    folder, keys, run = running_cases
    assert run.wait(900) == 0, run.stdout[-2000:] + run.stderr[-5000:]
    lines = run.stdout.splitlines()
    assert len(lines) == len(keys)
    results = {}
    for (module, world_size, name), line in zip(keys, lines):
        of_module = results.setdefault(module, {1: {}, 2: {}, 3: {}, "folder": folder})
        of_module[world_size][name] = json.loads(line)
    return results


@pytest.fixture
def results(request, all_results):
    """Return what the cases of a test module gave: {processes: {name: result}}.

    Its CASES, of the same form, are cases of cases.py. They run in the "folder".
    """
    return all_results[request.module.__name__]


@pytest.fixture
def define(folder):
    """Write a file of definitions; return the flag that names it.

    `job`: {"MyModel": "CNN"} takes it from models.py. `code` comes after that.
    """

    def define(job, code="", name="mine.py"):
        lines = [f"from models import {old} as {new}" for new, old in job.items()]
        (folder / name).write_text("\n".join([*lines, code, ""]))
        return f"--definitions {name}"

    return define


def load(path):
    return torch.load(str(path), map_location="cpu", weights_only=True)


def same(one, other):
    """Return whether two (nested) values are equal to the last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def assert_same_end(path, reference):
    for key in reference.keys() - {"settings", "global_batch", "snapshot_id"}:
        assert same(load(path)[key], reference[key]), f"{key} differs"


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Return the last snapshot of an undisturbed run with some flags; run each once."""
    known = {}

    def reference(flags):
        if flags not in known:
            folder = tmp_path_factory.mktemp("reference")
            shutil.copy(str(ROOT / "torchrun_ddp.py"), str(folder))
            flags_list = [*flags.split(), "--snapshot_path", "snapshot.pt"]
            run = Run([*SCRIPTS["torchrun"], *flags_list], folder, None)
            try:
                assert run.wait() == 0, run.stderr
            finally:
                run.kill_all()
            known[flags] = load(folder / "snapshot.pt")
        return known[flags]

    return reference


def epoch_lines(output):
    """Return the metrics of each epoch of torchrun_ddp.py."""
    return metrics(r"^epoch \d+/\d+  (.*  )[\d,.]+ samples/s$", output)


def validation_lines(output):
    return metrics(r"^  validation  (.*)$", output)


def both_ways(output):
    """Return the metrics and the speeds of each epoch of ddp.py: (normal, DDP)."""
    return list(
        zip(
            metrics(r"^  normal  (.* samples/s)$", output),
            metrics(r"^  DDP     (.* samples/s)$", output),
        )
    )


def metrics(pattern, output):
    """Return {name: value} of each line that fits the pattern."""
    found = []
    for text in re.findall(pattern, output, re.MULTILINE):
        values = {
            k: float(v) for k, v in re.findall(r"(\w+) (nan|[\d.]+)(?=  |$)", text)
        }
        rate = re.search(r"([\d,.]+) samples/s", text)
        if rate:
            values["rate"] = float(rate[1].replace(",", ""))
        found.append(values)
    return found
