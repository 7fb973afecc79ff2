"""Two hosts, rehearsed on this machine: the same losses as one host with two ranks; a host that dies.

The "hosts" are network namespaces joined by a cable that can be cut; they need root. By srun: tests/slurm.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.launch import free_port
from tests.support.processes import alive, find_ranks, wait_until
from tests.support.program import PATIENCE, Program, deepspeed, figures_of, launched, reach, torchrun

pytestmark = pytest.mark.heavy

SHORT = ("train.max_steps=12", "train.save_every=5", "train.valid_every=6", "data.workers=1")
ENDLESS = ("train.max_steps=1000000", "train.save_every=1000000", "train.valid_every=0", "data.workers=1")


_DEVICE = "cable"


def missing_for_hosts() -> str | None:
    """Why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need root and `ip` (iproute2)"
    name = f"janus-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if done.returncode:
        return f"network namespaces are not allowed here: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@dataclass(frozen=True)
class Hosts:
    """Two namespaces, each with one end of the cable."""

    names: tuple[str, str]
    addresses: tuple[str, str] = ("10.77.0.1", "10.77.0.2")
    device: str = _DEVICE

    def on(self, host: int) -> list[str]:
        """What stands before a command that is to run on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def kill(self, host: int) -> None:
        """Kill every process of a host."""
        done = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True)
        for pid in done.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cut(self) -> None:
        """No packet goes from one to the other any more, and nobody is told."""
        _ip("-n", self.names[1], "link", "set", _DEVICE, "down")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Hosts 0 and 1, removed at the end."""
    hosts = Hosts((f"janus-a-{os.getpid()}", f"janus-b-{os.getpid()}"))
    with ExitStack() as stack:
        for name in hosts.names:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
        first, second = hosts.names
        _ip("-n", first, "link", "add", _DEVICE, "type", "veth", "peer", "name", _DEVICE, "netns", second)
        for name, address in zip(hosts.names, hosts.addresses, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", _DEVICE)
            _ip("-n", name, "link", "set", _DEVICE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield hosts


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def one_host(inputs: Path) -> Program:
    ranks = Program(inputs, inputs / "one-host", 2, SHORT)
    with launched(ranks, torchrun()) as (process,):
        assert process.wait(PATIENCE) == 0, ranks.said
    return ranks


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    missing = missing_for_hosts()
    if missing:
        pytest.skip(missing)
    with two_hosts() as made:
        yield made


def on_two_hosts(hosts: Hosts) -> list[list[str]]:
    """One torchrun a host, which meet on the first."""
    options = ("--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=rehearsal")
    meeting = f"--rdzv-endpoint={hosts.addresses[0]}:{free_port()}"
    # An address does not tell torchrun that the first host is the one to wait for the others.
    places = [(f"--local-addr={hosts.addresses[n]}", f"--rdzv-conf=is_host={1 - n}") for n in (0, 1)]
    return [[*hosts.on(number), *torchrun(*options, meeting, *place)] for number, place in enumerate(places)]


def test_deepspeed_with_a_hostfile_and_without_ssh(inputs: Path, one_host: Program) -> None:
    (inputs / "hostfile").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    meeting = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    hosts = ("--hostfile", str(inputs / "hostfile"), "--no_ssh")
    nodes = [deepspeed(*hosts, "--node_rank", number, *meeting) for number in ("0", "1")]
    ranks = Program(inputs, inputs / "hostfile-run", 2, SHORT)
    with launched(ranks, *nodes) as processes:
        assert [process.wait(PATIENCE) for process in processes] == [0, 0], ranks.said
    assert figures_of(ranks.run) == figures_of(one_host.run)
    assert len(figures_of(ranks.run)) == 12


def test_torchrun_on_two_hosts(inputs: Path, one_host: Program, hosts: Hosts) -> None:
    ranks = Program(inputs, inputs / "two-hosts", 2, SHORT)
    with launched(ranks, *on_two_hosts(hosts), GLOO_SOCKET_IFNAME=hosts.device) as processes:
        assert [process.wait(PATIENCE) for process in processes] == [0, 0], ranks.said
    assert figures_of(ranks.run) == figures_of(one_host.run)


@pytest.mark.parametrize("how", ["killed", "cut off"])
def test_the_death_of_a_host_is_told_by_the_other(inputs: Path, hosts: Hosts, how: str) -> None:
    """Killed: the kernel closes its connections. Cut off: nobody says anything."""
    ranks = Program(inputs, inputs / how.replace(" ", "-"), 2, ENDLESS)
    with launched(ranks, *on_two_hosts(hosts), GLOO_SOCKET_IFNAME=hosts.device) as (survivor, _):
        reach(ranks, 3)
        left, victim = (find_ranks(ranks.run)[rank] for rank in (0, 1))
        if how == "killed":
            hosts.kill(1)
        else:
            hosts.cut()
        survivors = {left, survivor.pid}
        wait_until(lambda: not survivors & set(alive(ranks.run)), PATIENCE, f"the end\n{ranks.said}")
        assert survivor.wait(PATIENCE) != 0
    assert "error: another rank was lost" in ranks.said
    assert f"where: rank 1 on {os.uname().nodename} (process {victim})" in ranks.said
