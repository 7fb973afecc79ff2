"""Attention of the few rows of an AR step on a CPU: five beams, say, that look at 400 source tokens.

torch's CPU kernel is made for long blocks of queries, and its batched products of a few rows run at a
fraction of what the memory gives. NumPy's BLAS does better by two to three where keys are stored column by
column, which the keys that a search keeps can be: they are written once and read at every step.

Shape letters: B sentences, H heads, T rows, S keys, E width of a head.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["attend_few", "by_columns", "few_rows", "stored_by_columns", "wants_columns"]

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
