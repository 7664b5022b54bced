"""Two hosts, each a network namespace with an address of its own, joined by a cable."""

import os
import re
import shutil
import subprocess
import time

import pytest
import torch
from conftest import TORCHRUN, Run
from test_resume import LONG, assert_same_end, wait_for_step

FLAGS = f"{LONG} --save_every 7 --timeout 5"
ADDRESSES = ("10.99.0.1", "10.99.0.2")


def ip(*words):
    return subprocess.run(("ip", *words), check=False, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path):
    """Two hosts, each with a folder of its own, that share nothing but a network."""
    names = [f"ddp{os.getpid()}{letter}" for letter in "ab"]
    made = [ip("netns", "add", name) for name in names] if shutil.which("ip") else []
    if not made or any(result.returncode for result in made):
        pytest.skip("cannot make network namespaces: needs root and iproute2")
    try:
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "cable",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@pytest.fixture
def launch(hosts, folder):
    """Start torchrun on host 0 or 1; all processes end with the test."""
    runs = []

    def launch(number, how, nnodes="2", flags=FLAGS):
        place = folder / f"host {number}"
        place.mkdir(exist_ok=True)
        shutil.copy(str(folder / "torchrun_ddp.py"), str(place))
        static = [
            "--node_rank",
            str(number),
            "--master_addr",
            ADDRESSES[0],
            "--master_port",
            "29500",
        ]
        elastic = ["--rdzv_backend=c10d", f"--rdzv_endpoint={ADDRESSES[0]}:29500"]
        # torchrun finds out by itself which host has the endpoint, and the address of
        # each, where host names resolve; in these namespaces they do not.
        conf = f"--rdzv_conf=is_host={1 - number},read_timeout=15,last_call_timeout=3"
        elastic += ["--rdzv_id=1", f"--local_addr={ADDRESSES[number]}", conf]
        command = ["ip", "netns", "exec", hosts[number]] + TORCHRUN
        command += [f"--nnodes={nnodes}", "--nproc_per_node=1", "--max_restarts=3"]
        command += {"static": static, "elastic": elastic}[how]
        command += ["torchrun_ddp.py", *flags.split(), "--snapshot_path", "snapshot.pt"]
        env = {
            # Which interface Gloo uses is for each host to say, if it is not the one
            # that the host's name belongs to.
            "GLOO_SOCKET_IFNAME": "cable",
            # Without this, hosts that join a running c10d rendezvous wait in vain.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        runs.append(Run(command, place, env))
        return runs[-1]

    yield launch
    for run in runs:
        run.kill_all()


@pytest.fixture(params=["static", "elastic"])
def pair(request, launch, folder, reference):
    """Two hosts in mid-training, and how to start one again."""
    reference(LONG)  # first, or they would be done when it is
    pair = [launch(number, request.param) for number in (0, 1)]
    wait_for_step(pair[0], folder / "host 0" / "snapshot.pt")

    def again(number):
        pair[number] = launch(number, request.param)

    return request.param, pair, again


def assert_finished(pair, folder, reference):
    for run in pair:
        assert run.wait(100) == 0, run.stderr
        assert run.all_gone()
    assert_same_end(folder / "host 0" / "snapshot.pt", reference(LONG))
    assert not (folder / "host 1" / "snapshot.pt").exists()


def rank(run):
    """Return the training process of a host."""
    return next(p for p in run.processes() if p.cmdline()[2:3] == ["torchrun_ddp.py"])


@pytest.mark.timeout(300)
def test_a_worker_is_killed(pair, folder, reference):
    _, pair, _ = pair
    rank(pair[1]).kill()
    assert_finished(pair, folder, reference)
    assert "batches done; resuming" in pair[0].stdout


@pytest.mark.timeout(300)
def test_the_cable_is_cut_for_longer_than_the_timeout(hosts, pair, folder, reference):
    _, pair, _ = pair
    ip("-n", hosts[0], "link", "set", "cable", "down")
    time.sleep(8)
    ip("-n", hosts[0], "link", "set", "cable", "up")
    assert_finished(pair, folder, reference)
    assert "batches done; resuming" in pair[0].stdout
    assert "lost another rank: it died, or the network did" in pair[0].stderr


@pytest.mark.timeout(300)
def test_the_second_hosts_torchrun_is_killed_and_started_again(pair, folder, reference):
    how, pair, again = pair
    pair[1].process.kill()
    assert pair[1].all_gone()  # and the rank notices that it is an orphan
    again(1)
    if how == "static" and torch.__version__.startswith("2.0."):
        # Its ranks meet by the number of restarts, which is another on each host now.
        codes = [run.wait(100) for run in pair]
        assert 0 not in codes and all("Error" in run.stderr for run in pair)
        again(0)
        again(1)
    assert_finished(pair, folder, reference)
    assert "batches done; resuming" in pair[0].stdout


@pytest.mark.timeout(300)
def test_the_first_hosts_torchrun_is_killed(pair, folder, reference):
    """It held the store, so torchrun gives up on the other host too."""
    _, pair, again = pair
    pair[0].process.kill()
    assert pair[1].wait(90) != 0
    assert "Error" in pair[1].stderr
    assert all(run.all_gone() for run in pair)
    again(0)
    again(1)
    assert_finished(pair, folder, reference)


@pytest.mark.timeout(300)
def test_a_host_joins_a_running_training_and_leaves_it(launch, folder):
    endless = FLAGS + " --epochs 1000000"
    first = launch(0, "elastic", nnodes="1:2", flags=endless)
    wait_for_step(first, folder / "host 0" / "snapshot.pt")
    second = launch(1, "elastic", nnodes="1:2", flags=endless)
    first.wait_for("DDP training: 2 processes on cpu")
    first.wait_for("; resuming")
    second.process.kill()
    assert second.all_gone()
    end = time.monotonic() + 100
    alone = r"DDP training: 1 process.*\n.*; resuming\nepoch (.*\n)*epoch "
    while not re.search(alone, first.stdout.split("DDP training: 2 processes")[-1]):
        assert first.process.poll() is None and time.monotonic() < end, first.stdout
        time.sleep(0.1)
    starts = first.stdout.count("DDP training:")
    assert first.stdout.count("; resuming") == starts - 1
