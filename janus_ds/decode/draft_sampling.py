"""Exact samples of AR's distribution by drafting (speculative sampling: Leviathan et al., Chen et al., 2023).

A token d that was drawn from q is accepted with probability min(1, p(d) / q(d)), where p is AR's distribution
behind the tokens before it; if it is rejected, the token is drawn from (p - q)+, normalised. Then the token
has distribution p, whatever q is. A token that was chosen and not drawn has q(d) = 1. A draft that stands as
a whole is followed by one more token, drawn from p.

Every sentence draws its numbers from a generator of its own, so that a batch changes nothing.

Shape letters: M drafted tokens, P checked rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from janus_ds.decode.beam_search import SearchSettings
from janus_ds.decode.draft import Proposal, Sentence, Verdict

__all__ = ["SamplingJudge", "draw", "shares"]


def shares(logits_PV: Tensor, forbidden: Sequence[int], temperature: float) -> Tensor:
    """Probabilities at a temperature, in float64, zero for forbidden tokens."""
    blocked = torch.tensor(list(forbidden), dtype=torch.long, device=logits_PV.device)
    return (logits_PV.double() / temperature).index_fill(1, blocked, -math.inf).softmax(1)


def draw(share_V: Tensor, uniform: float) -> int:
    """The token at which the cumulated shares pass a number between 0 and 1."""
    cumulated_V = share_V.cumsum(0)
    target = cumulated_V.new_tensor(uniform * float(cumulated_V[-1]))
    index = int(torch.searchsorted(cumulated_V, target, right=True))
    # Rounding may carry the number past the last token that has a share.
    return min(index, int(share_V.nonzero()[-1]))


class SamplingJudge:
    """Accepts drafts so that outputs are samples.

    Args:
        settings: as for the greedy judge.
        temperature: above 0.
        seed: of all numbers.
    """

    def __init__(self, settings: SearchSettings, temperature: float, seed: int) -> None:
        self._settings = settings
        self.temperature = temperature
        self._seed = seed
        self._random: dict[int, torch.Generator] = {}

    def uniform(self, sentence: Sentence, count: int) -> list[float]:
        """The next numbers of a sentence."""
        if sentence.number not in self._random:
            # Seeds side by side would give like first numbers: they are mixed.
            mixed = (self._seed * 0x9E3779B97F4A7C15 + (sentence.number + 1) * 0xBF58476D1CE4E5B9) % (1 << 63)
            self._random[sentence.number] = torch.Generator().manual_seed(mixed)
        random = self._random[sentence.number]
        found: list[float] = torch.rand(count, generator=random, dtype=torch.float64).tolist()
        return found

    def __call__(
        self, logits_PV: Tensor, sentences: Sequence[Sentence], proposals: Sequence[Proposal]
    ) -> list[Verdict]:
        """See :class:`janus_ds.decode.draft.Judge`; each sentence has one draft."""
        share_PV = shares(logits_PV, self._settings.forbidden, self.temperature)
        gain_PV = logits_PV.double().log_softmax(1)
        verdicts, start = [], 0
        for sentence, proposal in zip(sentences, proposals, strict=True):
            stop = start + len(proposal.drafts[0]) + 1
            verdicts.append(self._judge(share_PV[start:stop], gain_PV[start:stop], sentence, proposal))
            start = stop
        return verdicts

    def _judge(self, share_TV: Tensor, gain_TV: Tensor, sentence: Sentence, proposal: Proposal) -> Verdict:
        draft, last = proposal.drafts[0], len(proposal.drafts[0])
        chance = self.uniform(sentence, last + 1)
        accepted = 0
        while accepted < last:
            p, q = float(share_TV[accepted, draft[accepted]]), 1.0
            if proposal.drawn_MV is not None:
                q = float(proposal.drawn_MV[accepted, draft[accepted]])
            if chance[accepted] * q >= p:
                break
            accepted += 1
        left_V = share_TV[accepted]
        if accepted < last:
            left_V = _rest(left_V, draft[accepted], proposal.drawn_MV, accepted)
        following = draw(left_V, chance[last])
        if accepted == last == sentence.room(self._settings):
            following = self._settings.eos
        tokens = [*draft[:accepted], following]
        gain = float(gain_TV[range(len(tokens)), tokens].sum())
        return Verdict(0, accepted, following, gain, [])


def _rest(share_V: Tensor, rejected: int, drawn_MV: Tensor | None, place: int) -> Tensor:
    """(p - q)+, not normalised."""
    if drawn_MV is None:
        return share_V.index_fill(0, torch.tensor([rejected], device=share_V.device), 0.0)
    left_V = (share_V - drawn_MV[place]).clamp_min(0.0)
    # p = q but for rounding: nothing is left over, and p itself is right.
    return left_V if float(left_V.sum()) > 0 else share_V
