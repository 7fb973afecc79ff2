"""A data directory appears whole or not at all, and is made once for one request.

Used by the preparations that are short enough to begin again after an interruption; `prepare_job`,
which resumes, shares the comparison of requests alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ds.data.index import MANIFEST_NAME, Manifest
from janus_ds.errors import DataError
from janus_ds.io import atomic_dir, disk_faults

__all__ = ["PairReport", "build_whole", "finished_manifest"]


@dataclass(frozen=True)
class PairReport:
    """What a preparation of pairs made."""

    output: Path
    manifest: Manifest
    already_whole: bool = False

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """What was read, cut or left out and why, by split."""
        return dict(self.manifest.settings["counts"])


def build_whole(output: Path, request: dict[str, Any], build: Callable[[Path], Manifest]) -> PairReport:
    """Make `output`, beside its place and renamed into it when whole; return at once where it is there.

    Args:
        output: the data directory; must be new, empty, or of the same request.
        request: what decides the bytes, as JSON; kept in the manifest's settings.
        build: fills the folder that it is given and saves the manifest.

    Raises:
        DataError: the output folder holds something else.
        ResourceError: full disk or missing permission.
    """
    if (output / MANIFEST_NAME).is_file():
        return PairReport(output, finished_manifest(output, request), already_whole=True)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DataError("the output is not an empty folder", str(output), "choose another output folder")
    with disk_faults(output), atomic_dir(output) as building:
        manifest = build(building)
    return PairReport(output, manifest)


def finished_manifest(output: Path, request: dict[str, Any]) -> Manifest:
    """The manifest of a directory that is already there.

    Raises:
        DataError: it was made on another request.
    """
    manifest = Manifest.load(output)
    if manifest.settings.get("request") != request:
        raise DataError(
            "the output folder holds data prepared with other settings or from other input",
            str(output),
            "choose another output folder, or delete this one",
        )
    return manifest
