"""Non-autoregressive decoding by mask-predict with length candidates (section 3.4 of the paper).

I iterations are T = I + 1 decoder passes. Pass 0 predicts every inner token from MASK; before each
later pass the least certain tokens are masked again and predicted anew, fewer each time. All length
candidates of all sentences are rows of the same pass, and only masked positions are projected to
the vocabulary.

Ties: of equal probabilities the smaller token id wins, of equally uncertain tokens the earlier
position is masked first, of equally good candidates the first wins (`paper`: the likelier length;
`released`: the shorter one).

Shape letters: B sentences, C length candidates, R = B * C rows (sentence-major), L longest row,
P positions predicted in a pass, over all rows, X of them in a chunk, D width, K length
classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from janus_ds.decode.hypothesis import ScoredTokens

__all__ = ["MaskPredictSettings", "RowDecoder", "length_candidates", "mask_predict", "remask_counts"]

_CHUNK_ROWS = 1024
"""Rows that are projected to the vocabulary at a time, so that logits take a bounded memory."""


class RowDecoder(Protocol):
    """What mask-predict asks of a model."""

    def hidden(self, token_RL: Tensor, length_R: Tensor, picked_P: Tensor) -> Tensor:
        """One decoder pass: hidden rows at the flat indices `picked_P` = r * L + l, shape (P, D)."""

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """Logits over the vocabulary, shape (X, V)."""


@dataclass(frozen=True)
class MaskPredictSettings:
    """What mask-predict needs to know.

    Attributes:
        iterations: I, refinements after the first pass.
        bos, eos, pad, mask: ids; `mask` is what stands for an unknown token in decoder rows.
        forbidden: tokens that are never predicted.
        score: "paper" (mean log-probability of inner tokens) or "released" (their sum divided by the
            length with bos and eos, which count as certain).
    """

    iterations: int
    bos: int
    eos: int
    pad: int
    mask: int
    forbidden: tuple[int, ...] = ()
    score: str = "paper"


def remask_counts(inner_R: Tensor, step: int, steps: int) -> Tensor:
    """How many tokens are masked again after pass `step` of `steps`: floor(n * (1 - (step + 1) / steps)).

    The product is taken in float32, as the released code does: 5 * (1 - 4/5) is 1 there and .9999
    in float64.

    Args:
        inner_R: inner tokens n of each row.
        step: the pass just made, from 0.
        steps: T, passes in all.
    """
    share = torch.tensor(1.0 - (step + 1) / steps, dtype=torch.float32)
    return (inner_R.float() * share.to(inner_R.device)).long()


def length_candidates(logits_BK: Tensor, rule: str, beam: int, convention: str, longest: int) -> Tensor:
    """Lengths to try for each sentence, bos and eos included, shape (B, C).

    Args:
        logits_BK: the length head's output.
        rule: "paper" (the `beam` likeliest classes) or "released" (`beam` neighbours of the likeliest:
            argmax - beam // 2 and upward).
        beam: candidates wanted; C is smaller where there are not as many classes.
        convention: what a class counts: "inner" tokens, or tokens "with_specials".
        longest: rows of the decoder's position table.
    """
    specials = 2 if convention == "inner" else 0
    if rule == "paper":
        best_BC = logits_BK.topk(min(beam, logits_BK.shape[1]), dim=1).indices
        return (best_BC + specials).clamp(3, longest)
    offset_C = torch.arange(beam, device=logits_BK.device) - beam // 2
    return (logits_BK.argmax(dim=1, keepdim=True) + specials + offset_C).clamp(2, longest)


def mask_predict(
    decoder: RowDecoder, length_BC: Tensor, settings: MaskPredictSettings
) -> list[list[ScoredTokens]]:
    """Fill all rows in I + 1 passes.

    Args:
        decoder: the model on its encoded sources.
        length_BC: candidate lengths, bos and eos included.
        settings: iterations and rules.

    Returns:
        For each sentence its C candidates, best first, without bos and eos.
    """
    rows = _Rows(length_BC.flatten(), settings)
    passes = settings.iterations + 1
    for step in range(passes):
        if not rows.fill(decoder):
            break  # Counts only fall: with nothing masked now, nothing is masked later.
        if step + 1 < passes:
            rows.mask_again(remask_counts(rows.inner_R, step, passes))
    return rows.result(length_BC.shape[1])


class _Rows:
    """Tokens and their log-probabilities during one call of :func:`mask_predict`."""

    def __init__(self, length_R: Tensor, settings: MaskPredictSettings) -> None:
        self.settings = settings
        self.length_R = length_R
        self.inner_R = length_R - 2
        column_L = torch.arange(int(length_R.max()), device=length_R.device)
        last_R1 = length_R[:, None] - 1
        self.inner_RL = (column_L > 0) & (column_L < last_R1)
        self.token_RL = torch.full(self.inner_RL.shape, settings.pad, device=length_R.device)
        self.token_RL[:, 0] = settings.bos
        self.token_RL = self.token_RL.masked_fill(column_L == last_R1, settings.eos)
        self.token_RL = self.token_RL.masked_fill(self.inner_RL, settings.mask)
        self.score_RL = torch.zeros(self.inner_RL.shape, device=length_R.device)

    def fill(self, decoder: RowDecoder) -> bool:
        """One pass: every masked position takes its likeliest token. False if nothing is masked."""
        # `released` forbids nothing, so that a predicted MASK stays masked for the next pass.
        masked_RL = (self.token_RL == self.settings.mask) & self.inner_RL
        picked_P = masked_RL.flatten().nonzero().squeeze(1)
        if not len(picked_P):
            return False
        hidden_PD = decoder.hidden(self.token_RL, self.length_R, picked_P)
        parts = [
            _best(decoder.logits(hidden_PD[start : start + _CHUNK_ROWS]), self.settings.forbidden)
            for start in range(0, len(hidden_PD), _CHUNK_ROWS)
        ]
        token_P, score_P = (torch.cat(part) for part in zip(*parts, strict=True))
        self.token_RL = self.token_RL.masked_scatter(masked_RL, token_P)
        self.score_RL = self.score_RL.to(score_P.dtype).masked_scatter(masked_RL, score_P)
        return True

    def mask_again(self, count_R: Tensor) -> None:
        """Mask the `count_R` least certain inner tokens of each row."""
        score_RL = self.score_RL.masked_fill(~self.inner_RL, float("inf"))
        order_RL = score_RL.sort(dim=1, stable=True).indices
        column_L = torch.arange(order_RL.shape[1], device=order_RL.device)
        first_RL = column_L < count_R[:, None]
        again_RL = torch.zeros_like(first_RL).scatter(1, order_RL, first_RL)
        self.token_RL = self.token_RL.masked_fill(again_RL, self.settings.mask)

    def result(self, candidates: int) -> list[list[ScoredTokens]]:
        """The rows as candidates of their sentences, best first."""
        total_R = self.score_RL.sum(dim=1)
        released = self.settings.score == "released"
        mean_R = total_R / (self.length_R if released else self.inner_R).clamp(min=1)
        rows = zip(self.token_RL.tolist(), self.length_R.tolist(), mean_R.tolist(), strict=True)
        found = [ScoredTokens(tuple(tokens[1 : length - 1]), score) for tokens, length, score in rows]
        groups = [found[i : i + candidates] for i in range(0, len(found), candidates)]
        return [sorted(group, key=lambda item: -item.score) for group in groups]


def _best(logits_XV: Tensor, forbidden: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The likeliest allowed token of each position and its log-probability over the whole vocabulary."""
    logits_XV = logits_XV if logits_XV.dtype == torch.float64 else logits_XV.float()
    total_X = logits_XV.logsumexp(dim=1)
    blocked = torch.tensor(forbidden, dtype=torch.long, device=logits_XV.device)
    best_X, token_X = logits_XV.index_fill(1, blocked, float("-inf")).max(dim=1)
    return token_X, best_X - total_X
