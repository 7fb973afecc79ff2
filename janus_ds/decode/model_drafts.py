"""A model as :func:`janus_ds.decode.draft.draft_search` asks for it: both ways of decoding on one encoding.

The first drafts are mask-predict's. What is proposed behind a rejected token is either

- `nar`: drafted again by mask-predict, with the settled tokens given and the length estimated anew: the
  likeliest of those classes of the length head that the settled tokens leave possible; or
- `reuse`: what earlier drafts, and AR's choices behind earlier differences, have from there on, at the same
  place or shifted by one (AR wanted a token more, or one less). This costs no pass. Tails that continue the
  token that AR has just put come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import RunConfig
from janus_ds.decode.beam_search import SearchSettings
from janus_ds.decode.draft import Proposal, Sentence
from janus_ds.decode.draft_sampling import SamplingJudge, draw, shares
from janus_ds.decode.mask_predict import MaskPredictSettings, mask_predict
from janus_ds.decode.model_steps import CandidateRows
from janus_ds.decode.settings import mask_predict_settings, search_settings
from janus_ds.model.incremental import ArStream, Memory
from janus_ds.model.janus import JanusModel

__all__ = ["DraftPlan", "ModelDrafts", "draft_plan"]

_SHIFTS = (0, 1, -1)
_SHORTEST = 2
"""A pass that drafts fewer tokens costs more than the check that it saves."""


@dataclass(frozen=True)
class DraftPlan:
    """How drafts are made.

    Attributes:
        search: AR's limits.
        nar: mask-predict's settings; no special symbol is drafted.
        redraft: "nar" or "reuse", see above.
        width: drafts that are checked at once: length candidates of mask-predict, or tails.
        specials: what classes of the length head count beside inner tokens (0 or 2).
    """

    search: SearchSettings
    nar: MaskPredictSettings
    redraft: str = "reuse"
    width: int = 1
    specials: int = 0


class ModelDrafts:
    """Drafts and checks of one batch.

    Args:
        model: in evaluation mode.
        memory: the encoded sources.
        stream: how AR rows are made.
        plan: how drafts are made.
        sampler: draws the tokens of drafts; None: the likeliest are taken. Drafts that are refined are not
            drawn: what mask-predict makes of drawn tokens has no distribution that could be written down.
    """

    def __init__(
        self,
        model: JanusModel,
        memory: Memory,
        stream: ArStream,
        plan: DraftPlan,
        sampler: SamplingJudge | None = None,
    ) -> None:
        self._model = model
        self._sampler = None if plan.nar.iterations else sampler
        self._cache = model.start_cache(memory, stream, plan.width, plan.search.max_steps)
        self._plan = plan
        self._class_BK = model.length_logits(memory).float()

    def propose(self, sentences: Sequence[Sentence]) -> list[Proposal]:
        """See :class:`janus_ds.decode.draft.DraftDecoder`."""
        plan = self._plan
        if sentences[0].rounds and plan.redraft == "reuse":
            return [Proposal(tails(s, plan.width, s.room(plan.search)), 0) for s in sentences]
        rows = self.rows_to_draft(sentences)
        wanted = [place for place, row in enumerate(rows) if row]
        proposals = [Proposal([[]], 0) for _ in sentences]
        if not wanted:
            return proposals
        place_X = torch.tensor(wanted, device=self._class_BK.device)
        memory = self._cache.memory
        decoder = CandidateRows(
            self._model, memory if len(wanted) == memory.sentences else memory.select(place_X)
        )
        drafted = [sentences[place] for place in wanted]
        if self._sampler is not None:
            found = self._drawn(decoder, drafted, [rows[place][0] for place in wanted], self._sampler)
        else:
            found = self._likeliest(decoder, drafted, [rows[place] for place in wanted])
        for place, proposal in zip(wanted, found, strict=True):
            sentence = sentences[place]
            sentence.pool = [sentence.inner + draft for draft in proposal.drafts] + sentence.pool
            proposals[place] = proposal
        return proposals

    def _likeliest(
        self, decoder: CandidateRows, sentences: Sequence[Sentence], rows: Sequence[Sequence[int]]
    ) -> list[Proposal]:
        """Drafts of mask-predict, one of each number of inner tokens."""
        length_XC = torch.tensor(rows, device=decoder.device) + 2
        found = mask_predict(decoder, length_XC, self._plan.nar, [sentence.inner for sentence in sentences])
        return [
            Proposal([list(item.tokens[len(s.inner) :]) for item in items], items[0].passes)
            for s, items in zip(sentences, found, strict=True)
        ]

    def _drawn(
        self,
        decoder: CandidateRows,
        sentences: Sequence[Sentence],
        rows: Sequence[int],
        sampler: SamplingJudge,
    ) -> list[Proposal]:
        """One draft a sentence, every token drawn from NAR's distribution at its position."""
        nar, width = self._plan.nar, max(rows) + 2
        tokens: list[list[int]] = []
        picked: list[int] = []
        for place, (sentence, count) in enumerate(zip(sentences, rows, strict=True)):
            hidden = count - len(sentence.inner)
            row = [nar.bos, *sentence.inner, *[nar.mask] * hidden, nar.eos]
            tokens.append(row + [nar.pad] * (width - len(row)))
            first = place * width + len(sentence.inner) + 1
            picked += range(first, first + hidden)
        device = decoder.device
        length_X = torch.tensor(rows, device=device) + 2
        picked_P = torch.tensor(picked, dtype=torch.long, device=device)
        logits_PV = decoder.logits(decoder.hidden(torch.tensor(tokens, device=device), length_X, picked_P))
        share_PV = shares(logits_PV, nar.forbidden, sampler.temperature)
        proposals, start = [], 0
        for sentence, count in zip(sentences, rows, strict=True):
            stop = start + count - len(sentence.inner)
            chances = sampler.uniform(sentence, stop - start)
            draft = [draw(row, chance) for row, chance in zip(share_PV[start:stop], chances, strict=True)]
            proposals.append(Proposal([draft], 1, share_PV[start:stop]))
            start = stop
        return proposals

    def rows_to_draft(self, sentences: Sequence[Sentence]) -> list[list[int]]:
        """Numbers of inner tokens to try for each sentence, likeliest first; none where AR is as fast.

        The length is estimated anew: the likeliest classes of those that the settled tokens leave.
        """
        plan, (_, classes) = self._plan, self._class_BK.shape
        least = torch.tensor([len(sentence.inner) for sentence in sentences])
        room = torch.tensor([sentence.room(plan.search) for sentence in sentences])
        inner_K = torch.arange(classes) - plan.specials
        possible_BK = (inner_K >= least[:, None]) & (inner_K <= (least + room)[:, None])
        class_BK = self._class_BK.masked_fill(~possible_BK.to(self._class_BK.device), float("-inf"))
        best_BC, class_BC = class_BK.topk(min(plan.width, classes), dim=1)
        found = []
        for scores, numbers, sentence, most in zip(
            best_BC.tolist(), class_BC.tolist(), sentences, (least + room).tolist(), strict=True
        ):
            settled = len(sentence.inner)
            tries = [
                n - plan.specials for n, score in zip(numbers, scores, strict=True) if score > float("-inf")
            ]
            # A first draft has to be made, whatever it is; behind the last class there is no estimate.
            least_rows = 1 if not settled else _SHORTEST
            if not tries or tries[0] - settled < least_rows:
                tries = [min(most, max(1, settled))] if not settled else []
            found.append([max(n, min(settled + 1, most)) for n in tries])
        width = max((len(row) for row in found), default=0)
        return [row + row[-1:] * (width - len(row)) if row else row for row in found]

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
    specials = {special.bos, special.pad, special.eos, special.unk, special.mask}
    nar = replace(
        mask_predict_settings(config, special),
        iterations=decode.draft_iterations,
        forbidden=tuple(specials),
        score="paper",
        pruning=False,
        confidence=None,
    )
    return DraftPlan(
        search=search_settings(config, special),
        nar=nar,
        redraft=decode.redraft,
        # A best draft among several would not be a sample any more.
        width=1 if decode.temperature else decode.draft_width,
        specials=2 if objective.length_convention == "with_specials" else 0,
    )
