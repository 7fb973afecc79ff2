"""All that a run needs to go on, whole and on the host, whatever the ranks that trained it.

Weights and Adam's moments lie in fp32 under the parameters' names, tensor-parallel shards merged
and ZeRO partitions joined. So a checkpoint fits any number of ranks, any ZeRO stage and any
tensor-parallel size without being converted: each rank reads the parts that are its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ds.checkpoint.tensor_file import TensorReader, open_tensors, write_tensors
from janus_ds.checkpoint.weights import WEIGHTS_FILE, save_weights

__all__ = ["MOMENTS", "OPTIMIZER_FILE", "SavedTensors", "Snapshot", "open_saved", "snapshot_bytes"]

OPTIMIZER_FILE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square."""

_BYTES_PER_PARAMETER = 4 * (1 + len(MOMENTS))


@dataclass(frozen=True)
class Snapshot:
    """The state of training at one step, on the host of the first rank.

    Args:
        weights: fp32 weights by name.
        moments: `MOMENT.NAME` -> tensor of the weight's shape.
        optimizer: Adam's step counter and the state of fp16's loss scale; plain values.
    """

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the tensors; `optimizer` goes into the checkpoint's state.

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        save_weights(folder / WEIGHTS_FILE, self.weights)
        write_tensors(folder / OPTIMIZER_FILE, self.moments)


@dataclass(frozen=True)
class SavedTensors:
    """The tensors of a checkpoint, read one at a time."""

    weights: TensorReader
    moments: TensorReader

    def read(self, name: str, moment: str | None) -> Tensor:
        """A weight (`moment` None) or one of its moments, whole, in fp32."""
        return self.weights.read(name) if moment is None else self.moments.read(f"{moment}.{name}")


@contextmanager
def open_saved(folder: Path) -> Iterator[SavedTensors]:
    """Open the tensors of a checkpoint.

    Raises:
        CheckpointError: they are missing or cannot be read.
    """
    with open_tensors(folder / WEIGHTS_FILE) as weights, open_tensors(folder / OPTIMIZER_FILE) as moments:
        yield SavedTensors(weights, moments)


def snapshot_bytes(parameters: int) -> int:
    """Bytes of a checkpoint's tensors for a model with so many parameters."""
    return parameters * _BYTES_PER_PARAMETER
