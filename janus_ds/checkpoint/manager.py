"""Saving and finding checkpoints: a complete one always exists, even if the process is killed while saving.

The state is gathered to rank 0's memory while training waits; what takes long, writing it, happens in a
thread beside the next steps. A save goes into a folder with a name that no reader looks at, is brought
to disk, gets its `complete.json`, and is published by one rename (two where the step is there already; a
kill between them is repaired at the next start). Old checkpoints are renamed away before
they are removed, so a folder with a checkpoint's name is complete or damaged by something else; the
second is noticed by checksum, and the next older one is taken with a warning.

A save that fails (full disk, storage gone) is a warning at once and costs no training; only several
in a row, or the run's last one, end the run.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from janus_ds.checkpoint.manifest import (
    STATE_FILE,
    STEP_PREFIX,
    WEIGHTS_FILE,
    check_version,
    fault_of,
    publish,
    step_folders,
    step_of,
    write_json,
)
from janus_ds.checkpoint.tensors import Snapshot, snapshot_bytes, write_tensors
from janus_ds.config.schema import TrainConfig
from janus_ds.errors import CheckpointError, ResourceError
from janus_ds.io import disk_faults
from janus_ds.parallel.topology import Topology, on_first_rank

_SAVING, _REMOVING, _REPLACED = ".saving-", ".removing-", ".replaced-"
_LEFTOVER = re.compile(r"\.saving-\d+|\.removing-.*|\.replaced-.*")
BEST_FOLDER, BEST_FILE = "best", "best.json"
_WORKING, _PREVIOUS = ".saving-best", ".previous-best"
_SLACK_BYTES = 1 << 20
"""For state, manifest and the file system's own blocks."""

logger = logging.getLogger(__name__)


class Saveable(Protocol):
    """What the manager asks of a training engine."""

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""

    def snapshot(self) -> Snapshot | None:
        """The state of training on rank 0, None elsewhere. All ranks call it together."""


class CheckpointManager:
    """The checkpoints of one run, in `root`/step-NNNNNNNN.

    Args:
        root: folder of the checkpoints; made when room is looked for, at a start or a save.
        train: which stay (`keep_last`, `keep_every`), how many saves may fail (`max_failed_saves`).
        topology: all ranks save and find together; rank 0 writes and chooses.
    """

    def __init__(self, root: Path, train: TrainConfig, topology: Topology) -> None:
        self._root = root
        self._train = train
        self._topology = topology
        # No daemon: a program that ends, by an error too, ends after the save.
        self._executor = ThreadPoolExecutor(1, "checkpoint")
        self._future: Future[None] | None = None
        self._writing = False
        self._failed = 0

    def save(self, step: int, engine: Saveable, state: dict[str, Any]) -> bool:
        """Take a snapshot and begin to write it as the checkpoint of `step`; all ranks together.

        Waits for the save before, if that is still being written.

        Returns:
            False where nothing was begun: the disk has no room for it. Training may go on.

        Raises:
            ResourceError: on all ranks, if too many saves in a row have failed; earlier checkpoints
                are as they were.
        """
        self._settle()
        main, parameters = self._topology.is_main, engine.parameters
        fault = self._topology.broadcast_object(self._prepare(parameters) if main else None)
        if fault is not None:
            if main:
                self._warn(step, fault)
            self._judge(fault)
            return False
        snapshot = engine.snapshot()
        if snapshot is not None:
            whole = {**state, "optimizer": dict(snapshot.counters)}
            self._future = self._executor.submit(self._write, step, snapshot, whole)
        self._writing = True
        return True

    def look_for_room(self, engine: Saveable) -> None:
        """Say at a start, not only at the first save, that the disk has no room for one; for rank 0."""
        fault = self._prepare(engine.parameters)
        if fault is not None:
            logger.warning(
                "there is no room for a checkpoint: %s\n  where: %s\n"
                "  to do: free disk space before the first save, or start with another --output",
                fault,
                self._root,
            )

    def finish(self) -> None:
        """Wait for the save that is being written; all ranks together, before a run is left.

        Raises:
            ResourceError: on all ranks, if the last save failed.
        """
        fault = self._settle()
        if self._failed:
            raise self._error(fault or "the last save was skipped")

    def latest(self) -> Path | None:
        """The newest whole checkpoint, the same on all ranks; None where the run has none.

        Raises:
            CheckpointError: there are checkpoints, but none of them is whole, or a newer program wrote
                the newest; or their folder is a link that leads to nothing.
            ResourceError: the disk fails.
        """
        return on_first_rank(self._topology, self._find)

    def _find(self) -> Path | None:
        if self._root.is_symlink() and not self._root.exists():
            raise CheckpointError(
                "the folder of the run's checkpoints is a link that leads to nothing",
                f"{self._root} -> {self._root.readlink()}",
                "mount the disk that it leads to, or remove the link to start anew",
            )
        with disk_faults(self._root):
            return self._newest()

    def _newest(self) -> Path | None:
        self._clean()
        _clean_best(self._root)
        faults: list[str] = []
        for folder in reversed(step_folders(self._root)):
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

    def _settle(self) -> str | None:
        """Wait for the save before; what went wrong with it, on all ranks."""
        if not self._writing:
            return None
        self._writing, fault = False, None
        try:
            if self._future is not None:
                self._future.result()
        except Exception as error:
            fault = str(error)
        fault = self._topology.broadcast_object(fault)
        self._judge(fault)
        return fault

    def _judge(self, fault: str | None) -> None:
        """Count the saves that have failed in a row; None: one has not."""
        self._failed = 0 if fault is None else self._failed + 1
        if fault is not None and self._failed >= self._train.max_failed_saves:
            raise self._error(fault)

    def _prepare(self, parameters: int) -> str | None:
        """Make room for a save of so many parameters; why that cannot be, or None."""
        needed = snapshot_bytes(parameters) + _SLACK_BYTES
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._clean()
            total, _, free = shutil.disk_usage(self._root)
        except OSError as error:
            return str(error)
        # A file system that does not tell its size has no room to tell either.
        if free >= needed or not total:
            return None
        return f"it needs {needed / 1e6:,.1f} MB, the disk has {free / 1e6:,.1f} MB left"

    def _write(self, step: int, snapshot: Snapshot, state: dict[str, Any]) -> None:
        """Write, verify, publish, remove old ones; in the background of rank 0."""
        final = self._root / f"{STEP_PREFIX}{step:08d}"
        working = self._root / f"{_SAVING}{step:08d}"
        try:
            working.mkdir()
            snapshot.write(working)
            write_json(working / STATE_FILE, state)
            # There is a checkpoint of this step where the run went back behind a damaged one and has come
            # here again, or where a validation that was interrupted at its save has been done.
            publish(working, final, final.with_name(f"{_REPLACED}{final.name}"))
            self._prune(step)
        except Exception as error:
            self._warn(step, str(error))
            self._clean()  # which fails as well where the storage is gone
            raise

    def _prune(self, step: int) -> None:
        """Make room after the save of `step`.

        First go the damaged ones of later steps, behind which the run went back, and those of stops between
        two saves: an unbroken run has none of them, and the last checkpoints are averaged.
        """

        def worth(folder: Path) -> tuple[bool, bool, int]:
            number = step_of(folder) or 0
            return number == step, number < step and not number % self._train.save_every, number

        for folder in sorted(step_folders(self._root), key=worth)[: -self._train.keep_last]:
            if not self._train.keep_every or (step_of(folder) or 0) % self._train.keep_every:
                doomed = self._root / f"{_REMOVING}{folder.name}"
                folder.rename(doomed)
                # What cannot go now, such as a file that a reader has open on NFS, goes at the next save.
                shutil.rmtree(doomed, ignore_errors=True)

    def _clean(self) -> None:
        """Remove what a killed or failed save or removal left behind."""
        if not self._root.is_dir():
            return
        for path in self._root.iterdir():
            final = self._root / path.name.removeprefix(_REPLACED)
            if path.name.startswith(_REPLACED) and not final.exists():
                # Killed between the two renames of a replacement.
                path.rename(final)
            elif _LEFTOVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _warn(self, step: int, fault: str) -> None:
        logger.warning(
            "no checkpoint of step %d: %s; training goes on\n  where: %s\n"
            "  to do: free disk space; the checkpoint before is whole, and the next save tries again",
            step,
            fault,
            self._root,
        )

    def _error(self, fault: str) -> ResourceError:
        count = f"{self._failed} checkpoints in a row" if self._failed > 1 else "a checkpoint"
        return ResourceError(
            f"{count} could not be written ({fault})",
            str(self._root),
            "free disk space or choose another --output, and start the same command again: "
            "it resumes from the last whole checkpoint",
        )


def save_best(root: Path, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Put weights in the place of the best ones so far, RUN/checkpoints/best; for rank 0.

    Raises:
        ResourceError: full disk or missing permission; the earlier best stays.
    """
    final, working = root / BEST_FOLDER, root / _WORKING
    try:
        root.mkdir(parents=True, exist_ok=True)
        _clean_best(root)
        working.mkdir()
        write_tensors(working / WEIGHTS_FILE, weights)
        write_json(working / BEST_FILE, dict(record))
        publish(working, final, root / _PREVIOUS)
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"the best weights could not be written ({error})",
            str(root),
            "free disk space or choose another --output, and start the same command again",
        ) from error
    return final


def _clean_best(root: Path) -> None:
    """Remove what a kill has left behind in :func:`save_best`; the earlier best comes back to its place."""
    final, previous = root / BEST_FOLDER, root / _PREVIOUS
    if previous.exists() and not final.exists():
        # Killed between the two renames of `publish`.
        previous.rename(final)
    for leftover in (root / _WORKING, previous):
        shutil.rmtree(leftover, ignore_errors=True)
