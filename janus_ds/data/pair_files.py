"""Parallel text: two files, line by line, with the faults that such files have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from janus_ds.data.text_files import COMPRESSED_SUFFIXES, TextFile
from janus_ds.errors import DataError, UsageError

__all__ = ["Languages", "PairFiles", "pair_up", "read_pairs"]

_LONGEST_LINE_WORDS = 5000


@dataclass(frozen=True)
class Languages:
    """The names of both sides, such as de and en."""

    source: str
    target: str


@dataclass(frozen=True)
class PairFiles:
    """Two files whose lines belong together."""

    source: Path
    target: Path


def pair_up(paths: Sequence[Path], languages: Languages, option: str) -> list[PairFiles]:
    """Files given in turn, source and target.

    Raises:
        UsageError: an odd number of files, or names that tell the other order.
        DataError: a file does not exist.
    """
    if not paths or len(paths) % 2:
        raise UsageError(
            f"{option} has {len(paths)} files, but source and target go together",
            option,
            f"give them in turn: {option} FILE.{languages.source} FILE.{languages.target}",
        )
    for path in paths:
        if not path.is_file():
            raise DataError("the input does not exist", str(path), "give the path of a text file")
    pairs = [PairFiles(*paths[i : i + 2]) for i in range(0, len(paths), 2)]
    for pair in pairs:
        told = _language(pair.source, languages), _language(pair.target, languages)
        if told[0] == languages.target or told[1] == languages.source:
            raise UsageError(
                f"the files' names tell another order: {pair.source.name} stands for {languages.source}, "
                f"{pair.target.name} for {languages.target}",
                option,
                f"give the {languages.source} file first, or exchange --source-lang and --target-lang",
            )
    return pairs


def _language(path: Path, languages: Languages) -> str | None:
    """Which of the two languages a file's name ends in, compression aside; None where it tells none."""
    name = path.name
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    ending = name.rpartition(".")[2]
    return ending if ending in (languages.source, languages.target) else None


def read_pairs(files: PairFiles) -> Iterator[tuple[str, str]]:
    """Both sides of every line, without blanks around them.

    Raises:
        DataError: different numbers of lines, no lines at all, a line far too long for a sentence, text
            that is not UTF-8, a damaged compressed file.
    """
    number = 0
    sides = TextFile(files.source).lines(), TextFile(files.target).lines()
    for number, (source, target) in enumerate(zip_longest(*sides), 1):
        if source is None or target is None:
            _refuse_counts(files, number, sides, source is None)
        source, target = source.strip(), target.strip()
        for path, text in ((files.source, source), (files.target, target)):
            if len(text) > _LONGEST_LINE_WORDS and len(text.split()) > _LONGEST_LINE_WORDS:
                raise DataError(
                    f"the line has {len(text.split()):,} words: that is no sentence",
                    f"{path}, line {number}",
                    "look whether line ends are missing; cut the line, or remove it from both files",
                )
        yield source, target
    if not number:
        raise DataError(
            "the files hold no line", f"{files.source} and {files.target}", "give files that hold text"
        )


def _refuse_counts(
    files: PairFiles, number: int, sides: tuple[Iterator[str], Iterator[str]], source_ended: bool
) -> None:
    rest = number + sum(1 for _ in sides[1 if source_ended else 0])
    counts = (number - 1, rest) if source_ended else (rest, number - 1)
    raise DataError(
        f"the files have different numbers of lines: {counts[0]:,} and {counts[1]:,}",
        f"{files.source} and {files.target}",
        "give files whose lines belong together, one sentence a line; empty lines count",
    )
