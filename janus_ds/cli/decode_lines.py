"""What goes into and comes out of `janus-ds decode`: lines of text, lines with words hidden, samples held out
in training; over-long inputs, outputs as they are made, progress."""

from __future__ import annotations

import io
import json
import math
import os
import random
import re
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np

from janus_ds.data.stream.index import MANIFEST_NAME
from janus_ds.data.text.tokenizer import MASK_TEXT
from janus_ds.decode.infill import Target
from janus_ds.decode.load import LoadedRun
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.decode.text import TextCodec, fit_sources, long_warning, one_line, too_long
from janus_ds.errors import DataError
from janus_ds.io import disk_faults, is_stream
from janus_ds.progress import Progress

STDIN = "-"
_MEAN_SPAN = 2.0
_FIRST_WINDOW = 16
_PIECE_BYTES = 1 << 16
_MOST_BLANK = 1 << 16
_LONGEST_LINE = 4 << 20


@dataclass(frozen=True)
class Passage:
    """One input of a decoder.

    Attributes:
        ids: the source, without bos and eos.
        source: the source as text.
        reference: what it was made from, or its translation; None where nothing is known.
    """

    ids: list[int]
    source: str
    reference: str | None = None
    target: Target | None = None
    """A given target whose blanks are to be filled."""


def with_targets(passages: Sequence[Passage], targets: Iterator[Target], where: str) -> list[Passage]:
    """The passages with the next targets, one for each; of an empty input, such as a skipped one, nothing is
    filled, and a target without a blank is kept.

    Raises:
        DataError: there are fewer targets.
    """
    given = list(islice(targets, len(passages)))
    if len(given) < len(passages):
        raise DataError("there are fewer targets than inputs", where, "give one line for each line of input")
    return [
        replace(passage, target=target if passage.ids or not target.has_blank else None)
        for passage, target in zip(passages, given, strict=True)
    ]


def line_windows(name: str, largest: int = 256) -> Iterator[list[str]]:
    """The lines of a UTF-8 file, or of standard input under the name "-", some at a time.

    A window has the lines that have come, at most 16 at first, and up to `largest` later: the first outputs
    appear soon, and a program that writes line by line gets its answers line by line.

    Raises:
        DataError: no such file, not UTF-8 (the line is named), or nothing in it.
    """
    where, most, number, blank = ("standard input" if name == STDIN else name), _FIRST_WINDOW, 0, True
    window: list[str] = []
    for data in _pieces(name, where):
        if data:
            number += 1
            window.append(_decoded(data, number, where))
            blank = blank and not window[-1].strip()
        # Nothing is given out before something stands on a line: a file of blank lines is no input.
        begun = not blank or len(window) >= _MOST_BLANK
        if window and begun and (not data or len(window) >= most):
            yield window
            window, most = [], min(2 * most, largest)
    if blank:
        raise DataError("the input is empty", where, "give at least one line of text")
    if window:
        yield window


def _decoded(data: bytes, number: int, where: str) -> str:
    try:
        text = data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the input is not UTF-8 text ({error.reason})", f"{where}, line {number}", "give plain UTF-8"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


def _pieces(name: str, where: str) -> Iterator[bytes]:
    """Each line with its end (the last one may have none); b"" where no further one has come yet."""
    if name == STDIN and sys.stdin is None:
        raise DataError("there is no input", f"{where}, which is closed", "give a file to --input")
    try:
        with _opened(name) as file:
            rest = b""
            while piece := file.read1(_PIECE_BYTES):
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    what = f"a line is longer than {_LONGEST_LINE >> 20} MiB"
                    raise DataError(what, where, "give text, one input a line")
                yield from (line + b"\n" for line in lines)
                if not _more_has_come(file):
                    yield b""
            if rest:
                yield rest
    except OSError as error:
        raise DataError(f"the input cannot be read: {error.strerror}", where, "check the path") from None


def _opened(name: str) -> AbstractContextManager[io.BufferedIOBase]:
    if name == STDIN:
        return nullcontext(cast(io.BufferedIOBase, sys.stdin.buffer))
    return Path(name).open("rb")


def _more_has_come(file: io.BufferedIOBase) -> bool:
    try:
        return bool(select.select([file], [], [], 0)[0])
    except (OSError, ValueError):
        return True


def line_passages(
    lines: Sequence[str], text: TextCodec, mask_share: float, seed: int, first: int = 0
) -> list[Passage]:
    """Lines as sources; with a share of their words to hide, the lines are the references. Which words is
    drawn by the seed and the number of the line, counted from `first`."""
    if not mask_share:
        return [Passage(text.encode(line), line) for line in lines]
    hidden = [infill(line, mask_share, f"{seed}:{number}") for number, line in enumerate(lines, first)]
    return [Passage(text.encode(source), source, line) for source, line in zip(hidden, lines, strict=True)]


def infill(line: str, share: float, seed: str) -> str:
    """A line with spans of words hidden, each behind one `<mask>`: the noise of pretraining, on words.

    Span lengths follow Poisson(2), at least one word; spans are drawn until their union reaches
    ceil(share x words), the last one trimmed. Spans that touch become one.
    """
    words, draw = line.split(), random.Random(seed)
    hidden: set[int] = set()
    budget = min(math.ceil(share * len(words)), len(words))
    while len(hidden) < budget:
        start = draw.randrange(len(words))
        span = range(start, min(start + max(1, _poisson(draw)), len(words)))
        hidden |= set([i for i in span if i not in hidden][: budget - len(hidden)])
    shown = [
        MASK_TEXT if i in hidden else word
        for i, word in enumerate(words)
        if i not in hidden or i - 1 not in hidden
    ]
    return " ".join(shown)


def heldout_passages(run: LoadedRun, text: TextCodec, count: int, data: Path | None = None) -> list[Passage]:
    """Samples of a run's validation split (at most all), spread over it, with the noise of its validation."""
    # Reading shards takes more to import than decoding of lines.
    from janus_ds.data.stream.loader import VALIDATION_EPOCH
    from janus_ds.data.stream.pipeline import BatchMaker

    maker = BatchMaker(valid_split(run, data), run.config, run.special)
    ids = np.unique(np.linspace(0, maker.source.samples - 1, count).astype(np.int64))
    views = maker.make((np.full_like(ids, VALIDATION_EPOCH), ids))["views"]
    passages = []
    for source, target in zip(views.source.rows(), views.target.rows(), strict=True):
        inner = source[1:-1].tolist()
        passages.append(Passage(inner, text.decode(inner), text.decode(target[1:-1].tolist())))
    return passages


def valid_split(run: LoadedRun, data: Path | None = None) -> Path:
    """The folder of a run's validation split; in `data`, or else where it lay in training.

    Raises:
        DataError: it is not there any more.
        CheckpointError: the manifest beside it is of another vocabulary.
    """
    from janus_ds.evaluate.evaluation import check_vocabulary

    config = run.config
    folder = data or (Path(config.data.path) if config.data.path else None)
    split = folder / "valid" if folder else None
    if data is None and config.data.valid_path:
        split = Path(config.data.valid_path)
    if split is None or not split.is_dir():
        raise DataError(
            "the validation samples of the run are not there",
            str(split or "run.json: recipe.data.path"),
            "give the data directory with --data DIR",
        )
    if (split.parent / MANIFEST_NAME).is_file():
        check_vocabulary(run, split.parent)
    return split


def _poisson(draw: random.Random) -> int:
    """A number from Poisson(2), by multiplying uniforms."""
    number, product = 0, draw.random()
    while product > math.exp(-_MEAN_SPAN):
        number, product = number + 1, product * draw.random()
    return number


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

    `line` and `rank` begin with 1. `mode` is what was asked for, also where drafts did not pay and AR went
    on alone. `passes` (of the decoder) and `token_scores` are there where they are
    known; `seconds` is the mean of the inputs that were decoded together.
    """
    lines = []
    for number, passage in enumerate(passages):
        for mode, items in found.items():
            for rank, item in enumerate(items[number][:count], 1):
                row: dict[str, Any] = {"line": first + number + 1, "rank": rank, "mode": mode}
                row |= {"text": one_line(item.text), "score": item.score}
                row |= {"passes": item.passes} if item.passes else {}
                row |= {"token_scores": item.token_scores} if item.token_scores else {}
                row |= {"seconds": round(item.seconds, 6), "source": passage.source}
                row |= {} if passage.reference is None else {"reference": passage.reference}
                text = json.dumps(row, ensure_ascii=False)
                lines.append(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
    return lines
