"""Two hosts, each a network namespace with an address of its own, joined by a cable."""

import os
import re
import shutil
import subprocess
import time

import pytest
import torch
from conftest import TORCHRUN, Run, assert_same_end
from test_resume import LONG, wait_for_mid_epoch

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.5",
    reason="2.4's ranks meet by the host's name, which these hosts cannot resolve",
)
FLAGS = f"{LONG} --save_every 7 --timeout 5"
ADDRESSES = ("10.99.0.1", "10.99.0.2")


def ip(words):
    return subprocess.run(["ip", *words.split()], check=False, capture_output=True)


@pytest.fixture
def hosts():
    """Two hosts, each with a folder of its own. Snapshots are in a folder that they share."""
    a, b = names = [f"ddp{os.getpid()}{letter}" for letter in "ab"]
    made = [ip(f"netns add {name}") for name in names] if shutil.which("ip") else []
    if not made or any(result.returncode for result in made):
        pytest.skip("cannot make network namespaces: needs root and iproute2")
    ip(f"link add cable netns {a} type veth peer cable netns {b}")
    for name, address in zip(names, ADDRESSES):
        ip(f"-n {name} addr add {address}/24 dev cable")
        ip(f"-n {name} link set cable up")
        ip(f"-n {name} link set lo up")
    yield names
    for name in names:
        ip(f"netns del {name}")


@pytest.fixture
def launch(hosts, folder):
    """Start torchrun on host 0 or 1; all processes end with the test."""
    runs = []

    def launch(number, nnodes="2", flags=FLAGS):
        place = folder / f"host {number}"
        place.mkdir(exist_ok=True)
        shutil.copy(str(folder / "torchrun_ddp.py"), str(place))
        command = f"--nnodes={nnodes} --nproc_per_node=1 --max_restarts=5"
        # torchrun finds out by itself which host has the endpoint, and the address of
        # each, where host names resolve; in these namespaces they do not.
        command += f" --rdzv_backend=c10d --rdzv_endpoint={ADDRESSES[0]}:29500"
        command += f" --rdzv_id=1 --local_addr={ADDRESSES[number]} --rdzv_conf="
        command += f"is_host={1 - number},read_timeout=15,last_call_timeout=3,keep_alive_interval=1"
        command += f" torchrun_ddp.py {flags} --snapshot_path ../snapshot.pt"
        enter = ["ip", "netns", "exec", hosts[number]]
        env = {
            "GLOO_SOCKET_IFNAME": "cable",  # these hosts' names have no address
            # A store for each restart: without, --max_restarts is refused.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        runs.append(Run([*enter, *TORCHRUN, *command.split()], place, env))
        return runs[-1]

    yield launch
    for run in runs:
        run.kill_all()


@pytest.fixture
def start_pair(launch, folder, reference):
    """Start two hosts, and wait until they train."""
    reference(LONG)  # now, or they would be done when it is

    def start_pair():
        pair = [launch(number) for number in (0, 1)]
        wait_for_mid_epoch(pair[0], folder / "snapshot.pt")
        return pair

    return start_pair


def assert_finished(pair, folder, reference):
    for run in pair:
        assert run.wait(200) == 0, run.stderr
        assert run.all_gone()
    assert_same_end(folder / "snapshot.pt", reference(LONG))


def rank(run):
    """Return the training process of a host."""
    return next(p for p in run.processes() if p.cmdline()[2:3] == ["torchrun_ddp.py"])


@pytest.mark.timeout(400)
def test_a_killed_worker_and_a_cut_cable(hosts, start_pair, folder, reference):
    """The cable is cut for longer than --timeout."""
    pair = start_pair()
    rank(pair[1]).kill()
    pair[0].wait_for("resuming after")
    ip(f"-n {hosts[0]} link set cable down")
    time.sleep(8)
    ip(f"-n {hosts[0]} link set cable up")
    assert_finished(pair, folder, reference)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_second_hosts_torchrun_is_killed(launch, start_pair, folder, reference):
    pair = start_pair()
    pair[1].process.kill()
    assert pair[1].all_gone()
    pair[1] = launch(1)
    assert_finished(pair, folder, reference)
    assert "resuming after" in pair[0].stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_first_hosts_torchrun_is_killed(launch, start_pair, folder, reference):
    """It held the store, so torchrun gives up on the other host too."""
    pair = start_pair()
    pair[0].process.kill()
    assert pair[1].wait(100) != 0
    assert all(run.all_gone() for run in pair)
    assert_finished([launch(number) for number in (0, 1)], folder, reference)


@pytest.mark.timeout(400)
def test_a_host_joins_a_running_training_and_leaves_it(launch, folder):
    endless = FLAGS + " --epochs 1000000"
    first = launch(0, nnodes="1:2", flags=endless)
    wait_for_mid_epoch(first, folder / "snapshot.pt")
    second = launch(1, nnodes="1:2", flags=endless)
    together = r"world size 2 on.*\nresuming after.*\n(.*\n)*epoch (.*\n)*"
    either = first, second
    first.wait_until(lambda: any(re.search(together, run.stdout) for run in either))
    last = first.stdout
    second.process.kill()
    assert second.all_gone()
    alone = r"world size 1 on.*\nresuming after.*\n(.*\n)*epoch "
    first.wait_until(lambda: re.search(alone, first.stdout[len(last) :]), 100)
