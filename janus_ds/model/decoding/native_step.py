"""All decoder layers of an AR step in one call of the kernels of `janus_ds/native/`.

Shape letters: B sentences, R content rows, Q rows of a step (see `steps`), D width, N columns of the pool.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from janus_ds.native.kernels import ACTIVATIONS, PANEL, Layer, Matrix, Step, compiled, packed

if TYPE_CHECKING:
    from janus_ds.model.decoding.cache import KVCache
    from janus_ds.model.decoding.steps import BlockRows
    from janus_ds.model.transformer import Decoder, DecoderLayer

_LANES = 16
_MOST_ROWS = 32
"""Of a step in bf16: for more, oneDNN multiplies at least as fast, and by far faster on CPUs with AMX."""


class NativeDecoder:
    """The layers of a decoder with packed weights."""

    def __init__(self, int8: bool) -> None:
        self._int8 = int8
        self._kernels: ctypes.CDLL | None = None
        self._state: list[tuple[int, int, torch.dtype]] = []
        self._kept: list[Matrix | Tensor] = []
        self._layers: ctypes.Array[Layer]
        self._heads, self._epsilon, self._activation, self._kind = 0, 0.0, 0, 0

    def prepare(self, decoder: Decoder) -> None:
        """Pack the weights, where the kernels can take them, unless they are packed and have not changed."""
        weight = decoder.positions.weight
        state = [(p.data_ptr(), p._version, p.dtype) for p in decoder.parameters()]
        if state == self._state:
            return
        self._state, self._kept, self._kernels = state, [], None
        layers = decoder.decoder_layers()
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

    def takes(self, x_BQD: Tensor) -> bool:
        """Whether a step over these rows is to be computed here."""
        few = x_BQD.dtype == torch.float32 or x_BQD.shape[:2].numel() <= _MOST_ROWS
        return few and self._kernels is not None

    def __call__(self, x_BQD: Tensor, rows: BlockRows, cache: KVCache) -> Tensor:
        """Rows after the last layer, (B, R, D): query rows if there are any, else content rows.

        Args:
            x_BQD: rows that enter the first layer; overwritten.
            rows: what they see, and which columns the content rows take.
            cache: takes their keys and values.
        """
        hidden_BQD = x_BQD.float().contiguous()
        mask = None if rows.mask_B1QN is None else rows.mask_B1QN.float().contiguous()
        valid_BS, column_BR = cache.memory.valid_BS.contiguous(), rows.column_BR
        column = None if column_BR is None else column_BR.contiguous()
        held = zip(self._layers, cache.keys, cache.values, cache.memory.source, strict=True)
        for layer, keys, values, source in held:
            layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
            layer.source_keys, layer.source_values = (part.data_ptr() for part in source)
        step = Step(
            sentences=len(hidden_BQD),
            content=rows.content,
            queries=hidden_BQD.shape[1] - rows.content,
            columns=cache.keys[0].shape[2],
            end=rows.end,
            source=valid_BS.shape[1],
            width=hidden_BQD.shape[2],
            heads=self._heads,
            layers=len(self._layers),
            activation=self._activation,
            threads=torch.get_num_threads(),
            epsilon=self._epsilon,
            column=None if column is None else column.data_ptr(),
            mask=None if mask is None else mask.data_ptr(),
            valid=valid_BS.data_ptr(),
        )
        kernels = cast(ctypes.CDLL, self._kernels)
        kernels.janus_step(ctypes.addressof(step), self._layers, self._kind, hidden_BQD.data_ptr())
        return hidden_BQD[:, -rows.content :].to(x_BQD.dtype)

    def _packed(self, layer: DecoderLayer) -> Layer:
        own, cross = layer.self_attention, layer.cross_attention
        joint = [_parameters(part) for part in (own.q, own.k, own.v)]
        parts = {
            "qkv": (torch.cat([weight for weight, _ in joint]), torch.cat([bias for _, bias in joint])),
            "self_out": _parameters(own.out),
            "cross_query": _parameters(cross.q),
            "cross_out": _parameters(cross.out),
            "inner": _parameters(layer.fc1),
            "outer": _parameters(layer.fc2),
        }
        matrices = {name: packed(weight, bias, self._int8) for name, (weight, bias) in parts.items()}
        norms = {
            "self": layer.self_attention_norm,
            "cross": layer.cross_attention_norm,
            "outer": layer.ffn_norm,
        }
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
