"""Saving and finding checkpoints such that a kill at any moment leaves a whole one.

A save goes into a folder with a name that no reader looks at, is brought to disk, gets its
`complete.json`, and is published by one rename. Old checkpoints are renamed away before they are
removed, so a folder with a checkpoint's name is whole or damaged by something else; the second is
noticed by checksum, and the next older one is taken with a warning.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from janus_ds.checkpoint.manifest import (
    check_version,
    fault_of,
    read_json,
    sync_files,
    sync_folder,
    write_json,
    write_manifest,
)
from janus_ds.checkpoint.weights import WEIGHTS_FILE, save_weights
from janus_ds.errors import CheckpointError, ResourceError
from janus_ds.parallel.topology import Topology

__all__ = ["ENGINE_FOLDER", "STATE_FILE", "CheckpointManager", "Saveable", "read_state", "step_of"]

ENGINE_FOLDER = "engine"
STATE_FILE = "state.json"
_PREFIX = "step-"
_LEFTOVERS = (".saving-", ".removing-")

logger = logging.getLogger(__name__)


class Saveable(Protocol):
    """What the manager asks of a training engine. All ranks call each method together."""

    def save(self, folder: Path) -> None:
        """Write this rank's share into `folder`; an OSError or RuntimeError means it could not."""

    def full_weights(self) -> dict[str, Tensor] | None:
        """All weights in fp32 under their canonical names on rank 0, None elsewhere."""


class CheckpointManager:
    """The checkpoints of one run, in `root`/step-NNNNNNNN.

    Args:
        root: folder of the checkpoints; made on first save.
        keep_last: how many stay after a save.
        topology: all ranks save and find together; rank 0 publishes and chooses.
    """

    def __init__(self, root: Path, keep_last: int, topology: Topology) -> None:
        self._root = root
        self._keep_last = keep_last
        self._topology = topology

    def save(self, step: int, engine: Saveable, state: dict[str, Any]) -> Path:
        """Write, verify and publish the checkpoint of `step`, then remove those beyond `keep_last`.

        Raises:
            ResourceError: on all ranks, if any of them could not write; earlier checkpoints are as
                they were.
        """
        final = self._root / f"{_PREFIX}{step:08d}"
        working = self._root / f"{_LEFTOVERS[0]}{step:08d}"
        self._together(lambda: self._begin(working, final), main_only=True)
        self._together(lambda: engine.save(working / ENGINE_FOLDER))
        weights = engine.full_weights()
        self._together(lambda: self._publish(working, final, weights, state), main_only=True)
        self._together(self._prune, main_only=True)
        return final

    def latest(self) -> Path | None:
        """The newest whole checkpoint, the same on all ranks; None where the run has none.

        Raises:
            CheckpointError: there are checkpoints, but none of them is whole, or a newer program wrote
                the newest.
        """
        found = self._topology.broadcast_object(self._look() if self._topology.is_main else None)
        if isinstance(found, CheckpointError):
            raise found
        return found

    def _look(self) -> Path | CheckpointError | None:
        """What :meth:`latest` gives or raises; on rank 0, for all."""
        try:
            return self._find()
        except CheckpointError as error:
            return error

    def _find(self) -> Path | None:
        self._clean()
        faults: list[str] = []
        for folder in reversed(self._published()):
            check_version(folder)
            fault = fault_of(folder)
            if fault is None:
                return folder
            faults.append(f"{folder.name}: {fault}")
            logger.warning("checkpoint %s is damaged (%s); trying the one before", folder, fault)
        if not faults:
            return None
        raise CheckpointError(
            f"none of the {len(faults)} checkpoints is whole: {faults[0]}",
            str(self._root),
            "restore a checkpoint from a copy, or give another --output to start anew",
        )

    def _published(self) -> list[Path]:
        """Folders with a checkpoint's name, oldest first."""
        if not self._root.is_dir():
            return []
        return sorted(path for path in self._root.iterdir() if path.is_dir() and step_of(path) is not None)

    def _begin(self, working: Path, final: Path) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        self._clean()
        if final.exists():
            # The run went back behind a damaged checkpoint and has come here again.
            self._remove(final)
        (working / ENGINE_FOLDER).mkdir(parents=True)

    def _publish(
        self, working: Path, final: Path, weights: dict[str, Tensor] | None, state: dict[str, Any]
    ) -> None:
        save_weights(working / WEIGHTS_FILE, weights or {})
        write_json(working / STATE_FILE, state)
        sync_files(working)
        write_manifest(working)
        working.rename(final)
        sync_folder(self._root)

    def _prune(self) -> None:
        for folder in self._published()[: -self._keep_last]:
            self._remove(folder)

    def _remove(self, folder: Path) -> None:
        doomed = folder.with_name(f"{_LEFTOVERS[1]}{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed)

    def _clean(self) -> None:
        """Remove what a killed save or removal left behind."""
        if not self._root.is_dir():
            return
        for path in self._root.iterdir():
            if path.name.startswith(_LEFTOVERS):
                shutil.rmtree(path, ignore_errors=True)

    def _together(self, action: Callable[[], None], *, main_only: bool = False) -> None:
        """Run `action`; raise on all ranks if it failed on any: a rank that leaves alone hangs the rest."""
        fault = None
        if self._topology.is_main or not main_only:
            try:
                action()
            except (OSError, RuntimeError) as error:
                # torch.save reports a full disk as a RuntimeError of its zip writer.
                fault = f"rank {self._topology.rank}: {error}"
        if not self._topology.agree(int(fault is not None)):
            return
        if self._topology.is_main:
            self._clean()
        faults = [text for text in self._topology.gather_objects(fault) if text]
        raise ResourceError(
            f"a checkpoint could not be written ({faults[0]})",
            str(self._root),
            "free disk space or choose another --output, and start the same command again: "
            "it resumes from the last whole checkpoint",
        )


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint's folder name; None for other names."""
    digits = folder.name.removeprefix(_PREFIX)
    return int(digits) if folder.name.startswith(_PREFIX) and digits.isdigit() else None


def read_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing or not JSON.
    """
    try:
        state: dict[str, Any] = read_json(folder / STATE_FILE)
        return state
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint's state cannot be read ({error})",
            str(folder / STATE_FILE),
            "take another checkpoint of the run",
        ) from error
