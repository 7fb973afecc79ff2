"""Files that others wrote, read without executing anything in them.

Pickled files go through `torch.load(weights_only=True)`, which admits tensors and plain containers, and
beside them the inert `argparse.Namespace` in which fairseq keeps its arguments.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from janus_ds.errors import CheckpointError
from janus_ds.io import open_regular, read_json

_AGAIN = "fetch or copy the file again"
_MOST_COPIES = 4
"""BART's tied table may stand under as many names, all on one storage."""
_SAFETENSORS, _PICKLED = "model.safetensors", "pytorch_model.bin"


def read_torch_file(path: Path) -> Any:
    """What `torch.save` wrote.

    Raises:
        CheckpointError: the file is missing or damaged, or wants code to be run.
    """
    try:
        _refuse_inflated(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("there is no such file", str(path), "check the path") from None
    except pickle.UnpicklingError as error:
        raise _refused(error, path) from None
    except (RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"the file cannot be read: {reason}", str(path), _AGAIN) from None


def _refuse_inflated(path: Path) -> None:
    """Refuse an archive whose members grow when they are read; `torch.save` compresses nothing.

    Raises:
        OSError, ValueError: it is such a file, or none that can be read.
    """
    os.close(open_regular(path))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise ValueError("its members are larger than the file")


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: the file is missing, cut, or holds something else.
    """
    try:
        return read_json(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path.name}", str(path), "give a folder that holds it; nothing is downloaded"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the file is not JSON as it should be ({error})", str(path), _AGAIN) from None


@contextmanager
def unknown_forms(where: str) -> Iterator[None]:
    """Turn what settings or tensors of an unforeseen form lead to into an error that names the file.

    Raises:
        CheckpointError: in place of Python's error, which it quotes.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise CheckpointError(
            f"settings or tensors are not of the known form ({type(error).__name__}: {reason[:200]})",
            where,
            _AGAIN,
        ) from error


def read_state_dict(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The weights in a folder of Hugging Face's layout, and the file they came from.

    That is `model.safetensors`, or else `pytorch_model.bin`; either may be in shards with an index.

    Raises:
        CheckpointError: there are none, a file or a shard is missing or damaged, or the shards do not
            hold what their index says.
    """
    for name, read in ((_SAFETENSORS, _read_safetensors), (_PICKLED, _read_pickled)):
        if (folder / name).is_file():
            return read(folder / name), name
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index, read), index.name
    raise CheckpointError(
        "the folder holds no weights",
        str(folder),
        f"give a folder with {_SAFETENSORS} or {_PICKLED}, whole or in shards with their index",
    )


def _read_shards(index: Path, read: Any) -> dict[str, Tensor]:
    places = read_settings(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(p, str) and p == Path(p).name for p in places.values()
    ):
        raise CheckpointError("the index has no weight_map of file names", str(index), _AGAIN)
    state: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        if not (index.parent / shard).is_file():
            raise CheckpointError(
                f"the shard {shard} that the index names is missing",
                str(index),
                "copy all files of the folder",
            )
        state |= read(index.parent / shard)
    lost = [name for name in places if name not in state]
    if lost:
        raise CheckpointError(
            f"{lost[0]} is in none of the shards ({len(lost)} such names)",
            str(index),
            "copy all files of the folder again, from one model",
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the file is cut or damaged ({error})", f"{path}, {path.stat().st_size} bytes", _AGAIN
        ) from None


def _read_pickled(path: Path) -> dict[str, Tensor]:
    loaded = read_torch_file(path)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError("the file is no dictionary of tensors", str(path), "give a model's own file")
    refuse_expanded(loaded, path)
    return loaded


def refuse_expanded(state: dict[str, Tensor], path: Path) -> None:
    """Refuse tensors that are larger than the file they came from, before they are copied.

    Views of one number, or of one another, take no room in a file and any room in memory.

    Raises:
        CheckpointError: there are such tensors, or some that are not dense.
    """
    odd = [name for name, value in state.items() if value.layout != torch.strided or value.is_meta]
    total = 0
    for name, value in state.items() if not odd else ():
        size = value.numel() * value.element_size()
        total += size
        if size > value.untyped_storage().nbytes():
            odd.append(name)
    if odd or total > _MOST_COPIES * path.stat().st_size:
        raise CheckpointError(
            f"the file holds tensors larger than itself{', first ' + odd[0] if odd else ''}",
            str(path),
            "give a model's own file",
        )


def _refused(error: Exception, path: Path) -> CheckpointError:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        return CheckpointError("the file is not a torch checkpoint", str(path), "fetch or copy it again")
    return CheckpointError(
        f"the file refers to {found[1]}, which would have to be imported and run",
        str(path),
        "on a machine where you trust the file, load it with fairseq, and save a dict of its `model` "
        "and of `args`, an argparse.Namespace with encoder_attention_heads and the like",
    )
