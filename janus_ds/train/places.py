"""Where the ranks of a run are, as each one tells it, and which of them the others wait for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

__all__ = ["Place", "Report", "behind", "frame_of", "stalled"]

_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/", "janus_ds/parallel/topology.py")


@dataclass(frozen=True)
class Place:
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

    def encode(self) -> str:
        """As one line."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str) -> Place:
        """The place that :meth:`encode` wrote."""
        return cls(**json.loads(line))


@dataclass(frozen=True)
class Report:
    """The last word of a rank.

    Args:
        place: where it was.
        heard: seconds since that came.
        silent: it should have spoken since.
    """

    place: Place
    heard: float
    silent: bool

    @property
    def age(self) -> float:
        """Seconds without progress, as far as is known."""
        return self.place.age + self.heard

    def __str__(self) -> str:
        place = self.place
        if self.silent:
            silent = f"silent for {self.heard:.0f} s (stopped, or its interpreter is held)"
            return f"{silent}, last seen {place.words}"
        at = f", at {place.frame}" if place.frame else ""
        return f"{place.words} for {self.age:.0f} s{at}"


def stalled(reports: Mapping[int, Report]) -> float | None:
    """Seconds since any rank made progress, where that is more than any of them may take; else None."""
    youngest = min(report.age for report in reports.values())
    patience = max(report.place.patience for report in reports.values())
    return youngest if youngest > patience else None


def behind(reports: Mapping[int, Report]) -> list[int]:
    """The ranks that the others wait for; all of them where that cannot be told.

    Silent ranks; else those whose work is the earliest, and among these the ones that do not wait in a
    collective themselves.
    """
    silent = [rank for rank, report in reports.items() if report.silent]
    if silent:
        return sorted(silent)
    first = min(report.place.number for report in reports.values())
    earliest = [rank for rank, report in reports.items() if report.place.number == first]
    busy = [rank for rank in earliest if not reports[rank].place.waits]
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
