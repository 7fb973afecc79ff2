"""Parallel text: two files, line by line, or one of records; with the faults that such files have."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from janus_ds.batch import SpecialTokens
from janus_ds.config.locations import checked_name
from janus_ds.data.prepare.settings import Languages, Limits
from janus_ds.data.stream.index import Manifest
from janus_ds.data.text.byte_streams import COMPRESSED_SUFFIXES
from janus_ds.data.text.documents import records, text_of
from janus_ds.data.text.text_files import TextFile
from janus_ds.data.text.tokenizer import plain_ids
from janus_ds.errors import DataError, UsageError
from janus_ds.io import mapping

_LONGEST_LINE_WORDS = 5000

Pair = tuple[str, str]
"""Source and target."""


@dataclass(frozen=True)
class PairFiles:
    """Two files whose lines belong together, or twice the same one, whose records have both sides."""

    source: Path
    target: Path
    fields: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Of records: names that the field of each side may have, the likeliest first."""

    def read(self) -> Iterator[tuple[str, str]]:
        """All pairs; raises as :func:`read_pairs`."""
        if any(self.fields):
            return _read_records(self.source, self.fields)
        return read_pairs(self.source, self.target, _LONGEST_LINE_WORDS)


_RECORDS = (".parquet", ".json", ".jsonl", ".ndjson")
_NESTED = "translation"
"""A field that holds both sides by language, as in the data sets of WMT on the Hugging Face hub."""


def pair_up(
    paths: Sequence[Path],
    languages: Languages,
    option: str,
    given: tuple[str | None, str | None] = (None, None),
) -> list[PairFiles]:
    """Files given in turn, source and target; those of JSON or Parquet hold both.

    Args:
        languages: of source and target; records may name their fields by them.
        given: names of the fields of records.

    Raises:
        UsageError: an odd number of files, or names that tell the other order.
        DataError: a file does not exist.
    """
    for path in paths:
        if not path.is_file():
            # A folder; or a pipe, such as <(COMMAND): pairs are read more than once.
            what = "is no regular file" if path.exists() else "does not exist"
            raise DataError(f"the input {what}", str(path), "give the path of a text file")
    likely = ((languages.source, "source", "src"), (languages.target, "target", "tgt"))
    source, target = ((name,) if name else names for name, names in zip(given, likely, strict=True))
    alone = [PairFiles(p, p, (source, target)) for p in paths if TextFile(p).suffix in _RECORDS]
    paths = [path for path in paths if TextFile(path).suffix not in _RECORDS]
    if paths and any(given):
        what = "only records have fields; this is taken as lines of text"
        raise UsageError(what, f"{option} {paths[0]}", "give files that end in .parquet, .json or .jsonl")
    if len(paths) % 2 or not (paths or alone):
        raise UsageError(
            "source and target are two files, one line a sentence, and one of them is missing",
            f"{option} {' '.join(map(str, paths))}",
            f"give them in turn: {option} FILE.{languages.source} FILE.{languages.target}; one file may hold "
            "both as JSON or Parquet (FILE.jsonl)",
        )
    pairs = [PairFiles(paths[i], paths[i + 1]) for i in range(0, len(paths), 2)]
    for pair in pairs:
        told = _language(pair.source, languages), _language(pair.target, languages)
        if told[0] == languages.target or told[1] == languages.source:
            raise UsageError(
                f"the files' names tell another order: {pair.source.name} stands for {languages.source}, "
                f"{pair.target.name} for {languages.target}",
                option,
                f"give the {languages.source} file first, or exchange --source-lang and --target-lang",
            )
    return [*pairs, *alone]


def _read_records(path: Path, fields: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    file, empty = TextFile(path), True
    for value, place in records(file, (_NESTED, *fields[0], *fields[1])):
        where, empty, pair = f"{file.where}, {place}", False, []
        nested = value.get(_NESTED) if isinstance(value, dict) else None
        inner = nested if isinstance(nested, dict) else value
        for side, names in zip(("source", "target"), fields, strict=True):
            # A line end would be taken as the end of the pair where the text is kept.
            text = " ".join(text_of(inner, names, where, f"--{side}-field").split("\n")).strip()
            _refuse_long(text, where, _LONGEST_LINE_WORDS)
            pair.append(text)
        yield pair[0], pair[1]
    if empty:
        raise DataError("the file holds no record", file.where, "give a file that holds text")


def _language(path: Path, languages: Languages) -> str | None:
    """Which of the two languages a file's name ends in, compression aside; None where it tells none."""
    name = path.name
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    ending = name.rpartition(".")[2]
    return ending if ending in (languages.source, languages.target) else None


def read_pairs(source: Path, target: Path | None, most_words: int | None = None) -> Iterator[tuple[str, str]]:
    """Both sides of every line, without blanks around them; no target file gives empty targets.

    Args:
        source, target: files whose lines belong together.
        most_words: a line with more words is refused; None: no limit.

    Raises:
        DataError: different numbers of lines, no lines at all, a line of too many words, text that is not
            UTF-8, a damaged compressed file.
    """
    paths = [path for path in (source, target) if path is not None]
    where = " and ".join(map(str, paths))
    sides = [TextFile(path).lines() for path in paths]
    number = 0
    for number, lines in enumerate(zip_longest(*sides), 1):
        if None in lines:
            rest = number + sum(1 for _ in sides[lines.index(None) ^ 1])
            counts = [number - 1 if line is None else rest for line in lines]
            raise DataError(
                f"the files have different numbers of lines: {counts[0]:,} and {counts[1]:,}",
                where,
                "give files whose lines belong together, one sentence a line; empty lines count",
            )
        pair = [line.strip() for line in lines]
        for path, text in zip(paths, pair, strict=True):
            _refuse_long(text, f"{path}, line {number}", most_words)
        yield pair[0], pair[1] if target is not None else ""
    if not number:
        raise DataError("the files hold no line", where, "give files that hold text")


def _refuse_long(text: str, where: str, most_words: int | None) -> None:
    if most_words is not None and len(text) > most_words and len(text.split()) > most_words:
        raise DataError(
            f"the line has {len(text.split()):,} words: that is no sentence",
            where,
            "look whether line ends are missing; cut the line, or remove it from both files",
        )


GLGE_LIMITS: Mapping[str, Limits] = {
    "cnndm": Limits(510, 128),
    "gigaword": Limits(254, 32),
    "xsum": Limits(510, 64),
    "msnews": Limits(510, 32),
    "squadqg": Limits(510, 64),
    "msqg": Limits(254, 32),
    "coqa": Limits(510, 32),
    "personachat": Limits(510, 32),
}
"""Targets of XSum, SQuAD and PersonaChat as the paper says; the others are ours."""

GLGE_SPLITS = {"train": "train", "valid": "dev", "test": "test"}
"""Our name of a split and the official one."""


def task_limits(task: str) -> Limits:
    """The default limits of a task.

    Raises:
        UsageError: there is no such task.
    """
    if task not in GLGE_LIMITS:
        raise UsageError(f"there is no GLGE task {task!r}", "--task", f"use one of {', '.join(GLGE_LIMITS)}")
    return GLGE_LIMITS[task]


def find_files(folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Source and target file of each split; the test set may come without targets, or not at all.

    Args:
        folder: such as glge/easy/xsum_data, or the org_data in it.

    Raises:
        DataError: train or dev files are missing; the message says where they were looked for.
    """
    inside = folder / "org_data" if (folder / "org_data").is_dir() else folder
    found: dict[str, tuple[Path, Path | None]] = {}
    for split, official in GLGE_SPLITS.items():
        source, target = _both(inside, official)
        if source is not None and (target is not None or split == "test"):
            found[split] = (source, target)
        elif split != "test":
            missing = [f"{official}.{s}" for s, path in (("src", source), ("tgt", target)) if path is None]
            raise DataError(
                f"{' and '.join(missing)} not found",
                str(inside),
                "give a task's folder of GLGE, with train, dev and test as .src and .tgt",
            )
    return found


def find_split(folder: Path, task: str, split: str) -> tuple[Path, Path | None]:
    """Source and target file of one split in the official layout; there may be no targets.

    Args:
        folder: of one level (glge/easy), of the task (glge/easy/xsum_data), or the org_data in it.
        split: the official name: train, dev or test.

    Raises:
        DataError: there are no sources; the message says where they were looked for.
    """
    places = (folder / f"{task}_data" / "org_data", folder / "org_data", folder)
    for place in places:
        source, target = _both(place, split)
        if source is not None:
            return source, target
    raise DataError(
        f"{split}.src of {task} not found",
        ", ".join(str(place) for place in places),
        "give a directory made by launch/prepare_glge.py, or a folder in GLGE's own layout",
    )


def _both(folder: Path, split: str) -> tuple[Path | None, Path | None]:
    """Source and target file of a split, compressed or not; None where there is none."""
    names = (
        [folder / f"{split}.{side}{end}" for end in ("", *COMPRESSED_SUFFIXES)] for side in ("src", "tgt")
    )
    source, target = (next((path for path in paths if path.is_file()), None) for paths in names)
    return source, target


@dataclass(frozen=True)
class PairText:
    """Lines of a split, lower-cased where the data is: what is decoded, and what it is compared with."""

    sources: list[str]
    references: list[str] | None
    """One for each source; None where there are none."""
    names: tuple[str, str]
    """The files, source and reference."""
    longest: int | None = None
    """Most tokens of a source, without bos and eos, as the data was prepared for training: longer ones lose
    their end, special symbols are left out. None: sources are taken as they are."""

    def first(self, count: int) -> PairText:
        """The first `count` lines; all for 0."""
        if not count:
            return self
        references = None if self.references is None else self.references[:count]
        return replace(self, sources=self.sources[:count], references=references)

    def encoded(
        self, encode: Callable[[str], list[int]], special: SpecialTokens, positions: int
    ) -> tuple[list[list[int]], int]:
        """Token ids of the sources, without bos and eos, and the most, with both, that is read of one.

        Args:
            positions: of the encoder.
        """
        rows = [encode(source) for source in self.sources]
        if self.longest is None:
            return rows, positions
        return [plain_ids(row, special) for row in rows], min(self.longest + 2, positions)


def held_out_text(data: Path, split: str) -> PairText:
    """Sources and references of a split of a data directory made by `prepare_data.py --task nmt`.

    Raises:
        DataError: the data is no translation data, or the split's text is missing.
    """
    settings = Manifest.load(data).settings
    languages = settings.get("languages")
    try:
        names = [checked_name(languages[side]) for side in ("source", "target")]  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise DataError(
            "the data directory holds no translation data",
            str(data),
            "give a directory made by `janus-ds prepare --task nmt`",
        ) from None
    paths = [data / "raw" / f"{split}.{name}" for name in names]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"the {'references' if path is paths[1] else 'sources'} of split {split!r} are missing",
                str(path),
                "name another split (valid or test), or prepare the data with this split's files",
            )
    lower = bool(settings.get("lowercase"))
    pairs = [(a.lower(), b.lower()) if lower else (a, b) for a, b in read_pairs(paths[0], paths[1])]
    sources, references = ([pair[side] for pair in pairs] for side in (0, 1))
    return PairText(sources, references, (str(paths[0]), str(paths[1])), side_limit(settings, "source"))


def prepared_request(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What data was prepared on, from a manifest's settings, also where it was distilled since."""
    request = mapping(settings.get("request"))
    return mapping(request.get("prepared", request))


def side_limit(settings: Mapping[str, Any], side: str) -> int | None:
    """Tokens that `prepare_glge.py` cut "source" or "target" to, from a manifest's settings; None for other
    data."""
    limits = mapping(mapping(prepared_request(settings).get("settings")).get("limits"))
    value = limits.get(side)
    return value if type(value) is int and value > 0 else None


def pair_key(source: str, target: str) -> bytes:
    """A hash that tells pairs apart."""
    return hashlib.blake2b(f"{source}\n{target}".encode(), digest_size=8).digest()
