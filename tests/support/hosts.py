"""Two "hosts" on this machine: network namespaces joined by a cable that can be cut. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

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
