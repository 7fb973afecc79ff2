"""The watchdog checks progress, not merely that processes are alive.

A rank that hangs (a read that never returns, a stopped process, a lost network) leaves the others in a
collective, for half an hour at best. Here every rank notes what it begins to do, and its thread tells rank 0
over the liveness connection. Where no rank at all has made progress for `train.stall_minutes`, rank 0 names
those that are behind; all write the stacks of their threads and leave, to be started again. Work that only
one rank does is progress of the run: the others may wait.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import psutil

from janus_ds.errors import STALLED_EXIT_CODE, TrainingError
from janus_ds.parallel.liveness import Liveness
from janus_ds.parallel.topology import Topology

_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "janus_ds/parallel/topology.py")


@dataclass(frozen=True)
class RankStatus:
    """What a rank is doing.

    Args:
        number: how many pieces of work it has begun; ranks do the same work in the same order.
        words: the work, such as "reading the data of step 40".
        age: seconds since it began, or since its last sign of progress.
        patience: seconds that this work may take without one.
        frame: where in the code that is, "function (file:line)".
        waits: that is in a collective, so that another rank is what it waits for.
    """

    number: int
    words: str
    age: float
    patience: float
    frame: str = ""
    waits: bool = False


@dataclass(frozen=True)
class Report:
    """The last word of a rank."""

    status: RankStatus
    heard: float
    silent: bool

    @property
    def age(self) -> float:
        """Seconds without progress, as far as is known."""
        return self.status.age + self.heard

    def __str__(self) -> str:
        status = self.status
        if self.silent:
            silent = f"silent for {self.heard:.0f} s (stopped, or its interpreter is held)"
            return f"{silent}, last seen {status.words}"
        at = f", at {status.frame}" if status.frame else ""
        return f"{status.words} for {self.age:.0f} s{at}"


def stalled(reports: Mapping[int, Report]) -> float | None:
    """Seconds since any rank made progress, where that is more than any of them may take; else None."""
    youngest = min(report.age for report in reports.values())
    patience = max(report.status.patience for report in reports.values())
    return youngest if youngest > patience else None


def behind(reports: Mapping[int, Report]) -> list[int]:
    """The ranks that the others wait for; all of them where that cannot be told.

    Silent ranks; else those whose work is the earliest, and among these the ones that do not wait in a
    collective themselves.
    """
    silent = [rank for rank, report in reports.items() if report.silent]
    if silent:
        return sorted(silent)
    first = min(report.status.number for report in reports.values())
    earliest = [rank for rank, report in reports.items() if report.status.number == first]
    busy = [rank for rank in earliest if not reports[rank].status.waits]
    return sorted(busy or earliest)


def frame_of(thread: int) -> tuple[str, bool]:
    """Where a thread is, as "function (file:line)", and whether that is in a collective.

    Its innermost frame outside of Python's and other packages' own files, where it has one.
    """
    frame = sys._current_frames().get(thread)
    words, own, waits = "", False, False
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or any(part in file for part in _COLLECTIVES)
        ours = "janus_ds/" in file or "/lib/python" not in file
        if not words or (ours and not own):
            words = f"{frame.f_code.co_name} ({file.rpartition('/')[2]}:{frame.f_lineno})"
            own = ours
        frame = frame.f_back
    return words, waits


_STANDARD_ERROR = 2
_TICKS = 12
"""Looks within the limit."""
_LONGEST_TICK, _SHORTEST_TICK = 5.0, 0.2
_SLOW_WORK = 3.0
"""Times the limit that work with few signs of progress may take: compiling, saving, the first of anything."""
_LEAVE_SECONDS = 2.0
"""Launchers end all ranks when one is gone; the others shall have written their stacks by then."""

logger = logging.getLogger(__name__)


class StalledError(TrainingError):
    """No rank makes progress. Worth another start, from the last checkpoint."""

    exit_code = STALLED_EXIT_CODE


class Watchdog:
    """What this rank is doing, and the thread that looks whether anything goes on.

    A context manager: the thread lives inside of it.

    Args:
        liveness: carries words between them; None with one rank, or for a run that nobody watches.
        limit: seconds without progress; 0: do nothing at all.
    """

    def __init__(self, topology: Topology, liveness: Liveness | None, folder: Path, limit: float) -> None:
        self._rank = topology.rank
        self._size = topology.world_size
        alone = topology.world_size == 1
        self._limit = limit if alone or liveness is not None else 0.0
        self._liveness = liveness
        self._folder = folder
        self._tick = min(max(limit / _TICKS, _SHORTEST_TICK), _LONGEST_TICK)
        self._silence = max(limit / 2, 4 * self._tick)  # without a word from a rank
        self._main = threading.get_ident()
        self._number, self._words, self._patience = 0, "starting", _SLOW_WORK * limit
        self._since = self._looked = self._awake = time.monotonic()
        self._probe: Callable[[], object] | None = None
        self._probed: object = None
        self._heard: dict[int, tuple[float, RankStatus]] = {}
        self._closed = threading.Event()
        self._leaving = False
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._main = threading.get_ident()
            self._since = self._looked = self._awake = time.monotonic()
            # A rank that has not spoken yet is still starting.
            first = RankStatus(0, "starting", 0.0, self._patience)
            self._heard = dict.fromkeys(range(self._size), (self._since, first))
            if self._liveness is not None:
                self._liveness.listen({"at": self._hear, "stall": lambda rank, text: self._leave(None)})
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leaving:
            # Others are leaving too, which breaks collectives: not what this process is to end with.
            time.sleep(60 * _LEAVE_SECONDS)
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def enter(self, words: str, *, slow: bool = False, probe: Callable[[], object] | None = None) -> None:
        """This rank begins some work; all ranks do so in the same order.

        Args:
            words: the work, as it is named if the rank hangs there.
            slow: it has few signs of progress, and gets three times as long.
            probe: a figure that changes while it goes on, looked at by the thread.
        """
        self._probe, self._probed = probe, None
        self._number += 1
        self._words = words
        self._patience = self._limit * (_SLOW_WORK if slow else 1.0)
        self._since = time.monotonic()

    def touch(self) -> None:
        """A sign of progress within the work."""
        self._since = time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(self._tick):
            # Written by a thread of C, should something hold the interpreter for so long.
            with contextlib.suppress(RuntimeError, ValueError):
                faulthandler.dump_traceback_later(self._patience + 4 * self._tick, file=_STANDARD_ERROR)
            now = time.monotonic()
            if now - self._looked > self._silence:
                # This process itself was stopped: what others have said meanwhile is still to be read.
                self._awake = now
            self._looked = now
            self._look(now)

    def _look(self, now: float) -> None:
        status = self._status(now)
        self._heard[self._rank] = (now, status)
        first = self._rank == 0
        if self._liveness is not None:
            self._liveness.tell("at", json.dumps(asdict(status)))
        if now - self._awake < self._limit / 2 and self._awake > self._since:
            return
        if first:
            reports = {rank: self._report(now, *heard) for rank, heard in self._heard.items()}
            seconds = stalled(reports)
        else:
            reports = {rank: self._report(now, *self._heard[rank]) for rank in (self._rank, 0)}
            # The first rank decides, unless it is the one that is silent.
            seconds = stalled(reports) if reports[0].silent else None
        if seconds is not None:
            self._leave(self._error(seconds, reports))

    def _status(self, now: float) -> RankStatus:
        probe = self._probe  # the main thread may take it away meanwhile
        if probe is not None:
            with contextlib.suppress(OSError):
                value = probe()
                if value != self._probed:
                    self._probed, self._since = value, now
        frame, waits = frame_of(self._main)
        return RankStatus(self._number, self._words, now - self._since, self._patience, frame, waits)

    def _report(self, now: float, heard: float, status: RankStatus) -> Report:
        age = now - heard
        return Report(status, age, silent=age > self._silence)

    def _hear(self, rank: int, text: str) -> None:
        """Rank 0 hears all others, they hear it alone."""
        self._heard[rank] = (time.monotonic(), RankStatus(**json.loads(text)))

    def _error(self, seconds: float, reports: dict[int, Report]) -> StalledError:
        late = behind(reports)
        named = "; ".join(f"{self._name(rank)}: {reports[rank]}" for rank in late[:8])
        others = [rank for rank in sorted(reports) if rank not in late]
        if others:
            named += f"; the others wait, such as rank {others[0]}: {reports[others[0]]}"
        stacks = self._folder / f"rank{late[0]}.txt"
        return StalledError(
            f"no rank has made progress for {seconds:.0f} seconds",
            named,
            f"see {stacks} for where it hangs; the same command resumes from the last checkpoint; "
            "if nothing was wrong, raise train.stall_minutes",
        )

    def _name(self, rank: int) -> str:
        return str(self._liveness.peers[rank]) if self._liveness and self._size > 1 else f"rank {rank}"

    def _leave(self, error: StalledError | None) -> None:
        """Tell the others, write the stacks, end this process; `error` is what this rank has to say."""
        if self._closed.is_set() or self._leaving:
            return
        self._leaving = True
        if error is not None:
            self._wake_silent()
        if self._liveness is not None and (error is not None or self._rank == 0):
            self._liveness.tell("stall", "")
        if error is not None:
            # The bar of progress leaves its line open.
            sys.stderr.write(f"\n{error}\n")
            sys.stderr.flush()
        with contextlib.suppress(OSError):
            self._write_stacks()
        if error is not None:
            time.sleep(_LEAVE_SECONDS)
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(STALLED_EXIT_CODE)

    def _wake_silent(self) -> None:
        """Let stopped ranks of this launcher go on, so that they hear of the end and leave as well."""
        now, peers = time.monotonic(), self._liveness.peers if self._liveness else []
        for peer, here in ((peer, peers[self._rank]) for peer in peers):
            silent = now - self._heard[peer.rank][0] > self._silence
            if peer.rank != self._rank and silent and peer.host == here.host:
                with contextlib.suppress(psutil.Error):
                    process = psutil.Process(peer.pid)
                    if process.ppid() == os.getppid():
                        process.resume()

    def _write_stacks(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"rank{self._rank}.txt").open("w", encoding="utf-8") as file:
            status = self._status(time.monotonic())
            file.write(f"rank {self._rank}, process {os.getpid()}, {time.strftime('%F %T')}: {status.words} ")
            file.write(f"for {status.age:.0f} s\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
