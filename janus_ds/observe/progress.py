"""How far a command is: one line that changes on a terminal, a dated line at times where there is none."""

from __future__ import annotations

import sys
import time
from datetime import datetime

_CLEAR = "\r\x1b[K"


class Progress:
    """A line on standard error.

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
        dated = f"{_CLEAR}{text}" if self._terminal else f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n"
        self._write(dated)

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


def duration(seconds: float) -> str:
    """A time in its two largest units, such as "4 min 46 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
