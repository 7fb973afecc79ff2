"""Sampling from AR: each token is drawn from the model's distribution, or from the likeliest part of it.

Every sentence has random numbers of its own, from the seed and its number in the input, so that a sample
does not depend on the batch that it was drawn in.

Shape letters: B sentences, K samples of a sentence, V vocabulary, X rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from janus_ds.decode.beam_search import CachedSteps
from janus_ds.decode.search_settings import Hypothesis, SearchSettings

_DEAD = float("-inf")


@dataclass(frozen=True)
class Sampling:
    """What tokens are drawn from.

    Attributes:
        temperature: logits are divided by it; above 0.
        top_k: the likeliest k tokens only; 0: all.
        top_p: the likeliest tokens only, as few as have this probability together; 1: all.
        seed: of all numbers.
    """

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1


class Draws:
    """Random numbers of the sentences of a batch, each from a generator of its own."""

    def __init__(self, sampling: Sampling, numbers: Sequence[int]) -> None:
        self.sampling = sampling
        self.sentences = len(numbers)
        # Seeds side by side would give like first numbers: they are mixed.
        start, step, end = sampling.seed * 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 1 << 63
        mixed = [(start + (number + 1) * step) % end for number in numbers]
        self._random = [torch.Generator().manual_seed(seed) for seed in mixed]

    def uniform(self, count_B: Sequence[int]) -> Tensor:
        """The next numbers of each sentence from [0, 1), one after the other, float64 on the host."""
        parts = zip(count_B, self._random, strict=True)
        return torch.cat([torch.rand(count, generator=own, dtype=torch.float64) for count, own in parts])


def stands(share_XV: Tensor, drawn_XV: Tensor, token_X: Tensor, uniform_X: Tensor) -> Tensor:
    """Which drafted tokens a sampler keeps: those drawn from q with probability min(1, p / q)."""
    p_X, q_X = (x.gather(1, token_X[:, None]).squeeze(1) for x in (share_XV, drawn_XV))
    return uniform_X * q_X < p_X


def left_over(share_XV: Tensor, drawn_XV: Tensor) -> Tensor:
    """(p - q)+, not normalised: what a token is drawn from in place of one that does not stand."""
    left_XV = (share_XV - drawn_XV).clamp_min(0.0)
    # p = q but for rounding: nothing is left over, and p itself is right.
    return left_XV.where(left_XV.sum(1, keepdim=True) > 0, share_XV)


def token_shares(logits_XV: Tensor, forbidden: Sequence[int], sampling: Sampling) -> Tensor:
    """Probabilities of the next tokens in float64: temperature, then top_k, then top_p, each renormalised."""
    blocked = torch.tensor(list(forbidden), dtype=torch.long, device=logits_XV.device)
    scaled_XV = (logits_XV.double() / sampling.temperature).index_fill(1, blocked, _DEAD)
    if not sampling.top_k and sampling.top_p >= 1:
        return scaled_XV.softmax(1)
    sorted_XV, token_XV = scaled_XV.sort(dim=1, descending=True, stable=True)
    if sampling.top_k:
        sorted_XV[:, sampling.top_k :] = _DEAD
    share_XV = sorted_XV.softmax(1)
    before_XV = share_XV.cumsum(1) - share_XV
    # The likeliest token is kept whatever top_p is.
    share_XV[:, 1:].masked_fill_(before_XV[:, 1:] >= sampling.top_p, 0.0)
    share_XV = share_XV / share_XV.sum(1, keepdim=True)
    return torch.zeros_like(share_XV).scatter_(1, token_XV, share_XV)


def draw_rows(share_XV: Tensor, uniform_X: Tensor) -> Tensor:
    """The token of each row at which the cumulated shares pass a number from [0, 1)."""
    cumulated_XV = share_XV.cumsum(1)
    target_X1 = (uniform_X * cumulated_XV[:, -1])[:, None]
    found_X = torch.searchsorted(cumulated_XV, target_X1, right=True)[:, 0]
    # Rounding may carry the number past the last token that has a share.
    last_X = share_XV.shape[1] - 1 - (share_XV > 0).flip(1).int().argmax(1)
    return torch.minimum(found_X, last_X)


def sample_search(
    step_function: CachedSteps,
    draws: Draws,
    settings: SearchSettings,
    device: torch.device | str = "cpu",
) -> list[list[Hypothesis]]:
    """Draw K outputs of each sentence, K = `settings.beam`, in the order drawn.

    Args:
        settings: symbols, limits, prefix and rules about tokens; `stop` only says what a forced token costs.
        device: where `step_function` wants its tokens.

    Returns:
        Scores are the model's own (temperature 1, nothing left out), as those of a search.
    """
    K, every = settings.beam, range(draws.sentences)
    going = list(every)
    tokens: list[list[list[int]]] = [[[] for _ in range(K)] for _ in every]
    gains: list[list[list[float]]] = [[[] for _ in range(K)] for _ in every]
    token_BK = torch.full((len(going), K), settings.start, device=device)
    parent_BK: Tensor | None = None
    for step in range(settings.max_steps):
        logits_BKV = step_function(token_BK, parent_BK)
        ruled_BKV = logits_BKV
        if settings.rules:
            past = [
                [[settings.start, *_filled(said, step, settings.eos)] for said in tokens[i]] for i in going
            ]
            length_B = torch.full((len(going),), step + 1, device=token_BK.device)
            ruled_BKV = settings.rules(logits_BKV, torch.tensor(past, device=token_BK.device), length_B)
        chosen_BK = _choose(ruled_BKV, settings, step, draws, going)
        gain_BKV = logits_BKV.double().log_softmax(2)
        gain_BK = gain_BKV.gather(2, chosen_BK[..., None])[..., 0]
        if settings.free_forced and settings.forced(step) is not None and settings.given(step) is None:
            gain_BK = torch.zeros_like(gain_BK)
        for i, row, gain in zip(going, chosen_BK.tolist(), gain_BK.tolist(), strict=True):
            for k in range(K):
                if not tokens[i][k] or tokens[i][k][-1] != settings.eos:
                    tokens[i][k].append(row[k])
                    gains[i][k].append(gain[k])
        left = [b for b, i in enumerate(going) if any(said[-1] != settings.eos for said in tokens[i])]
        if not left:
            break
        if len(left) < len(going):
            left_B = torch.tensor(left, device=chosen_BK.device)
            step_function.keep(left_B)
            chosen_BK, going = chosen_BK[left_B], [going[b] for b in left]
        token_BK, parent_BK = chosen_BK, torch.arange(K, device=chosen_BK.device).expand(len(going), K)
    return [[_result(*item, settings) for item in zip(tokens[i], gains[i], strict=True)] for i in every]


def _choose(
    logits_BKV: Tensor, settings: SearchSettings, step: int, draws: Draws, going: Sequence[int]
) -> Tensor:
    """The next token of each sample of the sentences that go on; what is forced uses no random numbers."""
    shape = logits_BKV.shape[:2]
    forced = settings.forced(step)
    if forced is not None:
        return torch.full(shape, forced, device=logits_BKV.device)
    share_XV = token_shares(logits_BKV.flatten(0, 1), settings.forbidden, draws.sampling)
    open_ = set(going)
    uniform_X = draws.uniform([shape[1] * (number in open_) for number in range(draws.sentences)])
    return draw_rows(share_XV, uniform_X.to(share_XV.device)).view(shape)


def _filled(said: Sequence[int], count: int, eos: int) -> list[int]:
    """What a sample has written, and eos in the places after its end."""
    return [*said, *[eos] * (count - len(said))]


def _result(tokens: Sequence[int], gains: Sequence[float], settings: SearchSettings) -> Hypothesis:
    shown = settings.shown(tokens)
    score = sum(gains) / len(tokens) ** settings.length_penalty
    return Hypothesis(tuple(tokens[shown]), score, len(tokens), tuple(gains[shown]))
