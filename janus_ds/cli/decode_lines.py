"""What goes into and comes out of `janus-ds decode`: over-long inputs, outputs as they are made, progress."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_ds.decode.search_settings import Hypothesis
from janus_ds.decode.text import fit_sources, long_warning, one_line, too_long
from janus_ds.errors import DataError
from janus_ds.evaluate.passages import Passage
from janus_ds.io import disk_faults, is_stream
from janus_ds.observe.progress import Progress

_CONTROL = re.compile("[\x7f-\x9f\u2028\u2029]")
"""What JSON leaves as it is, and terminals or readers of lines do not."""


Found = Mapping[str, Sequence[Sequence[Hypothesis]]]
"""By mode: the hypotheses of each input with their text, best first (samples as drawn)."""


class LongInputs:
    """Cuts, skips or refuses inputs that the encoder has no positions for.

    Args:
        table: positions of the encoder, bos and eos included.
        action: cut, skip (the output is an empty line) or stop.
    """

    def __init__(self, table: int, action: str) -> None:
        self._table, self._action = table, action
        self._numbers: list[int] = []
        self.total = 0
        self.fault: DataError | None = None
        """What stops decoding once the inputs before are done."""

    def fit(self, passages: Sequence[Passage]) -> list[Passage]:
        """The next inputs as they are decoded; to `stop`, those before the first over-long one."""
        rows, numbers = fit_sources([passage.ids for passage in passages], self._table, self._action)
        numbers = [self.total + number for number in numbers]
        if len(rows) < len(passages):
            self.fault = too_long(len(passages[len(rows)].ids), numbers[0], self._table)
        else:
            self._numbers += numbers
        self.total += len(rows)
        return [replace(passage, ids=row) for passage, row in zip(passages, rows, strict=False)]

    def warn(self) -> None:
        """Say on standard error how many inputs were too long, if any."""
        if self._numbers:
            _say(f"warning: {long_warning(self._numbers, self.total, self._table, self._action)}")


class Output:
    """A file, or standard output, as UTF-8; what is written is there at once.

    A file is NAME.part until :meth:`finish`, so that nobody takes a part of it for the whole; what was there
    under the name stays until then. A device or a FIFO is written to.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines = 0
        self._file: io.TextIOWrapper | None = None
        if path is None and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")

    def write(self, lines: Sequence[str]) -> None:
        """Write lines; the file begins with the first ones."""
        content = "".join(f"{line}\n" for line in lines)
        if self._path is None:
            print(content, end="", flush=True)
            return
        with disk_faults(self._path):
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = _part_of(self._path).open("w", encoding="utf-8", newline="\n")
            self._file.write(content)
            self._file.flush()
        self._lines += len(lines)

    def finish(self) -> None:
        """All is decoded: the file takes its name."""
        if self._path is not None and self._file is not None:
            part = _part_of(self._path)
            with disk_faults(self._path):
                self._file.close()
                self._file = None
                if part != self._path:
                    part.replace(os.path.realpath(self._path))

    def close(self) -> None:
        """Close the file; of one that is not finished, say where its lines are."""
        if self._path is not None and self._file is not None:
            with suppress(OSError):
                self._file.close()
            _say(f"not complete: {self._lines:,} lines are in {_part_of(self._path)}")


def _part_of(path: Path) -> Path:
    """Where an output is written until it is complete."""
    return path if is_stream(path) else Path(f"{os.path.realpath(path)}.part")


class DecodeProgress:
    """Finished inputs on standard error; see :class:`Progress`."""

    def __init__(self, seconds: float, shown: bool) -> None:
        self._line = Progress(seconds, shown)

    def __call__(self, done: int, *, now: bool = False) -> None:
        """So many inputs are done."""
        self._line.show(f"decoded {done:,} lines, {done / self._line.seconds:.1f} a second", now=now)

    def end(self, done: int) -> None:
        """All are done; said where something was said before."""
        if self._line.said:
            self(done, now=True)
            self._line.end()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def as_lines(found: Found) -> list[str]:
    """The best output of the only mode, one line for each input."""
    (only,) = found.values()
    return [one_line(candidates[0].text) for candidates in only]


def as_blocks(passages: Sequence[Passage], first: int, found: Found) -> list[str]:
    """Source, reference and the best output of each mode below each other; `first` is the first's number."""
    lines = []
    for number, passage in enumerate(passages):
        rows = {"source": passage.source}
        if passage.reference is not None:
            rows["reference"] = passage.reference
        for mode, items in found.items():
            item = items[number][0]
            rows[f"{mode.upper()} {item.score:.3f}"] = item.text
        width = max(12, *(len(name) + 2 for name in rows))
        lines.append(f"[{first + number}]")
        lines += [*(f"{name:<{width}}{one_line(text)}" for name, text in rows.items()), ""]
    return lines


def as_nbest(passages: Sequence[Passage], first: int, found: Found, count: int) -> list[str]:
    """`number ||| text ||| score`, as Moses writes n-best lists; numbers begin with `first`, which is 0.

    Of several modes, the mode stands before the score, in the place of Moses' features.
    """
    return [
        f"{first + number} ||| {one_line(item.text)} ||| {f'{mode} ||| ' * (len(found) > 1)}{item.score:.4f}"
        for number in range(len(passages))
        for mode, items in found.items()
        for item in items[number][:count]
    ]


def as_json(passages: Sequence[Passage], first: int, found: Found, count: int) -> list[str]:
    """One object for each output: what it is of, and how it came about.

    `line` and `rank` begin with 1. `passes` (of the decoder) and `token_scores` are there where they are
    known; `seconds` is the mean of the inputs that were decoded together.
    """
    lines = []
    for number, passage in enumerate(passages):
        for items in found.values():
            for rank, item in enumerate(items[number][:count], 1):
                row: dict[str, Any] = {"line": first + number + 1, "rank": rank, "mode": item.mode}
                row |= {"text": one_line(item.text), "score": item.score}
                row |= {"passes": item.passes} if item.passes else {}
                row |= {"token_scores": item.token_scores} if item.token_scores else {}
                row |= {"seconds": round(item.seconds, 6), "source": passage.source}
                row |= {} if passage.reference is None else {"reference": passage.reference}
                text = json.dumps(row, ensure_ascii=False)
                lines.append(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
    return lines
