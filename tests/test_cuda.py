"""CUDA and NCCL, through the real scripts, on as many GPUs as there are."""

import json
import os
import re
import signal
import time

import pytest
import torch
from conftest import DDP, TORCHRUN, edit, epoch_lines, training
from test_resume import LONG, load, wait_for_step

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS == 0, reason="needs a CUDA GPU")

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

# At its end, a process notes on which GPUs it has a CUDA context, and the most memory
# that tensors took. To ask the driver for its contexts makes none.
RECORD = """
import atexit, ctypes, json, os, sys
def record():
    torch = sys.modules.get("torch")
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
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    with open(f"record of {os.getpid()}", "w") as file:
        json.dump({"contexts": contexts, "peak": peak}, file)
atexit.register(record)
"""


def torchrun(ranks, flags=""):
    launch = ["--standalone", f"--nproc_per_node={ranks}", "torchrun_ddp.py"]
    return TORCHRUN + launch + flags.split()


def quiet(run):
    """Return whether stderr is empty but for a remark of torchrun of PyTorch 2.0."""
    return all("master_addr is" in line for line in run.stderr.splitlines())


FLAGS = ["", "--amp", "--grad_accum_steps 3", "--num_workers 2", "--batch_size 1000"]


@pytest.mark.parametrize("flags", FLAGS)
def test_nccl_with_a_gpu_for_each_rank(finish, flags):
    run = finish(torchrun(GPUS, flags), env={"CUDA_VISIBLE_DEVICES": ALL})
    assert f"DDP training: {GPUS} process" in run.stdout
    assert " on cuda (nccl), " in run.stdout and quiet(run), run.stderr
    check_against_the_cpu(finish, run, GPUS, flags)


@pytest.mark.parametrize("flags", FLAGS)
def test_gloo_with_two_ranks_on_one_gpu(finish, flags):
    run = finish(torchrun(2, flags), env={"CUDA_VISIBLE_DEVICES": ONE})
    assert " on cuda (gloo), " in run.stdout and quiet(run), run.stderr
    check_against_the_cpu(finish, run, 2, flags)


@needs_sharing
@pytest.mark.parametrize("flags", FLAGS)
def test_nccl_with_two_ranks_on_one_gpu(finish, flags):
    run = finish(torchrun(2, "--backend nccl " + flags), env=SHARE)
    assert " on cuda (nccl), " in run.stdout
    check_against_the_cpu(finish, run, 2, flags)


def check_against_the_cpu(finish, run, ranks, flags):
    """Check the epochs' metrics: data, weights and shuffling come from the CPU."""
    here = epoch_lines(run.stdout)
    there = epoch_lines(finish(torchrun(ranks, flags)).stdout)
    assert len(here) == len(there) == 5
    close = 0.02 if "--amp" in flags else 0.001
    for one, other in zip(here, there):
        assert float(one[0]) == pytest.approx(float(other[0]), abs=close)
        assert float(one[1]) == pytest.approx(float(other[1]), abs=100 * close)


@pytest.mark.parametrize(
    "flags, backend, env",
    [
        (f"--world_size {GPUS}", "nccl", {"CUDA_VISIBLE_DEVICES": ALL}),
        ("--world_size 2 1 3", "gloo", {"CUDA_VISIBLE_DEVICES": ONE}),
        ("--world_size 2 --amp", "gloo", {"CUDA_VISIBLE_DEVICES": ONE}),
        pytest.param(
            "--world_size 2 --backend nccl", "nccl", SHARE, marks=needs_sharing
        ),
    ],
)
def test_the_comparison(finish, folder, flags, backend, env):
    """As on the CPU, models are the same if they differ by less than rounding can do.

    GPUs round as finely, and a linear layer keeps to float32 here; TF32, which PyTorch
    uses for convolutions, is coarser.
    """
    run = finish(DDP + flags.split() + ["--json", "figures.json"], env=env)
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["device"] == "cuda" and figures["backend"] == backend
    assert run.stdout.startswith(f"PyTorch {torch.__version__} on cuda, backend")
    assert all(result["same_model"] for result in figures["runs"])
    assert all(sum(result["ddp_step_ms"].values()) > 0 for result in figures["runs"])


def test_a_killed_run_resumes_from_its_snapshot(start, finish, folder):
    """Not to the last bit, as on the CPU: CUDA does not always add up in one order."""
    env = {"CUDA_VISIBLE_DEVICES": ALL}
    finish(torchrun(GPUS, LONG + " --snapshot_path whole.pt"), env=env)
    command = torchrun(GPUS, LONG + " --save_every 7 --snapshot_path killed.pt")
    run = start(command, env)
    wait_for_step(run, folder / "killed.pt")
    run.kill_all()
    assert "; resuming" in finish(command, env=env).stdout
    whole, killed = (load(folder / f"{name}.pt") for name in ("whole", "killed"))
    assert (whole["epoch"], whole["step"]) == (killed["epoch"], killed["step"])
    for name, tensor in whole["model"].items():
        assert torch.allclose(tensor, killed["model"][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("command", [DDP, torchrun(GPUS + 1)], ids=["ddp", "torchrun"])
def test_nccl_with_more_ranks_than_gpus_is_refused_in_a_line(finish, command):
    flags = ["--backend", "nccl"]
    flags += ["--world_size", str(GPUS + 1)] if command == DDP else []
    env = {"CUDA_VISIBLE_DEVICES": ALL, "NCCL_MULTI_RANK_GPU_ENABLE": "0"}
    run = finish(command + flags, 2 if command == DDP else 1, env)
    line = f"nccl needs a GPU for each of the {GPUS + 1} processes here, and there are"
    assert run.stderr.count(f"{line} {GPUS}; use --backend gloo") == 1
    assert run.stdout == "" and (command != DDP or run.stderr.count("\n") == 1)


@pytest.mark.parametrize("command", [DDP, torchrun(2)], ids=["ddp", "torchrun"])
def test_hidden_gpus_are_not_used(finish, command):
    run = finish(command + ["--epochs", "1"], env={"CUDA_VISIBLE_DEVICES": ""})
    assert "cuda" not in run.stdout and "gloo" in run.stdout


@pytest.fixture(params=["gloo", pytest.param("nccl", marks=needs_two_ranks)])
def two_ranks(request, start, command):
    """Two ranks in mid-training, for ever: on a GPU each, if there are two for NCCL."""
    env = TWO_RANKS if request.param == "nccl" else {"CUDA_VISIBLE_DEVICES": ONE}
    flags = f"--backend {request.param} --epochs 1000000 --timeout 10".split()
    flags += ["--world_size", "2"] if command == DDP else []
    run = start(command + flags, env)
    training(run, command)
    return run


def test_a_killed_rank_ends_the_run(two_ranks):
    two_ranks.ranks()[1].kill()
    assert two_ranks.wait(60) == 1
    assert two_ranks.all_gone()


def test_a_stopped_rank_is_noticed(two_ranks):
    stopped = two_ranks.ranks()[1]
    stopped.suspend()
    end = time.monotonic() + 90  # NCCL's watchdog takes its time to end the process
    while len(two_ranks.ranks()) == 2:
        assert time.monotonic() < end, "nobody noticed"
        time.sleep(0.1)
    stopped.send_signal(signal.SIGCONT)  # or torchrun waits 30 seconds to kill it
    assert two_ranks.wait(60) == 1
    assert two_ranks.all_gone()


@pytest.mark.parametrize("ranks", [GPUS, GPUS + 1])
def test_each_rank_has_one_context_and_its_parent_none(finish, folder, ranks):
    (folder / "sitecustomize.py").write_text(RECORD)
    env = {"CUDA_VISIBLE_DEVICES": ALL, "PYTHONPATH": str(folder)}
    for command in (torchrun(ranks), DDP + ["--world_size", str(ranks)]):
        run = finish(command + ["--epochs", "1"], env=env)
        records = {
            int(path.name.split()[-1]): json.loads(path.read_text())
            for path in folder.glob("record of *")
        }
        parent = records.pop(run.process.pid)
        assert parent["contexts"] == []
        owned = sorted(record["contexts"] for record in records.values())
        expected = [[rank % GPUS] for rank in range(ranks)]
        if command[: len(DDP)] == DDP:
            expected.append([0])  # normal training
        assert owned == sorted(expected)
        for path in folder.glob("record of *"):
            path.unlink()


def test_the_dataset_stays_in_host_memory(finish, folder):
    (folder / "sitecustomize.py").write_text(RECORD)
    env = {"CUDA_VISIBLE_DEVICES": ONE, "PYTHONPATH": str(folder)}
    flags = "--epochs 1 --dataset_length 65536 --input_size 1024 --batch_size 1024"
    finish(torchrun(1, flags), env=env)
    records = [json.loads(path.read_text()) for path in folder.glob("record of *")]
    peak = max(record["peak"] for record in records)
    print(f"peak GPU memory of tensors: {peak / 2**20:.1f} MiB; dataset: 256 MiB")
    assert 0 < peak < 32 * 2**20


@pytest.mark.parametrize("mistake", ["", "            loss.item()\n"])
def test_no_step_waits_for_the_gpu(finish, folder, mistake):
    """Nothing in it synchronises; with .item(), which does, this notices it."""
    step = "            seen += len(labels)\n"
    epoch_end = "        # DDP 7: sum over"
    # DDP has arrangements to make in the first two steps.
    forbid = "            torch.cuda.set_sync_debug_mode('error' if step > 2 else 0)\n"
    allow = "        torch.cuda.set_sync_debug_mode(0)\n"
    script = folder / "torchrun_ddp.py"
    edit(script, (step, forbid + mistake + step), (epoch_end, allow + epoch_end))
    command = torchrun(1, "--backend nccl --batch_size 64")
    run = finish(command, 1 if mistake else 0, {"CUDA_VISIBLE_DEVICES": ONE})
    assert re.search("synchronizing CUDA operation", run.stderr) or not mistake
