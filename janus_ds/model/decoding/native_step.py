"""The C++ kernels of `step.cpp`: compiled once for this machine, and called on tensors; and all layers of the
encoder, or of the decoder, over the rows of a pass, which are one call of them.

At first use a C++ compiler (`CXX`, g++ or clang++) makes a library of it for the instructions of this CPU, in
about three seconds, and keeps it in the user's cache under a name that depends on source and CPU. It uses no
header of torch. Without a compiler, or with JANUS_NATIVE=0, PyTorch does the work.

Shape letters: I inputs, O outputs; X sentences, or their length candidates, R content rows of each, Q rows of
each (see `steps`), L rows of each that see one another, P rows of the last layer, D width, H heads, E width
of a head, N columns of the pool.
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
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from janus_ds.model.attention import KeysValues
    from janus_ds.model.decoding.cache import EncoderOutput
    from janus_ds.model.transformer import DecoderLayer, EncoderLayer, InputRows

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("step.cpp")
ACTIVATIONS = ("none", "relu", "gelu")
PANEL = 32
"""Outputs whose weights stand side by side."""
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_TUNED = ("-march=native", "-fopenmp")
_LEVELS, _TINY = 127, 1e-12
_PACKING = threading.Lock()


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
    for place in (folder.parent, folder):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def changes(parameter: Tensor) -> int:
    """Counts changes in place, by an optimizer or load_state_dict; 0 of tensors made in inference mode."""
    return 0 if parameter.is_inference() else parameter._version


def packed(weight_OI: Tensor, bias_O: Tensor | None, int8: bool = False) -> Matrix:
    """A weight as the kernels take it: panels of outputs, in words of one fp32, two bf16 or four int8 values.

    The weight is float32 or bfloat16; int8 quantizes it, with one scale an output.
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


_LANES = 16
_MOST_ROWS, _LONGEST = 32, 128
"""Of a pass in bf16: for more, oneDNN multiplies at least as fast, and by far faster on CPUs with AMX. Rows
that see one another: for more, torch's attention is faster."""


class SeenRows(NamedTuple):
    """What the rows of a pass see of the pool, and which of them are wanted."""

    content: int
    """R."""
    end: int
    """Columns of the pool that anything is in."""
    mask: Tensor | None = None
    """Additive, of (X, Q or 1, end) elements; None: every row sees all columns."""
    column_XR: Tensor | None = None
    """Columns that the content rows take; None: those that end at `end`, in order."""
    picked_P: Tensor | None = None
    """Flat indices into the (X, R) rows, ascending; None: the query rows, or all where there are none."""


class NativeLayers:
    """The layers of an encoder or a decoder with packed weights."""

    def __init__(self, stack: InputRows, int8: bool) -> None:
        self._stack, self._int8 = stack, int8
        self._kernels: ctypes.CDLL | None = None
        self._state: list[tuple[int, int]] = []
        self._modules: list[nn.Module] = []
        self._kept: list[Matrix | Tensor] = []
        self._layers: ctypes.Array[Layer]
        self._heads, self._epsilon, self._activation, self._kind = 0, 0.0, 0, 0

    def prepare(self) -> None:
        """Pack the weights, where the kernels can take them, unless they are packed and have not changed."""
        with _PACKING:
            self._prepare()

    def _prepare(self) -> None:
        # Not `parameters()`: its walk through the modules would take as long as a layer.
        self._modules = self._modules or list(self._stack.modules())
        held = [p for module in self._modules for p in module._parameters.values() if p is not None]
        state = [(p.data_ptr(), changes(p)) for p in held]
        if state == self._state:
            return
        self._state, self._kept, self._kernels = state, [], None
        layers = [cast("EncoderLayer | DecoderLayer", layer) for layer in self._stack.layers]
        weight = self._stack.positions.weight
        self._heads = layers[0].self_attention.heads
        width = weight.shape[1]
        fits = width % PANEL == 0 and width % (self._heads * _LANES) == 0
        if not fits or weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            return
        self._kernels = compiled()
        if self._kernels is not None:
            self._epsilon = layers[0].ffn_norm.eps
            self._activation = ACTIVATIONS.index(layers[0].activation_name)
            self._layers = (Layer * len(layers))(*map(self._packed, layers))

    def takes(self, x_XQD: Tensor, length: int = 0) -> bool:
        """Whether a pass over these rows, so many of which see one another, is to be computed here."""
        few = x_XQD.dtype == torch.float32 or x_XQD.shape[:2].numel() <= _MOST_ROWS
        return few and length <= _LONGEST and self._kernels is not None

    def bidirectional(
        self,
        x_XLD: Tensor,
        mask: Tensor | None,
        memory: EncoderOutput | None = None,
        picked_P: Tensor | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:
        """Rows that see all rows of their sentence or candidate, but for masked ones; see :meth:`__call__`.

        Returns:
            wanted rows, (P, D), and keys and values of all rows of each layer, (X, H, L, E).
        """
        count, length, width = x_XLD.shape
        shape = (2, count, self._heads, length, width // self._heads)
        pool = [(pair[0], pair[1]) for pair in (x_XLD.new_empty(shape) for _ in self._layers)]
        rows = SeenRows(length, length, mask, picked_P=picked_P)
        return self(x_XLD, pool, rows, memory), pool

    def __call__(
        self, x_XQD: Tensor, pool: Sequence[KeysValues], rows: SeenRows, memory: EncoderOutput | None = None
    ) -> Tensor:
        """Wanted rows after the last layer, (P, D).

        Args:
            x_XQD: rows that enter the first layer; overwritten.
            pool: takes keys and values of the content rows of each layer; each (X, H, N, E).
            rows: what they see.
            memory: of the sources, each for as many candidates; None for the encoder.
        """
        hidden_XQD, column, picked = x_XQD.float().contiguous(), rows.column_XR, rows.picked_P
        mask = None if rows.mask is None else rows.mask.float().contiguous()
        column = None if column is None else column.contiguous()
        valid_BS = None if memory is None else memory.valid_BS.contiguous()
        # Of this call alone: another thread may decode with the same model.
        layers = type(self._layers).from_buffer_copy(self._layers)
        for layer, (keys, values) in zip(layers, pool, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        for layer, source in zip(layers, memory.source if memory else (), strict=False):
            layer.source_keys, layer.source_values = (part.data_ptr() for part in source)
        candidates, per, width = hidden_XQD.shape
        step = Step(
            sentences=candidates,
            content=rows.content,
            queries=per - rows.content,
            columns=pool[0][0].shape[2],
            end=rows.end,
            source=0 if valid_BS is None else valid_BS.shape[1],
            width=width,
            heads=self._heads,
            layers=len(layers),
            activation=self._activation,
            threads=torch.get_num_threads(),
            share=candidates if valid_BS is None else candidates // len(valid_BS),
            mask_rows=0 if mask is None else mask.numel() // (candidates * rows.end),
            picks=0 if picked is None else len(picked),
            epsilon=self._epsilon,
            column=None if column is None else column.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            valid=None if valid_BS is None else valid_BS.data_ptr(),
            picked=None if picked is None else picked.data_ptr(),
        )
        kernels = cast(ctypes.CDLL, self._kernels)
        kernels.janus_step(ctypes.addressof(step), layers, self._kind, hidden_XQD.data_ptr())
        wanted = candidates * rows.content if picked is None else len(picked)
        return hidden_XQD.view(-1, width)[:wanted].to(x_XQD.dtype)

    def _packed(self, layer: EncoderLayer | DecoderLayer) -> Layer:
        own, cross = layer.self_attention, getattr(layer, "cross_attention", None)
        joint = [_parameters(part) for part in (own.q, own.k, own.v)]
        parts = {
            "qkv": (torch.cat([weight for weight, _ in joint]), torch.cat([bias for _, bias in joint])),
            "self_out": _parameters(own.out),
            "inner": _parameters(layer.fc1),
            "outer": _parameters(layer.fc2),
        }
        norms = {"self": layer.self_attention_norm, "outer": layer.ffn_norm}
        if cross is not None:
            parts |= {"cross_query": _parameters(cross.q), "cross_out": _parameters(cross.out)}
            norms["cross"] = cast("DecoderLayer", layer).cross_attention_norm
        matrices = {name: packed(weight, bias, self._int8) for name, (weight, bias) in parts.items()}
        vectors = {
            f"{name}_{kind}": vector.float()
            for name, norm in norms.items()
            for kind, vector in zip(("norm", "shift"), _parameters(norm), strict=True)
        }
        self._kept += [*matrices.values(), *vectors.values()]
        self._kind = matrices["qkv"].kind
        return Layer(**matrices, **{name: vector.data_ptr() for name, vector in vectors.items()})


def _parameters(part: nn.Module) -> tuple[Tensor, Tensor]:
    return cast(Tensor, part.weight), cast(Tensor, part.bias)
