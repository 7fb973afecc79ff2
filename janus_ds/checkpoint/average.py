"""The mean of the last checkpoints of a run, which translates better than any of them (section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from janus_ds.checkpoint.manifest import fault_of, step_of
from janus_ds.checkpoint.tensors import WEIGHTS_FILE, read_weights
from janus_ds.errors import CheckpointError, UsageError

__all__ = ["average_weights", "last_checkpoints"]


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The weights files of a run's last `count` checkpoints, oldest first.

    Raises:
        UsageError: a count below 1.
        CheckpointError: there are fewer, or one of them is damaged.
    """
    if count < 1:
        raise UsageError(f"{count} checkpoints cannot be averaged", "--average", "give 1 or more")
    folders = [path for path in run.glob("checkpoints/step-*") if step_of(path) is not None]
    folders.sort()
    if len(folders) < count:
        names = ", ".join(path.name for path in folders) or "none"
        raise CheckpointError(
            f"{count} checkpoints are to be averaged, the run has {len(folders)} ({names})",
            str(run / "checkpoints"),
            f"give --average {len(folders)} or less, or train with train.keep_last={count}"
            if folders
            else "give a run folder that has been trained",
        )
    for folder in folders[-count:]:
        fault = fault_of(folder)
        if fault is not None:
            raise CheckpointError(
                f"the checkpoint is damaged: {fault}", str(folder), "average fewer checkpoints, or restore it"
            )
    return [folder / WEIGHTS_FILE for folder in folders[-count:]]


def average_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of each weight in fp32, summed in double precision.

    Raises:
        CheckpointError: a file cannot be read, or holds other weights than the first.
    """
    sums = {name: value.double() for name, value in read_weights(paths[0]).items()}
    for path in paths[1:]:
        weights = read_weights(path)
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in sums.items()}:
            raise CheckpointError(
                "the checkpoint holds other weights than the one before", str(path), "take another run"
            )
        for name, value in weights.items():
            sums[name] += value
    return {name: (value / len(paths)).to(torch.float32) for name, value in sums.items()}
