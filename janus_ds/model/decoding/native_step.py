"""All layers of the encoder, or of the decoder, over the rows of a pass: one call of `janus_ds/native/`.

Shape letters: X sentences, or their length candidates, R content rows of each, Q rows of each (see `steps`),
L rows of each that see one another, P rows of the last layer, D width, H heads, E width of a head, N columns
of the pool.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor, nn

from janus_ds.native.kernels import ACTIVATIONS, PANEL, Layer, Matrix, Step, compiled, packed

if TYPE_CHECKING:
    from janus_ds.model.attention import KeysValues
    from janus_ds.model.decoding.cache import EncoderOutput
    from janus_ds.model.transformer import DecoderLayer, EncoderLayer, InputRows

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
        # Not `parameters()`: its walk through the modules would take as long as a layer.
        self._modules = self._modules or list(self._stack.modules())
        held = [p for module in self._modules for p in module._parameters.values() if p is not None]
        state = [(p.data_ptr(), p._version) for p in held]
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
        for layer, (keys, values) in zip(self._layers, pool, strict=True):
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
        for layer, source in zip(self._layers, memory.source if memory else (), strict=False):
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
            layers=len(self._layers),
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
        kernels.janus_step(ctypes.addressof(step), self._layers, self._kind, hidden_XQD.data_ptr())
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
