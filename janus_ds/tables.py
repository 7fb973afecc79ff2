"""Numbers and tables as text, for what commands print."""

from __future__ import annotations

from collections.abc import Sequence


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
