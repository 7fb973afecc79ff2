"""Starts of the training program without its imports: a process that has made them forks one child a start.

A start of the program spends ten of its eleven seconds on importing torch and DeepSpeed. A child of
the process here runs the same `main` of the same script in a session of its own: a real process
that can be killed and signalled, and that shares nothing with the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.programs import ROOT, program_environment

_HEAVY = (
    "torch",
    "deepspeed",
    "deepspeed.runtime.engine",
    "torch.utils.tensorboard.writer",
    "torch.utils.tensorboard.summary",
    "tensorboard.compat.proto.event_pb2",
    "janus_ds.train.build_run",
    "janus_ds.cli.train",
    # What DeepSpeed and torch import on the way to the first step.
    "deepspeed.module_inject.auto_ep_config",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "torch.utils.cpp_extension",
    "matplotlib.backends.backend_agg",
)


class WarmProcess:
    """One start; as much of `subprocess.Popen` as tests use."""

    def __init__(self, starter: WarmStarter, pid: int) -> None:
        self._starter, self.pid, self.returncode = starter, pid, None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._starter.ask({"poll": self.pid})["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class WarmStarter:
    """The process that forks; see :func:`warm_starter`."""

    def __init__(self) -> None:
        # SIGABRT shows where a process stands.
        environment = program_environment(PYTHONFAULTHANDLER="1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.warm"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def close(self) -> None:
        """End it, and kill all that it has started."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait()

    def start(self, words: Sequence[str], log: Path, environment: Mapping[str, str] = {}) -> WarmProcess:
        """Run a script with arguments, its output appended to `log`."""
        order = {"start": list(words), "log": str(log), "environment": dict(environment)}
        return WarmProcess(self, self.ask(order)["pid"])

    def finish(self, starts: Sequence[tuple[Sequence[str], Path]], patience: float = 900.0) -> list[int]:
        """Run scripts to their ends, two at a time; returns their exit codes.

        Args:
            starts: script with arguments, and the file for its output.
            patience: seconds for each.
        """
        running: list[WarmProcess] = []
        for number, (words, log) in enumerate(starts):
            if number >= 2:
                running[number - 2].wait(patience)
            running.append(self.start(words, log))
        return [process.wait(patience) for process in running]

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """One order, one answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the warm starter has ended"
        found: dict[str, Any] = json.loads(answer)
        return found


@functools.cache
def warm_starter() -> WarmStarter:
    """The one of this process, started when first asked for; it ends with this process."""
    starter = WarmStarter()
    atexit.register(starter.close)
    return starter


def _fork(order: dict[str, Any]) -> int:
    ready, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        os.read(ready, 1)  # until the child has a session, so that it can be killed as one
        os.close(ready)
        return pid
    os.setsid()
    os.close(ready)
    os.close(tell)
    code = 1
    try:
        code = _run(order)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _run(order: dict[str, Any]) -> int:
    """The script as `python SCRIPT ARGUMENTS` would run it, exit handlers included."""
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.update(order["environment"])
    sys.argv = order["start"]
    code: Any = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    atexit._run_exitfuncs()
    return int(code or 0)


def _poll(pid: int, ended: dict[int, int]) -> int | None:
    if pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found == 0:
            return None
        ended[pid] = os.waitstatus_to_exitcode(status)
    return ended[pid]


def _serve() -> None:
    import importlib

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in _HEAVY:
        importlib.import_module(name)
    started: list[int] = []
    ended: dict[int, int] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if "start" in order:
            started.append(_fork(order))
            answer: dict[str, Any] = {"pid": started[-1]}
        else:
            answer = {"code": _poll(order["poll"], ended)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    for pid in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
