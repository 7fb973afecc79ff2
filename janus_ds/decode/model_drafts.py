"""A model as :func:`janus_ds.decode.draft.draft_search` asks for it: both ways of decoding on one encoding.

The first drafts are one NAR pass. What is proposed behind a rejected token is what earlier drafts, and AR's
choices behind earlier differences, have from there on, at the same place or shifted by one (AR wanted a
token more, or one less). This costs no pass. Tails that continue the token that AR has just put come first.

Under a temperature outputs are exact samples of AR's distribution (speculative sampling: Leviathan et al.,
Chen et al., 2023). A token d that was drawn from q is accepted with probability min(1, p(d) / q(d)), where
p is AR's distribution behind the tokens before it; if it is rejected, the token is drawn from (p - q)+,
normalised. Then the token has distribution p, whatever q is. A token that was chosen and not drawn has q(d)
= 1. A draft that stands as a whole is followed by one more token, drawn from p. Every sentence draws its
numbers from a generator of its own, so that a batch changes nothing.

Shape letters: B sentences, K drafts of a sentence, C length candidates, M drafted tokens, P checked rows,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.decode.draft import Proposal, Sentence, Verdict
from janus_ds.decode.mask_predict import MaskPredictSettings, TargetRows, mask_predict
from janus_ds.decode.model_steps import NarDecoder, draft_settings, search_settings
from janus_ds.decode.sample import Sampling, draw_rows, random_of, token_shares
from janus_ds.decode.search_settings import SearchSettings
from janus_ds.model.decoding.cache import ArStream, EncoderOutput
from janus_ds.model.janus import JanusModel

_SHIFTS = (0, 1, -1)


@dataclass(frozen=True)
class DraftPlan:
    """How drafts are made.

    Attributes:
        search: AR's limits.
        nar: mask-predict's settings; no special symbol is drafted.
        width: drafts that are checked at once: length candidates of mask-predict, or tails.
        specials: what classes of the length head count beside inner tokens (0 or 2).
    """

    search: SearchSettings
    nar: MaskPredictSettings
    width: int = 1
    specials: int = 0


class ModelDrafts:
    """Drafts and checks of one batch.

    Args:
        model: in evaluation mode.
        memory: the encoded sources.
        stream: how AR rows are made.
        plan: how drafts are made.
        sampler: draws the tokens of drafts; None: the likeliest are taken.
    """

    def __init__(
        self,
        model: JanusModel,
        memory: EncoderOutput,
        stream: ArStream,
        plan: DraftPlan,
        sampler: SamplingJudge | None = None,
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._cache = model.start_cache(memory, stream, plan.width, plan.search.max_steps)
        self._plan = plan
        self._class_BK = model.length_logits(memory).float()

    def propose(self, sentences: Sequence[Sentence]) -> list[Proposal]:
        """See :class:`janus_ds.decode.draft.DraftDecoder`."""
        plan = self._plan
        if sentences[0].rounds:
            return [Proposal(tails(s, plan.width, s.room(plan.search)), 0) for s in sentences]
        decoder = NarDecoder(self._model, self._cache.memory)
        lengths = self.lengths(sentences)
        if self._sampler is not None:
            proposals = self._drawn(decoder, sentences, [row[0] for row in lengths], self._sampler)
        else:
            found = mask_predict(decoder, torch.tensor(lengths, device=decoder.device) + 2, plan.nar)
            proposals = [Proposal([list(item.tokens) for item in items], items[0].passes) for items in found]
        for sentence, proposal in zip(sentences, proposals, strict=True):
            sentence.pool = list(proposal.drafts)
        return proposals

    def _drawn(
        self,
        decoder: NarDecoder,
        sentences: Sequence[Sentence],
        lengths: Sequence[int],
        sampler: SamplingJudge,
    ) -> list[Proposal]:
        """One draft a sentence, every token drawn from NAR's distribution at its position."""
        nar, length_B = self._plan.nar, torch.tensor(lengths, device=decoder.device) + 2
        blank = TargetRows(length_B[:, None], nar)
        picked_P = blank.inner_RL.flatten().nonzero().squeeze(1)
        logits_PV = decoder.logits(decoder.hidden(blank.token_RL, length_B, picked_P, max(lengths)))
        share_PV = token_shares(logits_PV, nar.forbidden, sampler.sampling)
        proposals = []
        for sentence, share_MV in zip(sentences, share_PV.split(list(lengths)), strict=True):
            chance_M = sampler.uniform(sentence, len(share_MV)).to(share_MV.device)
            proposals.append(Proposal([draw_rows(share_MV, chance_M).tolist()], 1, share_MV))
        return proposals

    def lengths(self, sentences: Sequence[Sentence]) -> list[list[int]]:
        """Numbers of inner tokens to draft for each sentence, likeliest first, equally many for each."""
        plan, (_, classes) = self._plan, self._class_BK.shape
        room = [sentence.room(plan.search) for sentence in sentences]
        inner_K = torch.arange(classes) - plan.specials
        possible_BK = (inner_K >= 0) & (inner_K <= torch.tensor(room)[:, None])
        class_BK = self._class_BK.masked_fill(~possible_BK.to(self._class_BK.device), -math.inf)
        best_BC, class_BC = class_BK.topk(min(plan.width, classes), dim=1)
        found = []
        for scores, numbers, most in zip(best_BC.tolist(), class_BC.tolist(), room, strict=True):
            tries = [
                number - plan.specials
                for number, score in zip(numbers, scores, strict=True)
                if score > -math.inf
            ]
            # A draft has to be made, whatever it is.
            tries = tries if tries and tries[0] else [1]
            found.append([min(max(number, 1), most) for number in tries])
        width = max(len(row) for row in found)
        return [row + row[-1:] * (width - len(row)) for row in found]

    def check(self, token_BKT: Tensor, parent_B: Tensor | None) -> Tensor:
        """See :class:`janus_ds.decode.draft.DraftDecoder`."""
        device, beams, wanted = self._class_BK.device, self._cache.beams, token_BKT.shape[1]
        token_BKT = token_BKT[:, [*range(wanted), *[0] * (beams - wanted)]]
        parent_BK = None if parent_B is None or beams == 1 else parent_B[:, None].expand(-1, beams).to(device)
        return self._model.ar_block(self._cache, token_BKT.to(device), parent_BK)[:, :wanted]

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """See :class:`janus_ds.decode.draft.DraftDecoder`."""
        return self._model.logits(hidden_XD)

    def accept(self, kept_B: Tensor) -> None:
        """See :class:`janus_ds.decode.draft.DraftDecoder`."""
        self._cache.accept(kept_B)

    def keep(self, sentence_B: Tensor) -> None:
        """See :class:`janus_ds.decode.draft.DraftDecoder`."""
        sentence_B = sentence_B.to(self._class_BK.device)
        self._cache = self._cache.select(sentence_B)
        self._class_BK = self._class_BK[sentence_B]


def tails(sentence: Sentence, most: int, room: int) -> list[list[int]]:
    """Up to `most` different continuations of the settled tokens from the pool, likely ones first."""
    start = len(sentence.inner)
    last = sentence.inner[-1] if sentence.inner else None
    found: dict[tuple[int, ...], bool] = {}
    for shift in _SHIFTS:
        for draft in sentence.pool:
            tail = tuple(draft[start + shift :][:room]) if start + shift > 0 else ()
            if tail:
                found[tail] = found.get(tail, False) or draft[start + shift - 1] == last
    ordered = sorted(found, key=lambda tail: not found[tail])
    return [list(tail) for tail in ordered[:most]] or [[]]


def draft_plan(config: RunConfig, special: SpecialTokens) -> DraftPlan:
    """As a run's recipe says."""
    decode, objective = config.decode, config.objective
    return DraftPlan(
        search=search_settings(config, special),
        nar=draft_settings(config, special),
        # A best draft among several would not be a sample any more.
        width=1 if decode.temperature else decode.draft_width,
        specials=2 if objective.length_convention == "with_specials" else 0,
    )


class SamplingJudge:
    """Accepts drafts so that outputs are samples.

    Args:
        settings: as for the greedy judge.
        sampling: what is sampled.
    """

    def __init__(self, settings: SearchSettings, sampling: Sampling) -> None:
        self._settings = settings
        self.sampling = sampling
        self._random: dict[int, torch.Generator] = {}

    def uniform(self, sentence: Sentence, count: int) -> Tensor:
        """The next numbers of a sentence, float64 on the host."""
        if sentence.number not in self._random:
            self._random[sentence.number] = random_of(self.sampling.seed, sentence.number)
        return torch.rand(count, generator=self._random[sentence.number], dtype=torch.float64)

    def __call__(
        self, logits_PV: Tensor, sentences: Sequence[Sentence], proposals: Sequence[Proposal]
    ) -> list[Verdict]:
        """See :class:`janus_ds.decode.draft.Judge`; each sentence has one draft."""
        share_PV = token_shares(logits_PV, self._settings.forbidden, self.sampling)
        gain_PV = logits_PV.double().log_softmax(1)
        verdicts, start = [], 0
        for sentence, proposal in zip(sentences, proposals, strict=True):
            stop = start + len(proposal.drafts[0]) + 1
            verdicts.append(self._judge(share_PV[start:stop], gain_PV[start:stop], sentence, proposal))
            start = stop
        return verdicts

    def _judge(self, share_TV: Tensor, gain_TV: Tensor, sentence: Sentence, proposal: Proposal) -> Verdict:
        draft, last = proposal.drafts[0], len(proposal.drafts[0])
        chance_T = self.uniform(sentence, last + 1)
        chance, accepted = chance_T.tolist(), 0
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
        following = int(draw_rows(left_V[None], chance_T[last:].to(left_V.device)))
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
