"""Losses of a chunk of logits, and their gradient in closed form (eq. 1-5 of the paper).

G streams predict the same n tokens (AR, NAR, AUX; or AR alone), z_GnV are their logits over this
rank's V vocabulary rows, p the softmax over the whole vocabulary, eps the smoothing:

    LS_g = log s_g - (1 - eps) z_g[target] - eps mean(z_g)    z shifted by its maximum, s_g = sum_v exp z_g[v]
    K_gh = 1/2 (E_g[z_g - z_h] + E_h[z_h - z_g])                       E_g: expectation under p_g
    dLS_g/dz_g = p_g - (1 - eps) onehot - eps / vocabulary
    dK_gh/dz_g = 1/2 (p_g (1 + z_g - z_h - E_g[z_g - z_h]) - p_h)

Under tensor parallelism two collectives a chunk make every sum one over the whole vocabulary: the
maximum of G floats a token, then the sum of 3 G + 2 P floats a token for P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from janus_ds.parallel.layers import ParallelLayers

__all__ = [
    "ChunkResult",
    "Terms",
    "VocabSlice",
    "chunk_losses",
    "logit_gradient",
    "row_maximum",
    "targets_here",
]

_CPU_BLOCK = 8192
"""Vocabulary columns whose temporaries stay in the cache."""


@dataclass(frozen=True)
class Terms:
    """Coefficients of a chunk's sums in the total."""

    ce: tuple[float, ...]
    """Of the smoothed cross-entropy of each stream."""
    pairs: tuple[tuple[int, int, float], ...]
    """(g, h, coefficient of K_gh)."""
    smoothing: float


@dataclass(frozen=True)
class VocabSlice:
    """The part of the vocabulary that this rank holds; rows of the table beyond it are padding."""

    size: int
    """Symbols of the whole vocabulary."""
    first: int
    """First symbol here."""
    count: int
    """Symbols here, padding excluded."""
    parallel: ParallelLayers


@dataclass(frozen=True)
class ChunkResult:
    """What the gradient needs of the forward."""

    sums: Tensor
    """LS of each stream, nll of each stream, K of each pair: each summed over the chunk, float64."""
    p_GnV: Tensor
    column_n1: Tensor
    """Column of the target here; any column where another rank holds it."""
    here_n1: Tensor
    """1 where this rank holds the target, else 0, in the dtype of the logits."""
    expectation_P2n: Tensor
    """E_g[z_g - z_h] and E_h[z_g - z_h] of each pair."""


def chunk_losses(
    z_GnV: Tensor, target_n: Tensor, terms: Terms, vocab: VocabSlice, p_buffer_GnV: Tensor | None
) -> ChunkResult:
    """Sums of all terms over one chunk.

    Shifts `z_GnV` by its row maxima in place. The softmax goes to `p_buffer_GnV`; without a buffer,
    which only a chunk without pairs may do, it replaces `z_GnV`.
    """
    z_GnV.sub_(row_maximum(z_GnV, vocab))
    streams, pairs = len(terms.ce), len(terms.pairs)
    column_n1, here_n1 = targets_here(target_n, vocab, z_GnV.dtype)

    packed = z_GnV.new_zeros(3 * streams + 2 * pairs, len(target_n))
    normaliser_Gn, target_logit_Gn, logit_sum_Gn = packed[: 3 * streams].view(3, streams, len(target_n))
    expectation_P2n = packed[3 * streams :].view(pairs, 2, len(target_n))
    if vocab.count:
        column_Gn1 = column_n1.expand(streams, -1, -1)
        target_logit_Gn.copy_((z_GnV.gather(-1, column_Gn1) * here_n1).squeeze(-1))
    if terms.smoothing:
        torch.sum(z_GnV, -1, out=logit_sum_Gn)
    p_GnV = torch.exp(z_GnV, out=z_GnV if p_buffer_GnV is None else p_buffer_GnV)
    torch.sum(p_GnV, -1, out=normaliser_Gn)
    for z_GnB, p_GnB in _column_blocks(z_GnV, p_GnV) if pairs else ():
        for (g, h, _), expectation_2n in zip(terms.pairs, expectation_P2n, strict=True):
            difference_nB = z_GnB[g] - z_GnB[h]
            expectation_2n[0] += (p_GnB[g] * difference_nB).sum(-1)
            expectation_2n[1] += difference_nB.mul_(p_GnB[h]).sum(-1)
    vocab.parallel.all_reduce_sum(packed)

    p_GnV.div_(normaliser_Gn[..., None])
    for (g, h, _), expectation_2n in zip(terms.pairs, expectation_P2n, strict=True):
        expectation_2n.div_(normaliser_Gn[[g, h]])
    nll_Gn = normaliser_Gn.log() - target_logit_Gn
    uniform_Gn = normaliser_Gn.log() - logit_sum_Gn / vocab.size
    smoothed_Gn = (1.0 - terms.smoothing) * nll_Gn + terms.smoothing * uniform_Gn
    kl_Pn = 0.5 * (expectation_P2n[:, 0] - expectation_P2n[:, 1])
    sums = torch.cat([smoothed_Gn, nll_Gn, kl_Pn]).sum(-1, dtype=torch.float64)
    return ChunkResult(sums, p_GnV, column_n1, here_n1, expectation_P2n)


def logit_gradient(z_GnV: Tensor, result: ChunkResult, terms: Terms, vocab: VocabSlice) -> Tensor:
    """Gradient of the weighted sum of the chunk's terms with respect to its logits.

    Overwrites the softmax of `result` where there are no pairs, else `z_GnV`.

    Returns:
        the overwritten tensor, shape (G, n, V).
    """
    if terms.pairs:
        for z_GnB, p_GnB in _column_blocks(z_GnV, result.p_GnV):
            parts = [_paired_gradient(g, z_GnB, p_GnB, result, terms) for g in range(len(terms.ce))]
            for g, part_nB in enumerate(parts):
                z_GnB[g] = part_nB
        gradient_GnV = z_GnV
    else:
        gradient_GnV = result.p_GnV
        for g, coefficient in enumerate(terms.ce):
            gradient_GnV[g].mul_(coefficient)
    for g, coefficient in enumerate(terms.ce):
        if terms.smoothing:
            gradient_GnV[g].sub_(coefficient * terms.smoothing / vocab.size)
        if vocab.count:
            pull_n1 = result.here_n1 * (-coefficient * (1.0 - terms.smoothing))
            gradient_GnV[g].scatter_add_(-1, result.column_n1, pull_n1)
    return gradient_GnV


def _paired_gradient(g: int, z_GnB: Tensor, p_GnB: Tensor, result: ChunkResult, terms: Terms) -> Tensor:
    """The softmax part of stream g's gradient: p_g (c + sum k/2 (1 + z_g - z_h - E)) - sum k/2 p_h."""
    constant_n1 = torch.full_like(result.here_n1, terms.ce[g])
    partners: list[tuple[int, float]] = []
    for pair, (first, second, coefficient) in enumerate(terms.pairs):
        half = 0.5 * coefficient
        if g == first:
            partners.append((second, half))
            constant_n1 += half - half * result.expectation_P2n[pair, 0, :, None]
        elif g == second:
            # The stored expectation is of z_first - z_second: the sign turns.
            partners.append((first, half))
            constant_n1 += half + half * result.expectation_P2n[pair, 1, :, None]
    own = sum(half for _, half in partners)
    gradient_nB = z_GnB[g] * own
    for partner, half in partners:
        gradient_nB.sub_(z_GnB[partner], alpha=half)
    gradient_nB.add_(constant_n1).mul_(p_GnB[g])
    for partner, half in partners:
        gradient_nB.sub_(p_GnB[partner], alpha=half)
    return gradient_nB


def _column_blocks(z_GnV: Tensor, p_GnV: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The same columns of both; few at a time on a CPU, where temporaries should stay in the cache."""
    step = z_GnV.shape[-1] if z_GnV.is_cuda else _CPU_BLOCK
    step = max(step, 1)
    yield from zip(torch.split(z_GnV, step, -1), torch.split(p_GnV, step, -1), strict=True)


def targets_here(target_n: Tensor, vocab: VocabSlice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Column of each target here, and 1 where this rank holds it, else 0; both of shape (n, 1)."""
    column_n1 = (target_n - vocab.first).clamp(0, max(vocab.count - 1, 0))[:, None]
    inside = (target_n >= vocab.first) & (target_n < vocab.first + vocab.count)
    return column_n1, inside[:, None].to(dtype)


def row_maximum(z_GnV: Tensor, vocab: VocabSlice) -> Tensor:
    """Row maxima over the whole vocabulary, shape (G, n, 1); a rank may hold padding only."""
    if vocab.count:
        maximum = z_GnV.amax(-1, keepdim=True)
    else:
        maximum = z_GnV.new_full((*z_GnV.shape[:-1], 1), -torch.inf)
    return vocab.parallel.all_reduce_max(maximum)
