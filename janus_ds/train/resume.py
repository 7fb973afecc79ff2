"""Continuing from a checkpoint: what is looked at before a model is built, and what is loaded after.

A checkpoint holds whole tensors, so it continues on any number of ranks, in any ZeRO stage and at
any tensor-parallel size. On the same ranks in the same stage the run is bitwise the one that was
never stopped; on others sums are taken in another order, and dropout is drawn by other ranks.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from janus_ds.checkpoint.manager import read_state
from janus_ds.checkpoint.snapshot import OPTIMIZER_FILE
from janus_ds.errors import CheckpointError
from janus_ds.train.engine import TrainingEngine
from janus_ds.train.state import Meters, RunIdentity, changed_execution, check_resumable

__all__ = ["read_resumable", "resume"]

_SHARDS = "engine"
"""Where format 1 has DeepSpeed's own files."""

logger = logging.getLogger(__name__)


def read_resumable(checkpoint: Path | None, identity: RunIdentity) -> dict[str, Any]:
    """The state to continue from; step 0 for a new run.

    Raises:
        CheckpointError, ConfigError: this start cannot continue the checkpoint.
    """
    if checkpoint is None:
        return identity.state(0, Meters())
    state = read_state(checkpoint)
    check_resumable(state, identity, checkpoint)
    if not (checkpoint / OPTIMIZER_FILE).is_file() and not (checkpoint / _SHARDS).is_dir():
        raise CheckpointError(
            "the checkpoint has weights, but no state of the optimizer to continue with",
            str(checkpoint / OPTIMIZER_FILE),
            "restore the file, or begin a new run from the weights with --init and another --output",
        )
    return state


def resume(engine: TrainingEngine, checkpoint: Path, state: dict[str, Any], identity: RunIdentity) -> None:
    """Load what :func:`read_resumable` has accepted, and say on what it continues; all ranks together.

    Raises:
        CheckpointError: a file cannot be read.
    """
    step = int(state["step"])
    if (checkpoint / OPTIMIZER_FILE).is_file():
        engine.restore(checkpoint, state["optimizer"], step)
    else:
        engine.load_shards(checkpoint / _SHARDS)
    if engine.topology.is_main:
        changes = changed_execution(state, identity)
        how = f"; it was written with {'; '.join(changes)}" if changes else ""
        logger.info("resuming from step %d%s", step, how)
