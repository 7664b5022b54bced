"""CUDA and NCCL, through the real scripts, on as many GPUs as there are."""

import functools
import json
import os
import re
import signal
from contextlib import suppress

import psutil
import pytest
import torch
from conftest import SCRIPTS, TORCHRUN, epoch_lines, load, same, validation_lines
from models import JOBS
from test_resume import LONG, wait_for_mid_epoch

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
pytestmark = [
    pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU"),
    pytest.mark.timeout(600),  # eight processes with CUDA take their time to start
]
# Harmless, of some versions: of cuDNN's convolutions (PyTorch 2.3.0), of autograd's
# threads (2.3 and later), of torchrun (2.0).
HARMLESS = (
    "Plan failed with a|Attempting to run cuBLAS, but there was no|master_addr is"
)

# The other tests hide the GPUs. These show what pytest itself sees, or one alone.
ALL = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS))))
ONE = ALL.split(",")[0]
SHARE = {"CUDA_VISIBLE_DEVICES": ONE, "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
CAN_SHARE = GPUS > 0 and torch.cuda.nccl.version() >= (2, 30)
needs_sharing = pytest.mark.skipif(not CAN_SHARE, reason="needs NCCL 2.30 or later")
needs_two_ranks = pytest.mark.skipif(
    GPUS < 2 and not CAN_SHARE, reason="needs two GPUs, or NCCL 2.30 or later"
)
TWO_RANKS = {"CUDA_VISIBLE_DEVICES": ALL} if GPUS > 1 else SHARE
# How processes and GPUs are put together: ranks, backend, environment.
LAYOUTS = [
    pytest.param(GPUS, "nccl", {"CUDA_VISIBLE_DEVICES": ALL}, id="a GPU each"),
    pytest.param(2, "gloo", {"CUDA_VISIBLE_DEVICES": ONE}, id="gloo shares a GPU"),
    pytest.param(2, "nccl", SHARE, id="nccl shares a GPU", marks=needs_sharing),
]
layouts = pytest.mark.parametrize("ranks, backend, env", LAYOUTS)

# At its end, a process notes on which GPUs it has a CUDA context. To ask the driver for
# its contexts makes none.
RECORD = """
import atexit, ctypes, json, os, sys
def record():
    if "torch.distributed" not in sys.modules:
        return
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    assert driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    contexts = []
    for device in range(count.value):
        flags, active = ctypes.c_uint(), ctypes.c_int()
        state = driver.cuDevicePrimaryCtxGetState
        assert state(device, ctypes.byref(flags), ctypes.byref(active)) == 0
        contexts += [device] * active.value
    with open(f"record of {os.getpid()}", "w") as file:
        json.dump(contexts, file)
atexit.register(record)
"""


@pytest.fixture
def finish(finish):
    return functools.partial(finish, timeout=300)


def assert_quiet(run):
    """Check that stderr has nothing but harmless warnings, each with a line of code."""
    lines = [line for line in run.stderr.splitlines() if not line.startswith("  ")]
    assert all(re.search(HARMLESS, line) for line in lines), run.stderr


def torchrun(ranks):
    return [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}", "torchrun_ddp.py"]


@layouts
def test_training_is_that_of_the_cpu(finish, ranks, backend, env):
    """Data, weights and shuffling come from the CPU, so the metrics are alike."""
    low = "--precision bfloat16 --grad_accum_steps 3"
    for flags in ("", low, "--num_workers 2 --batch_size 999"):
        here = finish(torchrun(ranks), f"--backend {backend} {flags}", env=env)
        assert here.stdout.startswith(f"world size {ranks} on cuda, {backend}")
        there = finish(torchrun(ranks), flags)
        close = 0.02 if "bfloat16" in flags else 0.001
        for lines in (epoch_lines, validation_lines):
            pairs = list(zip(lines(here.stdout), lines(there.stdout)))
            assert len(pairs) == 5
            for one, other in pairs:
                assert one["loss"] == pytest.approx(other["loss"], abs=close)
                assert one["accuracy"] == pytest.approx(other["accuracy"], abs=close)


@layouts
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model", ["", "ConvBiasNorm", "DropoutLSTM"])
def test_the_comparison(finish, folder, define, ranks, backend, env, precision, model):
    """With augmentation. How exact it is here, `pytest -rP` shows."""
    flags = f"--precision {precision} --world_size {ranks} --backend {backend}"
    flags += " --dataset_length 2000 --json figures.json"
    if model:
        flags += " " + define({"MyModel": model, "MyDataset": "TorchAugmented"})
    run = finish(SCRIPTS["ddp"], flags, env=env)
    assert run.stdout.startswith(f"PyTorch {torch.__version__} on cuda, {backend}")
    assert_quiet(run)
    result = json.loads((folder / "figures.json").read_text())
    print(model, flags, "difference:", result["gradient_difference"])
    assert result["same_gradients"] is True and result["same_weights"] is True
    assert sum(result["ddp_step_ms"].values()) > 0 and result["device"] != "cpu"
    assert "A single GPU may be faster" in run.stdout or ranks == 1


@layouts
@pytest.mark.parametrize("name", SCRIPTS)
def test_what_people_bring(finish, define, ranks, backend, env, name):
    """The batches of each job reach the GPU, whatever they are made of."""
    for job in JOBS.values():
        command = torchrun(ranks) if name == "torchrun" else SCRIPTS["ddp"]
        more = f" --world_size {ranks}" if name == "ddp" else ""
        flags = f"--epochs 1 --dataset_length 500 --backend {backend}{more}"
        finish(command, f"{flags} {define(job)}", env=env)


@layouts
def test_a_resume_needs_no_more_memory(finish, folder, define, ranks, backend, env):
    """A model of 100 MB, in many layers: peaks of a fresh run, and of a resumed one."""
    code = """
import atexit, os, torch
from torch import nn
class MyModel(nn.Sequential):
    def __init__(self, input_size):
        super().__init__(nn.Linear(input_size, 1024))
        for _ in range(25):
            self.append(nn.Linear(1024, 1024))
        self.append(nn.Linear(1024, 2))
def peak():
    if torch.cuda.is_initialized():
        print("peak", os.environ["RANK"], torch.cuda.max_memory_allocated(), flush=True)
atexit.register(peak)
"""
    command = torchrun(ranks)
    flags = f"--dataset_length 640 --backend {backend} --snapshot_path snapshot.pt "
    flags += define({}, code)
    peaks = []
    for epochs in (1, 2):
        run = finish(command, f"{flags} --epochs {epochs}", env=env)
        found = re.findall(r"^peak (\d+) (\d+)$", run.stdout, re.MULTILINE)
        peaks.append({rank: int(size) for rank, size in found})
    print("fresh and resumed:", peaks)
    for rank, fresh in peaks[0].items():
        assert peaks[1][rank] < 1.1 * fresh


@layouts
def test_a_killed_run_resumes(start, finish, folder, ranks, backend, env):
    """Not to the last bit, as on the CPU: CUDA does not always add up in one order."""
    flags = f"{LONG} --backend {backend} --snapshot_path"
    finish(torchrun(ranks), f"{flags} whole.pt", env=env)
    run = start(torchrun(ranks), f"{flags} killed.pt --save_every 7", env)
    wait_for_mid_epoch(run, folder / "killed.pt")
    run.kill_all()
    again = finish(torchrun(ranks), f"{flags} killed.pt --save_every 7", env=env)
    assert "resuming after" in again.stdout
    whole, killed = (load(folder / f"{name}.pt") for name in ("whole", "killed"))
    assert same(whole["settings"], killed["settings"])
    for name, tensor in whole["model"].items():
        assert torch.allclose(tensor, killed["model"][name], rtol=1e-3, atol=1e-4)
    finish(
        torchrun(ranks), f"{LONG} --epochs 21 --snapshot_path killed.pt"
    )  # on the CPU


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=needs_two_ranks)])
def two_ranks(request, start, folder):
    """Two ranks of torchrun_ddp.py in mid-training, which save after every step."""
    env = TWO_RANKS if request.param == "nccl" else {"CUDA_VISIBLE_DEVICES": ONE}
    flags = f"{LONG} --epochs 1000000 --timeout 10 --backend {request.param}"
    flags += " --snapshot_path snapshot.pt --save_every 1"
    run = start(torchrun(2), flags, env)
    wait_for_mid_epoch(run, folder / "snapshot.pt")
    return run


def test_a_killed_rank_ends_the_run(two_ranks):
    two_ranks.ranks()[1].kill()
    assert two_ranks.wait(100) == 1 and two_ranks.all_gone()


@pytest.mark.timeout(300)
def test_a_stopped_rank_ends_the_run_and_spoils_no_snapshot(two_ranks, folder):
    """With NCCL, the watchdog aborts the process, up to a minute after --timeout."""
    stopped = two_ranks.ranks()[1]
    stopped.suspend()
    two_ranks.wait_until(lambda: len(two_ranks.ranks()) < 2, 100)
    with suppress(psutil.NoSuchProcess):  # it may have been killed by now
        stopped.send_signal(signal.SIGCONT)  # or torchrun waits 30 seconds to do it
    assert two_ranks.wait(60) == 1 and two_ranks.all_gone()
    weights = load(folder / "snapshot.pt")["model"].values()
    assert all(torch.isfinite(weight).all() for weight in weights)


@pytest.mark.skipif(
    GPUS > 1 and torch.__version__ < "2.7.1",
    reason="PyTorch itself made contexts on GPU 0 (pytorch/pytorch issue 159262)",
)
@pytest.mark.parametrize("ranks", [GPUS, GPUS + 1])
def test_each_rank_has_one_context_and_its_parent_none(finish, folder, ranks):
    (folder / "sitecustomize.py").write_text(RECORD)
    env = {"CUDA_VISIBLE_DEVICES": ALL, "PYTHONPATH": str(folder)}
    ddp = [*SCRIPTS["ddp"], "--world_size", str(ranks)]
    for command in (torchrun(ranks), ddp):
        run = finish(command, "--epochs 1", env=env)
        records = {}
        for path in folder.glob("record of *"):
            records[int(path.name.split()[-1])] = json.loads(path.read_text())
            path.unlink()
        assert records.pop(run.process.pid) == []
        expected = sorted([rank % GPUS] for rank in range(ranks))
        assert sorted(records.values()) == expected


@pytest.mark.parametrize("mistake", [False, True])
def test_no_step_waits_for_the_gpu(finish, define, mistake):
    """Nothing in it synchronises; with .item(), which does, this notices it."""
    code = f"MyModel.mistake = {mistake}"
    flags = f"--backend nccl {define({'MyModel': 'SyncCheckedModel'}, code)}"
    env = {"CUDA_VISIBLE_DEVICES": ONE}
    run = finish(torchrun(1), flags, 1 if mistake else 0, env)
    assert re.search("synchronizing CUDA operation", run.stderr) or not mistake
