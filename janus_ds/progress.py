"""What commands print: how far they are (one line that changes on a terminal, a dated line at times where
there is none), numbers, tables."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime

_CLEAR = "\r\x1b[K"


class Progress:
    """A line on standard error; as a context, it is ended whatever happens.

    Args:
        seconds: between two lines where standard error is no terminal; 0: none there.
        on_terminal: whether a terminal is free for it (outputs do not go there).
    """

    def __init__(self, seconds: float = 30.0, on_terminal: bool = True) -> None:
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown = on_terminal if self._terminal else sys.stderr is not None and seconds > 0
        self._interval = 0.2 if self._terminal else seconds
        self._start = self._last = time.monotonic()
        self.said = False
        """Whether anything was shown."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return max(time.monotonic() - self._start, 1e-9)

    def show(self, text: str, *, now: bool = False) -> None:
        """Show this, if it is time to, or `now`."""
        moment = time.monotonic()
        if not self._shown or not (now or moment - self._last >= self._interval):
            return
        self._last, self.said = moment, True
        # A line that wraps cannot be written over: the next one would begin below its first row.
        if self._terminal:
            self._write(f"{_CLEAR}{text[: _columns()]}")
        else:
            self._write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def note(self, text: str) -> None:
        """A line of its own, which stays."""
        self._write(f"{_CLEAR if self._terminal else ''}{text}\n")

    def end(self) -> None:
        """Leave the last text where it is."""
        if self.said and self._terminal:
            self._write("\n")

    def _write(self, text: str) -> None:
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()


def _columns() -> int | None:
    """Characters that fit into a row of the terminal on standard error; None where it does not tell."""
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return None
    return columns - 1 if columns else None


def duration(seconds: float) -> str:
    """A time in its two largest units, such as "4 min 46 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def bytes_text(count: float) -> str:
    """A number of bytes, in decimal units: 1.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count_text(count: float) -> str:
    """A number of things, exact below a million, else rounded: 139.2 M."""
    if count < 1e6:
        return f"{count:,.0f}"
    for unit in ("M", "G"):
        count /= 1e3 if unit == "G" else 1e6
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} T"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
