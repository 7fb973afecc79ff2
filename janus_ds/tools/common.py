"""What the commands share: the default recipe, and numbers and tables as text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import janus_ds
from janus_ds.errors import UsageError

__all__ = ["bytes_text", "count_text", "new_parser", "recipe_path", "table"]


def new_parser(command: str, description: str) -> argparse.ArgumentParser:
    """The argument parser of one command."""
    return argparse.ArgumentParser(prog=f"python -m janus_ds {command}", description=description)


def recipe_path(given: Path | None) -> Path:
    """The recipe that was asked for, or the quickstart's.

    Raises:
        UsageError: none was given, and this is not a checkout of the repository.
    """
    if given is not None:
        return given
    quickstart = Path(janus_ds.__file__).parents[1] / "launch" / "recipes" / "quickstart.yaml"
    if not quickstart.is_file():
        raise UsageError("no recipe was given", "--recipe", "give the path of a recipe (YAML)")
    return quickstart


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
