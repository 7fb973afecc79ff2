"""Weights as plain fp32 tensors under their canonical names, whatever the ranks that trained them.

`weights.safetensors` holds whole matrices (tensor-parallel shards merged, vocabulary padded), so
that decoding, conversion and `--init` need neither DeepSpeed nor the same number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from janus_ds.checkpoint.tensor_file import write_tensors
from janus_ds.errors import CheckpointError

__all__ = ["WEIGHTS_FILE", "find_weights", "read_weights", "save_weights"]

WEIGHTS_FILE = "weights.safetensors"


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write fp32 tensors by name.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    write_tensors(path, weights)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights cannot be read ({error})", str(path), "take another checkpoint of the run"
        ) from error


def find_weights(source: Path) -> Path:
    """The weights file of a run folder (its newest checkpoint), a checkpoint folder, or the file itself.

    Raises:
        CheckpointError: there is none.
    """
    if source.is_file():
        return source
    candidates = [
        source / WEIGHTS_FILE,
        *sorted(source.glob(f"checkpoints/step-*/{WEIGHTS_FILE}"), reverse=True),
    ]
    for path in candidates:
        if path.is_file():
            return path
    raise CheckpointError(
        "there are no weights here",
        str(source),
        f"give a run folder, a checkpoint folder (step-NNNNNNNN) or a {WEIGHTS_FILE}",
    )
