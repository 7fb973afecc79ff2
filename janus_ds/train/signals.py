"""Requests to stop: signals, a time limit, a launcher that has ended.

Light to import, so that a program can take over the handlers before its slow imports: a signal that
comes a second after the start must count as well.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import psutil

_NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
_ECHO_SECONDS = 3.0
"""A signal again within this time is an echo: launchers pass on what the process group got already."""
_POLL_SECONDS = 1.0
_SLURM_MARGIN = 120.0
"""Seconds before the end of a Slurm job at which a run stops by itself, a tenth of a short job's time."""

logger = logging.getLogger(__name__)


class StopSignals:
    """Remembers that this process was asked to stop, and why.

    SIGTERM (launchers, `scontrol requeue`, preemption), SIGUSR1 (Slurm's warning before the time
    limit), the time limit, the end of the launcher, and the same from another rank. The handler only
    sets a flag: saving in a handler would tear whatever it interrupts. The trainer looks at it where
    all ranks can agree. The same signal again, later than an echo could come, ends the process at
    once; checkpoints are published whole, so there is nothing to tear.
    """

    def __init__(self) -> None:
        self._reason: str | None = None
        self._begin, self._since = time.time(), time.monotonic()
        self._limits: list[tuple[Callable[[], float], float, str]] = []
        self._leaving = False
        self._tell: Callable[[str], None] | None = None
        self._writer: socket.socket | None = None

    def install(self) -> None:
        """Take over the handlers of this process."""
        for number in _NUMBERS:
            signal.signal(number, self._remember)

    def watch(self) -> None:
        """Watch for second signals and for the death of the launcher, in a thread.

        The thread sees a signal even while the main thread waits in a collective, where no handler of
        Python runs.
        """
        reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # A forked child shares the socket: a signal to the child must not be heard as one to this process.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        launchers = find_launchers(psutil.Process())
        if not launchers and _has_launcher(os.environ):
            self.ask("the launcher is gone")
        threading.Thread(
            target=self._watch, args=(reader, launchers), name="stop-signals", daemon=True
        ).start()

    def limit(self, minutes: float, environ: Mapping[str, str]) -> None:
        """Stop after `minutes` from now on, if not 0, and before the end of the Slurm job's time.

        An end before the start of this process is none: Slurm had no answer, or the answer of another job.
        """
        if minutes:
            # By a clock that nobody sets: the time of day may jump.
            self._limits.append(
                (time.monotonic, self._since + 60 * minutes, f"time limit of {minutes:g} minutes")
            )
        text = environ.get("SLURM_JOB_END_TIME", "")
        end = float(text) if text.isdigit() else 0.0
        if end > self._begin:
            margin = min(_SLURM_MARGIN, 0.1 * (end - self._begin))
            self._limits.append((time.time, end - margin, "the Slurm job's time is nearly over"))

    def tell(self, others: Callable[[str], None]) -> None:
        """From now on, pass a request of this process on to the other ranks by `others`."""
        self._tell = others

    def ask(self, reason: str) -> None:
        """Ask to stop. The first reason stays."""
        self._reason = self._reason or reason

    def hear(self, reason: str) -> None:
        """Another rank was asked to stop; it has told the others."""
        self._tell = None
        self.ask(reason)

    def leave(self) -> None:
        """All is saved. When one rank leaves, launchers signal the others, which are leaving too.

        Ignored, not handled: at its end Python takes its handlers away, and the next signal would kill.
        """
        self._leaving = True
        for number in _NUMBERS:
            if signal.getsignal(number) == self._remember:
                signal.signal(number, signal.SIG_IGN)

    @property
    def name(self) -> str | None:
        """Why this process should stop, such as the signal's name; None if it should not."""
        for clock, end, reason in self._limits:
            if clock() >= end:
                self.ask(reason)
        return self._reason

    @property
    def reason(self) -> str:
        """The same for messages, once the ranks have agreed to stop: the reason may still be on its way."""
        return self.name or "another rank"

    def asked(self) -> bool:
        """Whether this process should stop."""
        return self.name is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def _watch(self, reader: socket.socket, launchers: list[psutil.Process]) -> None:
        first: dict[int, float] = {}
        while True:
            ready, _, _ = select.select([reader], [], [], _POLL_SECONDS)
            received = set(reader.recv(64)) if ready else set()
            for number in received & set(_NUMBERS):
                since = time.monotonic() - first.setdefault(number, time.monotonic())
                if since >= _ECHO_SECONDS and not self._leaving:
                    _leave_at_once(number)
                self.ask(signal.Signals(number).name)
            if not all(map(_lives, launchers)):
                self.ask("the launcher is gone")
            reason, tell = self.name, self._tell
            if reason and tell:
                self._tell = None
                tell(reason)


def _leave_at_once(number: int) -> None:
    name = signal.Signals(number).name
    logger.warning("%s again: leaving at once; the last whole checkpoint stays as it is", name)
    for child in multiprocessing.active_children():
        # Data workers ignore SIGTERM.
        child.kill()
    os._exit(128 + number)


def find_launchers(process: psutil.Process) -> list[psutil.Process]:
    """The deepspeed or torchrun processes that started this one, from its parent upwards.

    `deepspeed` is two: the command, which dies of any signal without a word to the other, and the
    one that starts the ranks. A shell or Slurm is not among them: what outlives those is meant to.
    """
    found, parent = list[psutil.Process](), process
    with contextlib.suppress(psutil.Error):  # one of them ends just now
        while (parent := parent.parent()) is not None and _is_launcher(parent):
            found.append(parent)
    return found


def _has_launcher(environ: Mapping[str, str]) -> bool:
    """Whether a launcher has been there, by the variables that only launchers set."""
    return "TORCHELASTIC_RUN_ID" in environ or "CROSS_SIZE" in environ


def _is_launcher(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        modules = {"deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run"}
        programs = {"deepspeed", "ds", "torchrun"}
        return bool(modules & set(words)) or any(Path(word).name in programs for word in words[:3])
    return False


def _lives(process: psutil.Process) -> bool:
    """Whether it is that process still, and has not ended."""
    with contextlib.suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
