"""The chunk mathematics of `chunk_math` as two functions that a compiler makes one loop each of.

Eager, each of the dozen steps of a chunk walks over the logits anew; compiled, `statistics` reads them
once and `gradient` reads and writes them once. No softmax is stored in between: its exponentials are
made again, which costs less than the memory. The values are those of `chunk_math` but for rounding.

Only the shape of the terms is compiled in (how many streams, which pairs); coefficients are tensors, and
the number of rows is dynamic, so nothing is compiled again when counts or chunk sizes change.
Shape letters: G streams, n tokens of the chunk, P pairs, V vocabulary rows of this rank.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from janus_ds.objective.chunk_math import Terms, VocabSlice, row_maximum, targets_here

__all__ = ["chunk_gradient", "compiler_is_at_hand"]

logger = logging.getLogger(__name__)

Pairs = tuple[tuple[int, int], ...]
Target = tuple[Tensor, Tensor]
"""See :func:`janus_ds.objective.chunk_math.targets_here`."""


def compiler_is_at_hand(device: torch.device) -> bool:
    """Whether torch.compile can make code for a device: a C++ compiler, or Triton on a GPU."""
    if device.type == "cpu":
        return any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    return bool(torch.utils._triton.has_triton())


def chunk_gradient(z_GnV: Tensor, target_n: Tensor, terms: Terms, vocab: VocabSlice) -> Tensor:
    """Sums of all terms over one chunk; `z_GnV` becomes the gradient of their weighted total.

    Returns:
        sums as in `chunk_math.ChunkResult.sums`.
    """
    maximum_Gn1 = row_maximum(z_GnV, vocab)
    target = targets_here(target_n, vocab, z_GnV.dtype)
    pairs = tuple((g, h) for g, h, _ in terms.pairs)
    for x in (z_GnV, maximum_Gn1):
        torch._dynamo.maybe_mark_dynamic(x, 1)
    for x in target:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    functions = _functions()
    packed = functions.run("statistics", z_GnV, maximum_Gn1, target, pairs)
    vocab.parallel.all_reduce_sum(packed)
    coefficients = torch.tensor(
        [*terms.ce, *(k for _, _, k in terms.pairs), terms.smoothing, 1.0 / vocab.size],
        dtype=z_GnV.dtype,
        device=z_GnV.device,
    )
    return functions.run("gradient", z_GnV, maximum_Gn1, packed, target, coefficients, pairs)


class _Functions:
    """Both functions, compiled at their first call, or as they are written where that fails."""

    def __init__(self) -> None:
        logger.info("compiling the loss head: the first step takes longer")
        self._written: dict[str, Callable[..., Tensor]] = {"statistics": statistics, "gradient": gradient}
        self._compiled: dict[str, Callable[..., Tensor]] = {
            "statistics": torch.compile(statistics, fullgraph=True),
            "gradient": torch.compile(gradient, fullgraph=True),
        }

    def run(self, name: str, *arguments: Any) -> Tensor:
        """The result of one of them."""
        try:
            result: Tensor = self._compiled[name](*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            # Compilation comes before execution, so that nothing has been changed in place yet.
            reason = str(error).strip().splitlines()[0]
            logger.warning(
                "the loss head could not be compiled and runs uncompiled: %s (a killed run can leave "
                "broken files in the compiler's cache; remove it and start again)",
                reason,
            )
            self._compiled[name] = self._written[name]
            result = self._written[name](*arguments)
        return result


@lru_cache(maxsize=1)
def _functions() -> _Functions:
    return _Functions()


def statistics(z_GnV: Tensor, maximum_Gn1: Tensor, target: Target, pairs: Pairs) -> Tensor:
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


def gradient(
    z_GnV: Tensor,
    maximum_Gn1: Tensor,
    packed: Tensor,
    target: Target,
    coefficients: Tensor,
    pairs: Pairs,
) -> Tensor:
    """Sums of the terms; the gradient replaces `z_GnV`.

    Args:
        packed: of :func:`statistics`, over the whole vocabulary.
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
