"""What `eval/decode.py` decodes: lines of text, lines with words hidden, or samples held out in training."""

from __future__ import annotations

import math
import random
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from io import BufferedIOBase
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.data.text.tokenizer import MASK_TEXT
from janus_ds.decode.infill import Target
from janus_ds.decode.text import TextCodec
from janus_ds.errors import DataError

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
    filled.

    Raises:
        DataError: there are fewer targets.
    """
    given = list(islice(targets, len(passages)))
    if len(given) < len(passages):
        raise DataError("there are fewer targets than inputs", where, "give one line for each line of input")
    return [
        replace(passage, target=target if passage.ids else None)
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
            f"the input is not UTF-8 text ({error.reason})", f"{where}, line {number}", "convert it to UTF-8"
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


def _opened(name: str) -> AbstractContextManager[BufferedIOBase]:
    if name == STDIN:
        return nullcontext(cast(BufferedIOBase, sys.stdin.buffer))
    return Path(name).open("rb")


def _more_has_come(file: BufferedIOBase) -> bool:
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


def heldout_passages(
    config: RunConfig, special: SpecialTokens, text: TextCodec, count: int, data: Path | None = None
) -> list[Passage]:
    """Samples of a run's validation split (at most all), spread over it, with the noise of its validation."""
    # Reading shards takes more to import than decoding of lines.
    from janus_ds.data.stream.loader import VALIDATION_EPOCH
    from janus_ds.data.stream.pipeline import BatchMaker

    maker = BatchMaker(valid_split(config, data), config, special)
    ids = np.unique(np.linspace(0, maker.source.samples - 1, count).astype(np.int64))
    views = maker.make((np.full_like(ids, VALIDATION_EPOCH), ids))["views"]
    passages = []
    for source, target in zip(views.source.rows(), views.target.rows(), strict=True):
        inner = source[1:-1].tolist()
        passages.append(Passage(inner, text.decode(inner), text.decode(target[1:-1].tolist())))
    return passages


def valid_split(config: RunConfig, data: Path | None = None) -> Path:
    """The folder of a run's validation split; in `data`, or else where it lay in training.

    Raises:
        DataError: it is not there any more.
    """
    folder = data or (Path(config.data.path) if config.data.path else None)
    split = folder / "valid" if folder else None
    if data is None and config.data.valid_path:
        split = Path(config.data.valid_path)
    if split is None or not split.is_dir():
        raise DataError(
            "the validation samples of the run are not there",
            str(split or "run.json: recipe.data.path"),
            "give the data directory with --data DIR, or text with --input",
        )
    return split


def _poisson(draw: random.Random) -> int:
    """A number from Poisson(2), by multiplying uniforms."""
    number, product = 0, draw.random()
    while product > math.exp(-_MEAN_SPAN):
        number, product = number + 1, product * draw.random()
    return number
