"""Layers for inference on a CPU: weights packed for our own kernels (`native_step.py`) or for oneDNN.

torch's `F.linear` lays the weights of a CPU out anew at every call, which costs more than the product
itself where few rows meet a large matrix: every step of a search. Our kernels multiply in fp32 and int8. In
bf16, and where no compiler could make them, oneDNN does: its operators are those that torch.compile emits for
CPUs and no public interface of torch, so they are tried once on a small matrix, and where they are missing or
wrong `F.linear` stays.

int8 is dynamic: weights have one scale an output feature, activations one a row, found at each call. A
row's result therefore does not depend on the other rows of its batch.

A call must cost little: an activation goes along with its product, several products of one input are one, and
prepared layers take no hooks. A prepared layer holds the very parameters of the layer that it replaces, under
the same names, and packs them at the first call and again after any change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ds.model.decoding.native_step import changes, compiled, packed, product

Product = Callable[[Tensor], Tensor]
"""x (..., in) -> x W^T + b, (..., out)."""

_ROWS_HINT = 8
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


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs weights of this precision for the CPU, and rightly."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    rows, columns, out = _TRIED_SHAPE
    value = torch.linspace(-1.0, 1.0, rows * columns).sin().view(rows, columns)
    weight = torch.linspace(-2.0, 2.0, out * columns).cos().view(out, columns)
    bias = torch.linspace(0.0, 1.0, out)
    try:
        with torch.no_grad():
            found = _packed_product(weight.to(dtype), bias.to(dtype))(value.to(dtype))
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    return bool((found.float() - F.linear(value, weight, bias)).abs().max() < tolerance)


def product_of(weight: Tensor, bias: Tensor | None, int8: bool, activation: str = _LINEAR) -> Product:
    """The fastest product with a weight on its device and in its precision.

    Args:
        weight: (out, in).
        int8: quantize; the weight is float32 on the CPU.
        activation: none, relu or gelu: applied to the result.
    """
    kernels = compiled() if weight.device.type == "cpu" and weight.dtype == torch.float32 else None
    if kernels is not None:
        matrix = packed(weight, bias, int8)
        return lambda x: product(kernels, matrix, x, activation)
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
        state = [(weight.data_ptr(), changes(weight), weight.dtype) for weight in weights]
        if self._product is None or state != self._state:
            weight, self._state = _joined(weights), state
            self._product = product_of(cast(Tensor, weight), _joined(biases), self._int8, self._activation)
        return self._product(x)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part.detach() for part in parts if part is not None]
    return present[0] if len(present) == 1 else torch.cat(present) if present else None


class PreparedLinear(nn.Module):
    """A linear layer for inference, on the parameters of another one, and the activation behind it."""

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
        self._shape, self.eps = layer.normalized_shape, layer.eps

    def __call__(self, x: Tensor) -> Tensor:
        """The norm, without hooks."""
        parameters = self._parameters
        return torch.layer_norm(x, self._shape, parameters["weight"], parameters["bias"], self.eps)


def prepare(model: nn.Module, int8: bool = False) -> None:
    """Replace the linear layers and norms of a model by prepared ones, in place; its parameters stay, under
    their names. Gradients no longer flow."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, PreparedLinear(child, int8))
            elif isinstance(child, nn.LayerNorm):
                setattr(parent, name, PreparedNorm(child))
        # Some have more to prepare than their linear layers: products that can be joined, say.
        more = getattr(parent, "prepare_products", None)
        if more is not None:
            more(int8)
