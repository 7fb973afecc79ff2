"""Writing and reading safetensors files piece by piece.

The library's own writer copies every tensor and holds the interpreter while it writes; a save in a
background thread would stop the training that it is to leave alone. This one writes straight from
the tensors' memory. Reading is the library's.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from janus_ds.errors import CheckpointError
from janus_ds.io import atomic_file

__all__ = ["TensorReader", "open_tensors", "write_tensors"]

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
