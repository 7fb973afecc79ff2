"""Weights and Adam's moments on disk: safetensors files, whatever the ranks that trained them.

Tensors lie in fp32 under the parameters' names, tensor-parallel shards merged, ZeRO partitions joined and
the vocabulary padded. So a checkpoint fits any number of ranks, any ZeRO stage and any tensor-parallel
size without being converted, and decoding, conversion and `--init` need no DeepSpeed.

The library's own writer copies every tensor and holds the interpreter while it writes; a save in a
background thread would stop the training that it is to leave alone. This one writes straight from
the tensors' memory. Reading is the library's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from janus_ds.checkpoint.manifest import fault_of, step_of
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.io import atomic_file

__all__ = [
    "MOMENTS",
    "OPTIMIZER_FILE",
    "WEIGHTS_FILE",
    "SavedTensors",
    "Snapshot",
    "TensorReader",
    "average_weights",
    "find_weights",
    "last_checkpoints",
    "open_saved",
    "open_tensors",
    "read_weights",
    "snapshot_bytes",
    "write_tensors",
]

_ALIGNMENT = 8
_CHUNK = 1 << 24


class TensorReader:
    """Tensors of an open file, read one at a time when they are asked for."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path = path
        self._file = file

    @property
    def names(self) -> set[str]:
        """What the file holds."""
        return set(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            CheckpointError: the file does not hold it.
        """
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"the tensor {name} cannot be read ({error})",
                str(self._path),
                "take another checkpoint of the run",
            ) from error
        return tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorReader]:
    """Open a file for reading.

    Raises:
        CheckpointError: it is missing or is no safetensors file.
    """
    try:
        opened = safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the tensors cannot be read ({error})", str(path), "take another checkpoint of the run"
        ) from error
    with opened as file:
        yield TensorReader(path, file)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as fp32, in the order given.

    Layout: 8 bytes with the length of the header, the header in JSON (type, shape and place of each
    tensor), then the tensors' bytes one after the other. They go to a new file that then takes the name:
    tensors that were read from the old one lie in its memory map, and cutting it would end the process.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        entries[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    with atomic_file(path, unique=True) as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        for tensor in tensors.values():
            flat = tensor.detach().to("cpu", torch.float32).contiguous().view(-1)
            data = flat.view(torch.uint8).numpy().data
            for start in range(0, len(data), _CHUNK):
                file.write(data[start : start + _CHUNK])


WEIGHTS_FILE = "weights.safetensors"


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
    """The mean of each weight (section 4.2 of the paper) in fp32, summed in double precision.

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
        write_tensors(folder / WEIGHTS_FILE, self.weights)
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
