"""Training in bf16 on a CPU: what torch has slow kernels for there, in other operations.

Measured on an AMD EPYC with avx512_bf16, torch 2.13, one thread: attention over 26 tokens, forward and
backward, takes twice as long as products and a softmax, `bernoulli_` five times as long as random integers.
Shape letters as in `attention`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_PAIRS = 1 << 14
"""Rows x keys up to which products are faster; beyond them their memory would matter, too."""


def trains_in_bf16(x: Tensor) -> bool:
    """Whether this is what the other operations are for."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.requires_grad


def attend(
    q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention, (B, H, T, E), with scores and softmax in fp32.

    Args:
        q_BHTE: in training, bf16.
        k_BHSE: keys.
        v_BHSE: values.
        mask: additive.
        is_causal: row t sees the keys 0 .. t.
    """
    rows, keys = q_BHTE.shape[2], k_BHSE.shape[2]
    if rows * keys > _PAIRS:
        return F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, is_causal=is_causal)
    scale = q_BHTE.shape[3] ** -0.5
    scores = torch.matmul(q_BHTE.float() * scale, k_BHSE.float().transpose(2, 3))
    if is_causal:
        scores = scores.masked_fill(torch.ones(rows, keys, dtype=torch.bool).triu(1), -math.inf)
    scores = scores if mask is None else scores + mask
    return torch.matmul(scores.softmax(-1).to(v_BHSE.dtype), v_BHSE)


def dropout(x: Tensor, rate: float) -> Tensor:
    """Like `F.dropout` in training; rates are multiples of 2^-16, as four elements share a random number.

    A compiled model takes the compiler's own dropout.
    """
    if not trains_in_bf16(x) or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    level = drawn.view(torch.int16)[: x.numel()].view(x.shape)
    return x * (level >= round(rate * (1 << 16)) - (1 << 15)).to(x.dtype).mul_(1 / (1 - rate))
