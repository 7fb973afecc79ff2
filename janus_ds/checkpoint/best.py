"""The weights of the best validation, kept beside the checkpoints as `checkpoints/best`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ds.checkpoint.manifest import write_json, write_manifest
from janus_ds.checkpoint.tensors import WEIGHTS_FILE, save_weights
from janus_ds.errors import ResourceError
from janus_ds.io import sync_path, sync_tree

__all__ = ["BEST_FOLDER", "save_best"]

BEST_FOLDER = "best"
_WORKING, _PREVIOUS = ".saving-best", ".previous-best"


def save_best(root: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Put weights in the place of the best ones so far; for the first rank.

    Args:
        root: RUN/checkpoints.
        weights: whole, by canonical name.
        record: step and score, for `best.json`.

    Raises:
        ResourceError: full disk or missing permission; the earlier best stays.
    """
    final, working, previous = root / BEST_FOLDER, root / _WORKING, root / _PREVIOUS
    try:
        root.mkdir(parents=True, exist_ok=True)
        if previous.exists() and not final.exists():
            # Killed between the two renames below.
            previous.rename(final)
        for leftover in (working, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        working.mkdir()
        save_weights(working / WEIGHTS_FILE, weights)
        write_json(working / "best.json", dict(record))
        sync_tree(working)
        write_manifest(working)
        if final.exists():
            final.rename(previous)
        working.rename(final)
        sync_path(root)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"the best weights could not be written ({error})",
            str(root),
            "free disk space or choose another --output, and start the same command again",
        ) from error
    return final
