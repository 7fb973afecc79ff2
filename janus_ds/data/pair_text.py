"""The text of held-out pairs, kept beside their shards: what translations are made from and scored with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ds.data.index import Manifest
from janus_ds.data.text_files import TextFile
from janus_ds.errors import DataError

__all__ = ["PairText", "held_out_text", "source_limit"]


@dataclass(frozen=True)
class PairText:
    """Lines of a split, lower-cased where the data is."""

    sources: list[str]
    references: list[str]
    names: tuple[str, str]
    """The files, source and reference."""
    longest_source: int | None = None
    """Tokens that sources are cut to, where the preparation did so."""


def held_out_text(data: Path, split: str) -> PairText:
    """Sources and references of a split of a data directory made by `prepare_data.py --task nmt`.

    Raises:
        DataError: the data is no translation data, or the split's text is missing.
    """
    settings = Manifest.load(data).settings
    languages = settings.get("languages")
    if not isinstance(languages, dict):
        raise DataError(
            "the data directory holds no translation data",
            str(data),
            "give a directory made by launch/prepare_data.py --task nmt",
        )
    paths = [data / "raw" / f"{split}.{languages[side]}" for side in ("source", "target")]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"the {'references' if path is paths[1] else 'sources'} of split {split!r} are missing",
                str(path),
                f"prepare the data with --{split}, or name another split",
            )
    lower = bool(settings.get("lowercase"))
    sources, references = (
        [line.lower() if lower else line for line in TextFile(path).lines()] for path in paths
    )
    if len(sources) != len(references):
        raise DataError(
            f"there are {len(sources)} sources and {len(references)} references",
            f"{paths[0]} and {paths[1]}",
            "prepare the data again",
        )
    return PairText(sources, references, (str(paths[0]), str(paths[1])), source_limit(settings))


def source_limit(settings: Mapping[str, Any]) -> int | None:
    """Tokens that `prepare_glge.py` cut sources to, from a manifest's settings; None for other data."""
    limit = settings.get("request", {}).get("settings", {}).get("limits", {}).get("source")
    return None if limit is None else int(limit)
