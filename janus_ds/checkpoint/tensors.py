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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from janus_ds.checkpoint.manifest import WEIGHTS_FILE, fault_of, step_folders, weights_in
from janus_ds.config.locations import model_path
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.io import atomic_file
from janus_ds.model.weights import readable

_ALIGNMENT = 8
_CHUNK = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as fp32, in the order given.

    Layout: 8 bytes with the length of the header, the header in JSON (type, shape and place of each
    tensor), then the tensors' bytes one after the other. They go to a new file that then takes the name:
    tensors that were read from the old one lie in its memory map, and cutting it would end the process.
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file."""
    with readable(path, "weights"):
        return load_file(str(path))


def find_weights(source: Path) -> Path:
    """The weights file of a run folder (its newest checkpoint), a checkpoint folder, or the file itself.

    A model that the package ships may be given by its name.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if source.is_file():
        return source
    source = model_path(source)
    found = weights_in(source)
    if found is None:
        raise CheckpointError(
            "there are no weights here",
            str(source),
            f"give a run folder, a checkpoint folder (step-NNNNNNNN) or a {WEIGHTS_FILE}",
        )
    return found


def last_checkpoints(run: Path, count: int) -> list[Path]:
    """The weights files of a run's last `count` checkpoints, oldest first.

    Raises:
        UsageError: a count below 1.
        CheckpointError: there are fewer, or one of them is damaged.
    """
    if count < 1:
        raise UsageError(f"{count} checkpoints cannot be averaged", "--average", "give 1 or more")
    folders = step_folders(run / "checkpoints")
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

ReadTensor = Callable[[str, str | None], Tensor]
"""Gives a weight by name (second argument None) or the moment of it named second, whole, in fp32."""

_BYTES_PER_PARAMETER = 4 * (1 + len(MOMENTS))


@dataclass(frozen=True)
class Snapshot:
    """The state of training at one step, on the host of the first rank.

    Args:
        weights: fp32 weights by name.
        moments: `MOMENT.NAME` -> tensor of the weight's shape.
        counters: Adam's step counter and the state of fp16's loss scale; plain values.
    """

    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    counters: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write the tensors; `counters` go into the checkpoint's state."""
        write_tensors(folder / WEIGHTS_FILE, self.weights)
        write_tensors(folder / OPTIMIZER_FILE, self.moments)


@contextmanager
def open_saved(folder: Path) -> Iterator[ReadTensor]:
    """Open the tensors of a checkpoint, to be read one at a time."""
    with ExitStack() as stack:

        def opened(path: Path) -> Any:
            with readable(path, "tensors"):
                return stack.enter_context(safe_open(str(path), framework="pt"))

        weights, moments = opened(folder / WEIGHTS_FILE), opened(folder / OPTIMIZER_FILE)

        def read(name: str, moment: str | None) -> Tensor:
            file, key = (weights, name) if moment is None else (moments, f"{moment}.{name}")
            path = folder / (WEIGHTS_FILE if moment is None else OPTIMIZER_FILE)
            with readable(path, f"tensor {key}"):
                tensor: Tensor = file.get_tensor(key)
            return tensor

        yield read


def snapshot_bytes(parameters: int) -> int:
    """Bytes of a checkpoint's tensors for a model with so many parameters."""
    return parameters * _BYTES_PER_PARAMETER
