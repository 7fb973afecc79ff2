"""Start a function on several processes as torchrun would, and collect what each rank returns.

A worker is named "package.module:function", is called with the arguments given, and its result is
pickled. The ranks are forked by the warm starter, so that they need not import torch and DeepSpeed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.processes import in_session
from tests.support.programs import ROOT as ROOT
from tests.support.programs import program_environment
from tests.support.warm import WarmProcess, warm_starter

PATIENCE = 900.0
"""Seconds for a job: only one that hangs is to meet them, on whatever machine and beside whatever else."""
_GONE_SECONDS = 600.0


def run_ranks(worker: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Results of `worker(*arguments)` on ranks 0 .. world_size - 1, in rank order.

    Raises:
        RuntimeError: a rank failed or did not end in time; carries the output of the ranks.
    """
    with _started(worker, world_size, arguments) as (folder, ranks):
        failed = _wait(ranks)
        if failed is not None:
            logs = [f"--- rank {r}\n{_tail(folder / f'log.{r}')}" for r in range(world_size)]
            raise RuntimeError("\n".join([failed, *logs]))
        return [pickle.loads((folder / f"result.{r}").read_bytes()) for r in range(world_size)]


@contextlib.contextmanager
def _started(
    worker: Callable[..., Any], world_size: int, arguments: tuple[Any, ...]
) -> Iterator[tuple[Path, list[WarmProcess]]]:
    """The ranks, and the folder of their logs and results; they are killed at the end."""
    with tempfile.TemporaryDirectory(prefix="janus-ranks-") as name:
        folder = Path(name)
        call = f"{worker.__module__}:{worker.__name__}", arguments
        (folder / "call.pickle").write_bytes(pickle.dumps(call))
        ranks = [_start(rank, world_size, folder) for rank in range(world_size)]
        try:
            yield folder, ranks
        finally:
            for process in ranks:
                kill_session(process)


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    text: str
    """What it has printed."""
    leftovers: bool
    """Whether processes that it started were still there."""


def let_ranks_end(
    worker: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    meanwhile: Callable[[list[int]], None] = lambda pids: None,
) -> list[Ended]:
    """Run `worker(*arguments)` on ranks that are to fail, and say how each of them ended.

    Args:
        worker: what to run.
        world_size: on how many ranks.
        arguments: its arguments.
        meanwhile: called with the ranks' processes after the start.
    """
    with _started(worker, world_size, arguments) as (folder, ranks):
        meanwhile([process.pid for process in ranks])
        deadline = time.monotonic() + PATIENCE
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        end = time.monotonic() + _GONE_SECONDS
        while any(in_session(process.pid) for process in ranks) and time.monotonic() < end:
            time.sleep(0.05)
        leftovers = [bool(in_session(process.pid)) for process in ranks]
        for process in ranks:
            kill_session(process)
        return [
            Ended(process.returncode, _tail(folder / f"log.{rank}"), leftovers[rank])
            for rank, process in enumerate(ranks)
        ]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun sets for one rank, and what keeps ranks on a small CPU machine quick."""
    return program_environment(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def free_port() -> int:
    """A TCP port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_session(process: subprocess.Popen[Any] | WarmProcess) -> None:
    """Kill a process started with `start_new_session=True` and all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start(rank: int, world_size: int, folder: Path) -> WarmProcess:
    # Rank 0 listens on a port of its own choice and tells it through a file, so none can collide.
    environment = rank_environment(rank, world_size, 0) | {"JANUS_TEST_FOLDER": str(folder)}
    return warm_starter().start([__file__], folder / f"log.{rank}", environment)


def _wait(ranks: list[WarmProcess]) -> str | None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        codes = [process.poll() for process in ranks]
        if any(codes):
            time.sleep(0.3)  # lets the other ranks write what they see of the failure
            return f"exit codes of the ranks: {codes}"
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)
    return f"not finished after {PATIENCE:.0f} s"


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:] if log.exists() else "(no output)"


def _agree_on_port(folder: Path) -> None:
    file = folder / "port"
    if os.environ["RANK"] == "0":
        (folder / "port.tmp").write_text(str(free_port()))
        (folder / "port.tmp").rename(file)
    while not file.exists():
        time.sleep(0.01)
    os.environ["MASTER_PORT"] = file.read_text()


def _main() -> None:
    folder = Path(os.environ["JANUS_TEST_FOLDER"])
    _agree_on_port(folder)
    name, arguments = pickle.loads((folder / "call.pickle").read_bytes())
    module, function = name.split(":")
    result = getattr(importlib.import_module(module), function)(*arguments)
    (folder / f"result.{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main()
