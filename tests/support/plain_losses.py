"""The loss terms in their plain form, for rows of whole logits.

These are the reference that the fused head is held against, sums excluded.
Softmax runs in float32 at least; float64 stays float64. Shapes: N rows, V vocabulary, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """16-bit tensors as float32, others unchanged."""
    return x.float() if x.dtype.itemsize < 4 else x


def label_smoothed_cross_entropy(
    logits_NV: Tensor, target_N: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    """LS(z, t) = (1 - eps) nll + eps * mean_v(-log p_v), and the nll alone (section 3 of the paper).

    Returns:
        both losses of each row, shape (N,).
    """
    log_p_NV = F.log_softmax(at_least_float32(logits_NV), dim=-1)
    nll_N = -log_p_NV.gather(-1, target_N[:, None]).squeeze(-1)
    return (1.0 - smoothing) * nll_N - smoothing * log_p_NV.mean(-1), nll_N


def symmetric_kl(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    """K(p, q) = 1/2 [KL(p||q) + KL(q||p)] of two rows of logits, gradients on both sides; shape (N,)."""
    log_p = F.log_softmax(at_least_float32(first_NV), dim=-1)
    log_q = F.log_softmax(at_least_float32(second_NV), dim=-1)
    # The sum of both directions: (p - q)(log p - log q).
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
