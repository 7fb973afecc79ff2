"""Losses of a chunk of logits, and their gradient in closed form (eq. 1-5 of the paper).

G streams predict the same n tokens (AR, NAR, AUX; or AR alone), z_GnV are their logits over this
rank's V vocabulary rows, p the softmax over the whole vocabulary, eps the smoothing:

    LS_g = log s_g - (1 - eps) z_g[target] - eps mean(z_g)    z shifted by its maximum, s_g = sum_v exp z_g[v]
    K_gh = 1/2 (E_g[z_g - z_h] + E_h[z_h - z_g])                       E_g: expectation under p_g
    dLS_g/dz_g = p_g - (1 - eps) onehot - eps / vocabulary
    dK_gh/dz_g = 1/2 (p_g (1 + z_g - z_h - E_g[z_g - z_h]) - p_h)

Under tensor parallelism two collectives a chunk make every sum one over the whole vocabulary: the
maximum of G floats a token, then the sum of 3 G + 2 P floats a token for P pairs.

Twice: eager (:func:`chunk_losses`, :func:`logit_gradient`) and for a compiler (:func:`chunk_gradient`), which
makes one loop each of two functions. Eager, each of the dozen steps of a chunk walks over the logits anew;
compiled, `statistics` reads them once and `gradient` reads and writes them once. No softmax is stored in
between: its exponentials are made again, which costs less than the memory. Only rounding differs.
Only the shape of the terms is compiled in (how many streams, which pairs); coefficients are tensors, and the
number of rows is dynamic, so nothing is compiled again when counts or chunk sizes change.

Shape letters: G streams, n tokens of the chunk, P pairs, V vocabulary rows of this rank.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from janus_ds.parallel.tensor_parallel import ParallelLayers

logger = logging.getLogger(__name__)

Pairs = tuple[tuple[int, int], ...]
Target = tuple[Tensor, Tensor]
"""Column of each target here, and 1 where this rank holds it, else 0; both of shape (n, 1)."""

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
    z_GnV.sub_(_row_maximum(z_GnV, vocab))
    streams, pairs = len(terms.ce), len(terms.pairs)
    column_n1, here_n1 = _targets_here(target_n, vocab, z_GnV.dtype)

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
        expectation_2n[0].div_(normaliser_Gn[g])
        expectation_2n[1].div_(normaliser_Gn[h])
    nll_Gn = normaliser_Gn.log() - target_logit_Gn
    uniform_Gn = normaliser_Gn.log() - logit_sum_Gn / vocab.size
    smoothed_Gn = (1.0 - terms.smoothing) * nll_Gn + terms.smoothing * uniform_Gn
    # The symmetric KL, halved: E_g[log g - log h] and E_h[log h - log g], normalisers cancelling out.
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


def _targets_here(target_n: Tensor, vocab: VocabSlice, dtype: torch.dtype) -> Target:
    column_n1 = (target_n - vocab.first).clamp(0, max(vocab.count - 1, 0))[:, None]
    inside = (target_n >= vocab.first) & (target_n < vocab.first + vocab.count)
    return column_n1, inside[:, None].to(dtype)


def _row_maximum(z_GnV: Tensor, vocab: VocabSlice) -> Tensor:
    """Row maxima over the whole vocabulary, shape (G, n, 1); a rank may hold padding only."""
    if vocab.count:
        maximum = z_GnV.amax(-1, keepdim=True)
    else:
        maximum = z_GnV.new_full((*z_GnV.shape[:-1], 1), -torch.inf)
    return vocab.parallel.all_reduce_max(maximum)


def compiler_is_at_hand(device: torch.device) -> bool:
    """Whether torch.compile can make code for a device: a C++ compiler, or Triton on a GPU."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return bool(torch.utils._triton.has_triton())


def chunk_gradient(z_GnV: Tensor, target_n: Tensor, terms: Terms, vocab: VocabSlice) -> Tensor:
    """Sums of all terms over one chunk; `z_GnV` becomes the gradient of their weighted total.

    Returns:
        sums as in `ChunkResult.sums`.
    """
    maximum_Gn1 = _row_maximum(z_GnV, vocab)
    target = _targets_here(target_n, vocab, z_GnV.dtype)
    pairs = tuple((g, h) for g, h, _ in terms.pairs)
    for x in (z_GnV, maximum_Gn1):
        torch._dynamo.maybe_mark_dynamic(x, 1)
    for x in target:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    packed = _compiled(compiled_statistics)(z_GnV, maximum_Gn1, target, pairs)
    vocab.parallel.all_reduce_sum(packed)
    values = [*terms.ce, *(k for _, _, k in terms.pairs), terms.smoothing, 1.0 / vocab.size]
    # Filled there: a copy from the host would wait for the device.
    coefficients = torch.stack([z_GnV.new_full((), value) for value in values])
    return _compiled(compiled_gradient)(z_GnV, maximum_Gn1, packed, target, coefficients, pairs)


@lru_cache(maxsize=2)
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, compiled at its first call, or as it is written where that fails."""
    logger.info("compiling %s: the first step takes longer", function.__name__)
    running = [torch.compile(function, fullgraph=True)]

    def run(*arguments: Any) -> Tensor:
        try:
            result: Tensor = running[0](*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            # Compilation comes before execution, so that nothing has been changed in place yet.
            reason = str(error).strip().splitlines()[0]
            logger.warning(
                "the loss head could not be compiled and runs uncompiled: %s (a killed run can leave "
                "broken files in the compiler's cache; remove it and start again)",
                reason,
            )
            running[0] = function
            result = function(*arguments)
        return result

    return run


def compiled_statistics(z_GnV: Tensor, maximum_Gn1: Tensor, target: Target, pairs: Pairs) -> Tensor:
    """Sum of exponentials, target logit and sum of logits of each stream, both expectations of each pair.

    Returns:
        unnormalised, shape (3 G + 2 P, n): sums over this rank's vocabulary.
    """
    column_n1, here_n1 = target
    shifted = [z_nV - m_n1 for z_nV, m_n1 in zip(z_GnV, maximum_Gn1, strict=True)]
    exponential = [a_nV.exp() for a_nV in shifted]
    parts = [e_nV.sum(-1) for e_nV in exponential]
    parts += [(a_nV.gather(-1, column_n1) * here_n1).squeeze(-1) for a_nV in shifted]
    parts += [a_nV.sum(-1) for a_nV in shifted]
    for g, h in pairs:
        difference_nV = shifted[g] - shifted[h]
        parts += [(exponential[g] * difference_nV).sum(-1), (exponential[h] * difference_nV).sum(-1)]
    return torch.stack(parts)


def compiled_gradient(
    z_GnV: Tensor,
    maximum_Gn1: Tensor,
    packed: Tensor,
    target: Target,
    coefficients: Tensor,
    pairs: Pairs,
) -> Tensor:
    """Sums of the terms; the gradient replaces `z_GnV`.

    Args:
        packed: of :func:`compiled_statistics`, over the whole vocabulary.
        coefficients: of each stream's loss, of each pair, the smoothing, one over the vocabulary.
    """
    streams = len(z_GnV)
    column_n1, here_n1 = target
    ce, halves = coefficients[:streams], 0.5 * coefficients[streams : streams + len(pairs)]
    smoothing, share = coefficients[-2], coefficients[-1]
    normaliser_Gn, target_Gn, total_Gn = packed[: 3 * streams].unflatten(0, (3, streams)).unbind(0)
    shifted = [z_nV - m_n1 for z_nV, m_n1 in zip(z_GnV, maximum_Gn1, strict=True)]
    softmax = [a_nV.exp() / s_n[:, None] for a_nV, s_n in zip(shifted, normaliser_Gn, strict=True)]
    is_target_nV = (torch.arange(z_GnV.shape[-1], device=z_GnV.device) == column_n1) * here_n1
    inner = [ce[g].expand(is_target_nV.shape) for g in range(streams)]
    outer = [ce[g] * (smoothing * share) + ce[g] * (1.0 - smoothing) * is_target_nV for g in range(streams)]
    divergences = []
    for pair, (g, h) in enumerate(pairs):
        half, row = halves[pair], 3 * streams + 2 * pair
        first_n, second_n = packed[row] / normaliser_Gn[g], packed[row + 1] / normaliser_Gn[h]
        difference_nV = shifted[g] - shifted[h]
        inner[g] = inner[g] + half * (1.0 + difference_nV - first_n[:, None])
        inner[h] = inner[h] + half * (1.0 - difference_nV + second_n[:, None])
        outer[g] = outer[g] + half * softmax[h]
        outer[h] = outer[h] + half * softmax[g]
        divergences.append(0.5 * (first_n - second_n))
    for g in range(streams):
        z_GnV[g].copy_(softmax[g] * inner[g] - outer[g])
    nll_Gn = normaliser_Gn.log() - target_Gn
    uniform_Gn = normaliser_Gn.log() - total_Gn * share
    smoothed_Gn = (1.0 - smoothing) * nll_Gn + smoothing * uniform_Gn
    rows = [*smoothed_Gn.unbind(0), *nll_Gn.unbind(0), *divergences]
    return torch.stack(rows).sum(-1, dtype=torch.float64)
