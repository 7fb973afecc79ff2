"""Kernels for inference on a CPU: weights packed for oneDNN or in int8, attention of few rows by NumPy.

torch's `F.linear` lays the weights of a CPU out anew at every call, which costs more than the product
itself where few rows meet a large matrix: every step of a search. oneDNN's own layout is made once here.
The two operators are those that torch.compile emits for CPUs; they are no public interface of torch, so
each is tried once on a small matrix, and where it is missing or wrong `F.linear` stays.

int8 is dynamic: weights have one scale an output feature, activations one a row, found at each call. A
row's result therefore does not depend on the other rows of its batch.

A call must cost little, since a step of a search makes fifty products of a few rows: an activation goes
along with its product, several products of one input are one, and prepared layers take no hooks.

A prepared layer holds the very parameters of the layer that it replaces, under the same names, and packs
them at the first call and again after any change.

Attention: torch's CPU kernel is made for long blocks of queries, and its batched products of a few rows (five
beams that look at 400 source tokens) run at a fraction of what the memory gives. NumPy's BLAS is two to three
times faster where keys are stored column by column, which the keys that a search keeps can be.

Shape letters: B sentences, H heads, T rows, S keys, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]
"""x (..., in) -> x W^T + b, (..., out)."""

_ROWS_HINT = 8
_LEVELS, _ZERO_POINT, _TINY = 127, 128, 1e-12
_FEW_VALUES = 1 << 14
"""Activations up to which NumPy quantizes faster (measured: 10 x 512 in half the time, 160 x 512 slower)."""
_TRIED_SHAPE = (3, 16, 32)
_LINEAR = "none"
_ALGORITHMS = {_LINEAR: "", "relu": "", "gelu": "none"}
"""Functions that oneDNN can apply to a product's result before it writes it, and how."""
_ACTIVATIONS: dict[str, Product] = {_LINEAR: lambda x: x, "relu": F.relu, "gelu": F.gelu}


def _packed_product(weight: Tensor, bias: Tensor | None, activation: str = _LINEAR) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), _ROWS_HINT)
    offset = None if bias is None else bias.detach()
    multiply, algorithm = torch.ops.mkldnn._linear_pointwise.default, _ALGORITHMS[activation]

    def product(x: Tensor) -> Tensor:
        out: Tensor = multiply(x, packed, offset, activation, [], algorithm)
        return out

    return product


def _codes(flat_XI: Tensor) -> tuple[Tensor, Tensor]:
    """Activations as uint8 around 128, and the largest magnitude of each row, (X, 1)."""
    largest_X1 = flat_XI.abs().amax(-1, True).clamp_min_(_TINY)
    # Rounded before it is converted, and to int8: converting to uint8 is ten times slower. The
    # highest bit turned is 128 added.
    rounded = (flat_XI * (_LEVELS / largest_X1)).round_().to(torch.int8)
    return rounded.view(torch.uint8).bitwise_xor_(128), largest_X1


def _few_codes(flat_XI: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`_codes` by NumPy, whose calls cost half as much as torch's."""
    values = flat_XI.detach().numpy()
    largest = np.maximum(np.abs(values).max(1, keepdims=True), np.float32(_TINY))
    # What is not finite stays so in the result, by `largest`.
    with np.errstate(invalid="ignore"):
        rounded = np.rint(values * (_LEVELS / largest)).astype(np.int8)
    return torch.from_numpy(rounded.view(np.uint8) ^ 128), torch.from_numpy(largest)


def _int8_product(weight: Tensor, bias: Tensor | None, activation: str = _LINEAR) -> Product:
    weight = weight.detach().float()
    largest_O = weight.abs().amax(1).clamp_min(_TINY)
    rounded = (weight * (_LEVELS / largest_O)[:, None]).round().to(torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(rounded, [_ROWS_HINT, weight.shape[1]])
    scale_O, zero_O = largest_O / _LEVELS**2, torch.zeros(len(weight), dtype=torch.long)
    offset = None if bias is None else bias.detach().float()
    multiply, finish = torch.ops.onednn.qlinear_pointwise.default, _ACTIVATIONS[activation]

    def product(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        codes, largest_X1 = (_few_codes if flat.numel() <= _FEW_VALUES else _codes)(flat)
        out: Tensor = multiply(
            codes, 1.0, _ZERO_POINT, packed, scale_O, zero_O, None, 1.0, 0, torch.float32, "none", [], ""
        )
        # In place: a fresh tensor of this size costs more than the arithmetic.
        out = out.mul_(largest_X1) if offset is None else torch.addcmul(offset, out, largest_X1, out=out)
        return finish(out).view(*x.shape[:-1], -1)

    return product


@runtime_checkable
class Preparable(Protocol):
    """A module that has more to prepare than its linear layers: products that can be joined, say."""

    def prepare_products(self, int8: bool) -> None:
        """Do so from now on; its linear layers are prepared already."""


@cache
def _works(kind: str, dtype: torch.dtype) -> bool:
    """Whether an operator is there and right: torch does not promise it."""
    rows, columns, out = _TRIED_SHAPE
    value = torch.linspace(-1.0, 1.0, rows * columns).sin().view(rows, columns)
    weight = torch.linspace(-2.0, 2.0, out * columns).cos().view(out, columns)
    bias = torch.linspace(0.0, 1.0, out)
    expected, build = F.linear(value, weight, bias), {"packed": _packed_product, "int8": _int8_product}[kind]
    try:
        with torch.no_grad():
            found = build(weight.to(dtype), bias.to(dtype))(value.to(dtype))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    tolerance = 1e-5 if (kind, dtype) == ("packed", torch.float32) else 0.1
    return bool((found.float() - expected).abs().max() < tolerance)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of this precision for the CPU, and rightly."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    return _works("packed", dtype)


def can_quantize() -> bool:
    """Whether this build of torch multiplies int8 by oneDNN, and rightly."""
    return torch.backends.mkldnn.is_available() and _works("int8", torch.float32)


def product_of(weight: Tensor, bias: Tensor | None, int8: bool, activation: str = _LINEAR) -> Product:
    """The fastest product with a weight on its device and in its precision.

    Args:
        weight: (out, in).
        bias: (out,) or None.
        int8: quantize; the weight is float32 on the CPU.
        activation: none, relu or gelu: applied to the result.
    """
    if int8:
        return _int8_product(weight, bias, activation)
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        return _packed_product(weight, bias, activation)
    finish = _ACTIVATIONS[activation]
    return lambda x: finish(F.linear(x, weight, bias))


class PreparedProduct:
    """The product with weights that are packed at the first call, and again after any change of them.

    Several weights of one input are packed as one: their results come side by side.
    """

    def __init__(self, int8: bool = False, activation: str = _LINEAR) -> None:
        self._int8, self._activation = int8, activation
        self._product: Product | None = None
        self._state: list[tuple[int, int, torch.dtype]] = []

    def __call__(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        """x W^T + b, (..., sum of outs)."""
        # _version counts changes in place, by an optimizer or load_state_dict.
        state = [(weight.data_ptr(), weight._version, weight.dtype) for weight in weights]
        if self._product is None or state != self._state:
            weight, self._state = _joined(weights), state
            self._product = product_of(cast(Tensor, weight), _joined(biases), self._int8, self._activation)
        return self._product(x)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part.detach() for part in parts if part is not None]
    return present[0] if len(present) == 1 else torch.cat(present) if present else None


class PreparedLinear(nn.Module):
    """A linear layer for inference, on the parameters of another one.

    Args:
        layer: whose parameters are used; they stay under their names.
        int8: quantize them.
        activation: none, relu or gelu: applied to the result.
    """

    def __init__(self, layer: nn.Linear, int8: bool = False, activation: str = _LINEAR) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._product = PreparedProduct(int8, activation)

    def __call__(self, x: Tensor) -> Tensor:
        """See :data:`Product`. Without hooks: they would cost as much as a small product."""
        parameters = self._parameters
        return self._product(x, [cast(Tensor, parameters["weight"])], [parameters.get("bias")])


class PreparedNorm(nn.Module):
    """A layer norm for inference, on the parameters of another one."""

    def __init__(self, layer: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._shape, self._eps = layer.normalized_shape, layer.eps

    def __call__(self, x: Tensor) -> Tensor:
        """The norm, without hooks."""
        parameters = self._parameters
        return torch.layer_norm(x, self._shape, parameters["weight"], parameters["bias"], self._eps)


def prepare(model: nn.Module, int8: bool = False) -> None:
    """Replace the linear layers and norms of a model by prepared ones, in place.

    Gradients no longer flow.

    Args:
        model: any; its parameters and their names stay.
        int8: quantize the weights; activations follow at each call.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PreparedLinear(child, int8))
            elif isinstance(child, nn.LayerNorm):
                setattr(parent, name, PreparedNorm(child))
        if isinstance(parent, Preparable):
            parent.prepare_products(int8)


# Attention of the few rows of an AR step

_MOST_PRODUCTS = {1: 1 << 20, 2: 1 << 18}
"""Multiplications T x S x E a head up to which this way was faster, by threads; with more threads torch,
which deals heads out to them, was. BLAS begins no threads of its own below 2 ** 18."""


def wants_columns(k_BHSE: Tensor) -> bool:
    """Whether keys that few rows will see often should be stored by columns on this device."""
    return (
        k_BHSE.device.type == "cpu"
        and k_BHSE.dtype == torch.float32
        and torch.get_num_threads() in _MOST_PRODUCTS
    )


def by_columns(k_BHSE: Tensor) -> Tensor:
    """The same keys, stored column by column: S runs fastest."""
    return k_BHSE.transpose(2, 3).contiguous().transpose(2, 3)


def stored_by_columns(k_BHSE: Tensor) -> bool:
    """Whether :func:`by_columns` has stored these keys."""
    return k_BHSE.stride(2) == 1 and k_BHSE.stride(3) > 1


def few_rows(q_BHTE: Tensor, k_BHSE: Tensor) -> bool:
    """Whether so few rows see keys stored by columns that :func:`attend_few` is the faster way."""
    if q_BHTE.requires_grad or not wants_columns(k_BHSE):
        return False
    products = q_BHTE.shape[2] * k_BHSE.shape[2] * k_BHSE.shape[3]
    return products <= _MOST_PRODUCTS[torch.get_num_threads()]


def attend_few(q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(E) + mask) v, shape (B, T, H, E), without gradients.

    Args:
        q_BHTE: queries, float32, on the CPU.
        k_BHSE: keys; fast where :func:`by_columns` stored them.
        v_BHSE: values.
        mask: additive, broadcast to (B, H, T, S); or None.
    """
    sentences, heads, rows, width = q_BHTE.shape
    scaled = (q_BHTE * width**-0.5).numpy()
    score_BHTS = torch.from_numpy(np.matmul(scaled, k_BHSE.numpy().swapaxes(2, 3)))
    if mask is not None:
        score_BHTS += mask
    weight_BHTS = torch.softmax(score_BHTS, 3)
    out = np.empty((sentences, rows, heads, width), np.float32)
    np.matmul(weight_BHTS.numpy(), v_BHSE.numpy(), out=out.swapaxes(1, 2))
    return torch.from_numpy(out)
