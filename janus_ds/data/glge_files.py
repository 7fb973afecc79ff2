"""GLGE's data: eight tasks in the official layout `xsum_data/org_data/{train,dev,test}.{src,tgt}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from janus_ds.data.text_files import COMPRESSED_SUFFIXES, TextFile
from janus_ds.errors import DataError, UsageError

__all__ = ["GLGE_LIMITS", "GLGE_SPLITS", "Limits", "find_files", "find_split", "read_pairs", "task_limits"]


@dataclass(frozen=True)
class Limits:
    """Most tokens of each side, without bos and eos; longer ones lose their end."""

    source: int
    target: int


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
        source, target = (_find(inside / f"{official}.{side}") for side in ("src", "tgt"))
        missing = [side for side, path in (("src", source), ("tgt", target)) if path is None]
        if source is not None and (target is not None or split == "test"):
            found[split] = (source, target)
        elif split != "test":
            raise DataError(
                f"{' and '.join(f'{official}.{side}' for side in missing)} not found",
                str(inside),
                "give a task's folder of GLGE, with train, dev and test as .src and .tgt",
            )
    return found


def find_split(folder: Path, task: str, split: str) -> tuple[Path, Path | None]:
    """Source and target file of one split in the official layout; there may be no targets.

    Args:
        folder: of one level (glge/easy), of the task (glge/easy/xsum_data), or the org_data in it.
        task: name of the task.
        split: the official name: train, dev or test.

    Raises:
        DataError: there are no sources; the message says where they were looked for.
    """
    places = (folder / f"{task}_data" / "org_data", folder / "org_data", folder)
    for place in places:
        source, target = (_find(place / f"{split}.{side}") for side in ("src", "tgt"))
        if source is not None:
            return source, target
    raise DataError(
        f"{split}.src of {task} not found",
        ", ".join(str(place) for place in places),
        "give a directory made by launch/prepare_glge.py, or a folder in GLGE's own layout",
    )


def read_pairs(source: Path, target: Path | None) -> Iterator[tuple[str, str]]:
    """Both sides of every line, without blanks around them; no target file gives empty targets.

    Raises:
        DataError: different numbers of lines, no lines, text that is not UTF-8, a damaged file.
    """
    sides = [TextFile(path).lines() for path in (source, target) if path is not None]
    number = 0
    for number, lines in enumerate(zip_longest(*sides), 1):
        if None in lines:
            rest = number + sum(1 for _ in sides[lines.index(None) ^ 1])
            counts = [number - 1 if line is None else rest for line in lines]
            raise DataError(
                f"the files have different numbers of lines: {counts[0]:,} and {counts[1]:,}",
                f"{source} and {target}",
                "give files whose lines belong together; empty lines count",
            )
        yield lines[0].strip(), lines[1].strip() if target is not None else ""
    if not number:
        raise DataError("the file holds no line", str(source), "give files that hold text")


def _find(path: Path) -> Path | None:
    names = [path, *(path.with_name(path.name + suffix) for suffix in COMPRESSED_SUFFIXES)]
    return next((name for name in names if name.is_file()), None)
