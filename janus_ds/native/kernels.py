"""The kernels of `step.cpp`: compiled once for this machine, and called on tensors.

At first use a C++ compiler (`CXX`, g++ or clang++) makes a library of it for the instructions of this CPU, in
about three seconds, and keeps it in the user's cache under a name that depends on source and CPU. It uses no
header of torch. Without a compiler, or with JANUS_NATIVE=0, PyTorch does the work.

Shape letters: I inputs, O outputs, X rows.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("step.cpp")
ACTIVATIONS = ("none", "relu", "gelu")
PANEL = 32
"""Outputs whose weights stand side by side."""
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_TUNED = ("-march=native", "-fopenmp")
_LEVELS, _TINY = 127, 1e-12


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names.split()]


def _numbers(names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_int64) for name in names.split()]


class Matrix(ctypes.Structure):
    """As in step.cpp; `kept` holds the tensors that it points at."""

    _fields_ = _pointers("weight scale sum bias") + _numbers("inputs outputs")
    kept: tuple[Tensor, ...]
    kind: int


class Layer(ctypes.Structure):
    """As in step.cpp."""

    _fields_ = [
        *((name, Matrix) for name in ("qkv", "self_out", "cross_query", "cross_out", "inner", "outer")),
        *_pointers("self_norm self_shift cross_norm cross_shift outer_norm outer_shift"),
        *_pointers("keys values source_keys source_values"),
    ]


class Step(ctypes.Structure):
    """As in step.cpp."""

    _fields_ = [
        *_numbers("sentences content queries columns end source width heads"),
        *_numbers("layers activation threads share mask_rows picks"),
        ("epsilon", ctypes.c_double),
        *_pointers("column mask valid picked"),
    ]


@cache
def compiled() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be had, with a note, or are not wanted."""
    if os.environ.get("JANUS_NATIVE", "1") == "0":
        return None
    try:
        return load(_built(_cache_folder()))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("decoding goes on without its C++ kernels, slower and without int8: %s", error)
        return None


def load(path: Path) -> ctypes.CDLL:
    """A library that :func:`_built` has made."""
    made, pointer, number = ctypes.CDLL(str(path)), ctypes.c_void_p, ctypes.c_int64
    made.janus_step.argtypes = [pointer, pointer, number, pointer]
    made.janus_product.argtypes = [pointer, number, pointer, number, pointer, number, number]
    return made


def _cache_folder() -> Path:
    """Where this user's libraries lie; what lies there is run, so nobody else may write there, or above."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) / "janus_ds" / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place, forbidden in ((folder, 0o077), (folder.parent, 0o022)):
        facts = place.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & forbidden:
            raise OSError(f"{place} must be a folder of your own with mode 700: chmod 700 {place}")
    return folder


def _built(folder: Path, flags: tuple[str, ...] = _TUNED) -> Path:
    """The library for this source and CPU. Processes that build at once put the same file there, whole."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join((*flags, *_cpu())).encode()).hexdigest()[:24]
    target = folder / f"step-{key}.so"
    if target.exists():
        return target
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        raise OSError("there is no C++ compiler (CXX, g++ or clang++)")
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / target.name
        command = [
            compiler,
            "-O3",
            "-std=c++17",
            "-w",
            *flags,
            "-fPIC",
            "-shared",
            str(SOURCE),
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise OSError(f"{' '.join(command[:2])} failed: {done.stderr.strip()[-400:]}")
        made.replace(target)
    return target


def _cpu() -> tuple[str, ...]:
    """What instructions there are."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return platform.machine(), platform.processor(), flags


def packed(weight_OI: Tensor, bias_O: Tensor | None, int8: bool = False) -> Matrix:
    """A weight as the kernels take it: panels of outputs, in words of one fp32, two bf16 or four int8 values.

    Args:
        weight_OI: float32 or bfloat16.
        bias_O: or None.
        int8: quantize, with one scale an output.
    """
    kind = torch.int8 if int8 else weight_OI.dtype
    kept: list[Tensor] = []
    word = 4 // kind.itemsize
    outputs, inputs = weight_OI.shape
    step = 16 if int8 else word
    weight = F.pad(weight_OI.detach(), (0, -inputs % step, 0, -outputs % PANEL))
    matrix = Matrix(inputs=inputs, outputs=outputs)
    matrix.kind = _KINDS[kind]
    if int8:
        weight = weight.float()
        largest_O = weight.abs().amax(1).clamp_min(_TINY)
        weight = (weight * (_LEVELS / largest_O)[:, None]).round().to(torch.int8)
        kept += [largest_O / _LEVELS**2, weight.sum(1, dtype=torch.int32)]
        matrix.scale, matrix.sum = (part.data_ptr() for part in kept)
    kept.append(weight.view(-1, PANEL, weight.shape[1] // word, word).transpose(1, 2).contiguous())
    matrix.weight = kept[-1].data_ptr()
    if bias_O is not None:
        kept.append(F.pad(bias_O.detach().float(), (0, -outputs % PANEL)))
        matrix.bias = kept[-1].data_ptr()
    matrix.kept = tuple(kept)
    return matrix


def product(kernels: ctypes.CDLL, matrix: Matrix, x: Tensor, activation: str = "none") -> Tensor:
    """activation(x W^T + b) in float32, (..., O); a row's result does not depend on the rows beside it."""
    flat_XI = x.reshape(-1, matrix.inputs).float().contiguous()
    out_XO = torch.empty(len(flat_XI), matrix.outputs)
    kernels.janus_product(
        ctypes.addressof(matrix),
        matrix.kind,
        flat_XI.data_ptr(),
        len(flat_XI),
        out_XO.data_ptr(),
        ACTIVATIONS.index(activation),
        torch.get_num_threads(),
    )
    return out_XO.view(*x.shape[:-1], -1)
