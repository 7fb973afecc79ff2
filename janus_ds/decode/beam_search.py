"""Autoregressive greedy and beam search (section 3.4 of the paper).

The search calls a step function for logits and tracks hypotheses. Its state is tensors of fixed shapes on the
device of the logits, so that a step waits for no value from the device; whether the search may end is asked
every few steps only.

Two rules say when a sentence is finished and which hypotheses are kept:

- `fairseq`: the first K hypotheses that end are kept; with K of them the sentence is finished.
- `transformers`: the best K are kept; finished when K have ended and no open beam can reach the
  worst of them at its present length (or at once, with `early_stopping`). A forced token costs
  nothing, as with `forced_bos_token_id` and `forced_eos_token_id`. `never` is the same with the greatest
  length in place of the present one, where that is better.

Sentences that wait take the places of finished ones, so that a step is full as long as there is work;
each place counts its own steps.

All rules take 2K candidates a step, let a hypothesis end only where its eos is among the best K, and
divide a score by (number of generated tokens, eos included) ** length penalty.

Shape letters: B sentences, K beams, C = 2K candidates, V vocabulary, T steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import count
from time import perf_counter
from typing import cast

import torch
from torch import Tensor

from janus_ds.decode.search_settings import Hypothesis, SearchSettings, TokenRules
from janus_ds.decode.watch import BeamTrace, current_watch
from janus_ds.model.decoding.cache import EncoderOutput, KVCache
from janus_ds.model.janus import JanusModel


class CachedSteps:
    """The step function of a search: a model with its cache, one content row and one query row a beam.

    Args:
        cache: of the sentences that begin.
        encode_next: encodes the next sentences that wait, so many; None: none wait.
        before: a token that is fed together with the first ones, before them.
    """

    def __init__(
        self,
        model: JanusModel,
        cache: KVCache,
        encode_next: Callable[[int], EncoderOutput] | None = None,
        before: int | None = None,
    ) -> None:
        self._model, self._cache = model, cache
        self._encode_next, self._before = encode_next, before
        watch = current_watch()
        self._trace = BeamTrace(watch) if watch else None

    def __call__(self, token_BK: Tensor, parent_BK: Tensor | None) -> Tensor:
        """Logits of the next tokens, shape (B, K, V), in float32 at least.

        Args:
            token_BK: the last token of each beam (the start symbol at first).
            parent_BK: the beam of the step before that each beam grew from; None at first.
        """
        tokens = [token_BK]
        if parent_BK is None and self._before is not None:
            tokens.insert(0, torch.full_like(token_BK, self._before))
        hidden_BKTD = self._model.ar_block(self._cache, torch.stack(tokens, 2), parent_BK)
        logits_BKV = self._model.logits(hidden_BKTD[:, :, -1])
        if self._trace:
            self._trace.note(token_BK, parent_BK, logits_BKV)
        return logits_BKV

    def keep(self, sentence_B: Tensor) -> None:
        """Go on with these sentences only, by their index among those held now; the others are finished."""
        self._cache = self._cache.select(sentence_B)

    def refill(self, place_X: Tensor) -> None:
        """Let the next X sentences that wait begin at these places, whose sentences are finished."""
        if self._encode_next is not None:
            self._cache.refill(place_X, self._encode_next(len(place_X)))


_DEAD = float("-inf")
_STEPS_PER_QUESTION = 8
_FIRST_STEPS = 32
"""Tokens that there is room for at first; room doubles."""
_COLUMN = 64
"""Tokens of a column in :func:`_largest`."""
_FREE_SHARE = 4
"""Places are refilled when one of so many is free: encoding few sentences at a time is dear."""


@dataclass
class _Pool:
    """Finished hypotheses: -inf marks an empty place."""

    score_BK: Tensor
    length_BK: Tensor
    token_BKT: Tensor
    sum_BKT: Tensor
    closed_B: Tensor
    """True where the search of a sentence is finished; nothing enters any more."""

    def keep(self, sentence_B: Tensor) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name)[sentence_B])


def beam_search(
    step_function: CachedSteps,
    sentences: int,
    settings: SearchSettings,
    device: torch.device | str = "cpu",
    waiting: int = 0,
) -> list[list[Hypothesis]]:
    """Search many sentences at once.

    Args:
        sentences: B, those that begin at once.
        device: where `step_function` wants its tokens.
        waiting: sentences that begin as others end, by :meth:`CachedSteps.refill`.

    Returns:
        For each sentence, those that waited last, at most K hypotheses, best first; tokens as
        :meth:`SearchSettings.shown` says.
    """
    search = _Search(sentences, settings, torch.device(device))
    parent_BK: Tensor | None = None
    for step in count():
        logits_BKV = step_function(search.last_BK, parent_BK)
        parent_BK = search.advance(logits_BKV)
        some_left = min(search.steps) < settings.max_steps
        if search.last_BK.device.type != "cpu" and (step + 1) % _STEPS_PER_QUESTION and some_left:
            continue
        closed_B = search.closed_B()
        free = [place for place, closed in enumerate(closed_B.tolist()) if closed]
        search.note_finished(free)
        if waiting and _FREE_SHARE * len(free) >= len(closed_B):
            place_X = torch.tensor(free[:waiting], device=parent_BK.device)
            search.refill(place_X)
            step_function.refill(place_X)
            parent_BK[place_X] = torch.arange(settings.beam, device=parent_BK.device)
            waiting -= len(place_X)
        elif not waiting and len(free) == len(closed_B):
            break
        elif not waiting and 2 * len(free) >= len(closed_B):
            open_B = (~closed_B).nonzero().squeeze(1)
            step_function.keep(open_B)
            search.keep(open_B)
            parent_BK = parent_BK[open_B]
    search.write_down(range(len(search.sentences)))
    return search.found


class _Search:
    """The state of one call of :func:`beam_search`."""

    def __init__(self, sentences: int, settings: SearchSettings, device: torch.device) -> None:
        shape = (sentences, settings.beam)
        self.settings = settings
        self.found: list[list[Hypothesis]] = [[] for _ in range(sentences)]
        self.sentences = list(range(sentences))
        """The number of the sentence at each place."""
        self.steps = [0] * sentences
        """Steps that were made at each place; on the device, `step_B`, those until its search ended."""
        self.began = [perf_counter()] * sentences
        self.cost: dict[int, tuple[int, float]] = {}
        """Passes and seconds of each sentence whose search has ended."""
        self.fed = [int(settings.fed_first and settings.forced_first is not None)] * sentences
        """Steps at each place that took no pass of their own."""
        self.last_BK = torch.full(shape, settings.start, device=device)
        room = min(settings.max_steps, _FIRST_STEPS)
        self.token_BKT = torch.zeros((*shape, room), dtype=torch.long, device=device)
        self.sum_BKT = torch.zeros((*shape, room), dtype=torch.float64, device=device)
        """Scores up to each token, before the division by length."""
        # One beam is alive at first; the others would be copies of it.
        self.score_BK = torch.full(shape, _DEAD, device=device)
        self.score_BK[:, 0] = 0.0
        if settings.fed_first and settings.forced_first is not None:
            # As after a first step: the other beams, copies of the first one, are dead still.
            self.steps = [1] * sentences
            self.last_BK.fill_(settings.forced_first)
            self.token_BKT[:, :, 0] = settings.forced_first
        self.step_B = torch.full((sentences,), self.steps[0], device=device)
        self._forbidden = torch.tensor(settings.forbidden, dtype=torch.long, device=device)
        self.pool = _Pool(
            score_BK=torch.full(shape, _DEAD, device=device),
            length_BK=torch.zeros(shape, dtype=torch.long, device=device),
            token_BKT=torch.zeros_like(self.token_BKT),
            sum_BKT=torch.zeros_like(self.sum_BKT),
            closed_B=torch.zeros(sentences, dtype=torch.bool, device=device),
        )

    def closed_B(self) -> Tensor:
        """Places whose sentence is finished, by the rules or because its steps are used up."""
        if max(self.steps) < self.settings.max_steps:
            return self.pool.closed_B
        return self.pool.closed_B | (self.step_B >= self.settings.max_steps)

    def refill(self, place_X: Tensor) -> None:
        """Write down what was found at some places and begin the next sentences there."""
        places, first = place_X.tolist(), len(self.found)
        self.write_down(places)
        self.found += [[] for _ in places]
        for number, place in enumerate(places, first):
            self.sentences[place], self.steps[place] = number, 0
            self.began[place], self.fed[place] = perf_counter(), 0
        self.step_B[place_X] = 0
        self.last_BK[place_X] = self.settings.start
        self.score_BK[place_X] = _DEAD
        self.score_BK[place_X, 0] = 0.0
        self.pool.score_BK[place_X] = _DEAD
        self.pool.length_BK[place_X] = 0
        self.pool.closed_B[place_X] = False

    def advance(self, logits_BKV: Tensor) -> Tensor:
        """Take one step; returns the parent beam of each new beam, shape (B, K)."""
        score_BC, token_BC, parent_BC = self._candidates(logits_BKV)
        settings = self.settings
        self._make_room()
        history_BCT, sum_BCT = _beams(self.token_BKT, parent_BC), _beams(self.sum_BKT, parent_BC)
        # A place whose steps are used up goes round with the others and writes where nobody reads.
        step_B11 = self.step_B.clamp_max(settings.max_steps - 1)[:, None, None]
        step_BC1 = step_B11.expand(-1, token_BC.shape[1], 1)
        history_BCT.scatter_(2, step_BC1, token_BC[..., None])
        sum_BCT.scatter_(2, step_BC1, score_BC[..., None].to(sum_BCT.dtype))
        count_B1 = step_B11[..., 0] + 1
        ends_BC = ((token_BC == settings.eos) | (count_B1 == settings.max_steps)) & (score_BC > _DEAD)
        scale_B1 = (count_B1.double() ** settings.length_penalty).to(score_BC.dtype)
        self.step_B = self.step_B + ~self.pool.closed_B
        self._collect(score_BC / scale_B1, ends_BC, (history_BCT, sum_BCT), count_B1)
        # The best K candidates that do not end go on; the sort is stable, so ties keep their order.
        open_BC = score_BC.masked_fill(ends_BC, _DEAD)
        chosen_BK = open_BC.sort(dim=1, descending=True, stable=True).indices[:, : settings.beam]
        self.score_BK = open_BC.gather(1, chosen_BK)
        self.last_BK = token_BC.gather(1, chosen_BK)
        self.token_BKT, self.sum_BKT = _beams(history_BCT, chosen_BK), _beams(sum_BCT, chosen_BK)
        if settings.stop == "never":
            scale_B1 = scale_B1.clamp_min(float(settings.max_steps) ** settings.length_penalty)
        self._mark_finished(self.score_BK[:, :1] / scale_B1)
        self.steps = [step + 1 for step in self.steps]
        return parent_BC.gather(1, chosen_BK)

    def keep(self, sentence_B: Tensor) -> None:
        """Write down what was found and go on with some sentences only."""
        self.write_down(range(len(self.sentences)))
        self.sentences = [self.sentences[b] for b in sentence_B.tolist()]
        self.steps, self.step_B = [self.steps[b] for b in sentence_B.tolist()], self.step_B[sentence_B]
        self.began = [self.began[b] for b in sentence_B.tolist()]
        self.fed = [self.fed[b] for b in sentence_B.tolist()]
        self.last_BK, self.score_BK = self.last_BK[sentence_B], self.score_BK[sentence_B]
        self.token_BKT, self.sum_BKT = self.token_BKT[sentence_B], self.sum_BKT[sentence_B]
        self.pool.keep(sentence_B)

    def note_finished(self, places: Iterable[int]) -> None:
        """Keep what the sentences at these places cost, which may have ended some steps ago."""
        new = [place for place in places if self.sentences[place] not in self.cost]
        steps = self.step_B.clamp_max(self.settings.max_steps).tolist() if new else []
        for at in new:
            self.cost[self.sentences[at]] = steps[at] - self.fed[at], perf_counter() - self.began[at]

    def write_down(self, places: Iterable[int]) -> None:
        """Put the finished hypotheses at some places into `found`, best first."""
        place_X = torch.tensor(list(places), dtype=torch.long, device=self.last_BK.device)
        score_XK = self.pool.score_BK[place_X]
        order_XK = score_XK.sort(dim=1, descending=True, stable=True).indices
        rows = zip(
            place_X.tolist(),
            order_XK.tolist(),
            score_XK.tolist(),
            self.pool.length_BK[place_X].tolist(),
            self.pool.token_BKT[place_X].tolist(),
            self.pool.sum_BKT[place_X].diff(dim=2, prepend=score_XK.new_zeros((*score_XK.shape, 1))).tolist(),
            strict=True,
        )
        for place, order, scores, lengths, tokens, gains in rows:
            number = self.sentences[place]
            passes, seconds = self.cost.get(number, (0, 0.0))
            self.found[number] = []
            for k in order:
                if said := tokens[k][: lengths[k]]:
                    shown = self.settings.shown(said)
                    gain = tuple(gains[k][: len(said)][shown])
                    made = Hypothesis(tuple(said[shown]), scores[k], passes, gain, seconds=seconds)
                    self.found[number].append(made)

    def _make_room(self) -> None:
        """Widen the histories where a step would not fit."""
        room, limit = self.token_BKT.shape[2], self.settings.max_steps
        if room < limit and max(self.steps) >= room:
            more = min(2 * room, limit) - room
            for owner in (self, self.pool):
                owner.token_BKT = torch.nn.functional.pad(owner.token_BKT, (0, more))
                owner.sum_BKT = torch.nn.functional.pad(owner.sum_BKT, (0, more))

    def _candidates(self, logits_BKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best 2K continuations: score, token and parent, each (B, C), best first."""
        settings = self.settings
        K, V = logits_BKV.shape[1:]
        # The best 2K of all are among the best 2K of each beam, and so many that are allowed among these.
        # On a CPU one fused pass, and faster than logsumexp.
        gain_BKV = logits_BKV.log_softmax(2)
        ruled_BKV = self._ruled(logits_BKV, gain_BKV) if settings.rules else gain_BKV
        ordered_BKV = ruled_BKV if settings.rules else logits_BKV
        token_BKC = _largest(ordered_BKV, min(2 * K + len(settings.forbidden), V))
        forbidden_BKC = torch.isin(token_BKC, self._forbidden)
        gain_BKC = ruled_BKV.gather(2, token_BKC).masked_fill_(forbidden_BKC, _DEAD)
        step_B = self.step_B.clamp_max(settings.max_steps - 1)
        for step in {min(step, settings.max_steps - 1) for step in self.steps}:
            token = settings.forced(step)
            if token is not None:
                row_B11 = (step_B == step)[:, None, None]
                index_BK1 = torch.full_like(token_BKC[..., :1], token)
                free = settings.free_forced and settings.given(step) is None
                gain_BK1 = gain_BKC.new_zeros(index_BK1.shape) if free else gain_BKV.gather(2, index_BK1)
                only_BKC = torch.nn.functional.pad(gain_BK1, (0, gain_BKC.shape[2] - 1), value=_DEAD)
                gain_BKC = torch.where(row_B11, only_BKC, gain_BKC)
                token_BKC = token_BKC.masked_fill(row_B11, token)
        width = token_BKC.shape[2]
        score_BN = (self.score_BK[:, :, None] + gain_BKC).flatten(1)
        score_BC, index_BC = _pad_sorted(score_BN, 2 * K)
        return score_BC, token_BKC.flatten(1).gather(1, index_BC), index_BC // width

    def _ruled(self, logits_BKV: Tensor, gain_BKV: Tensor) -> Tensor:
        """Log-probabilities of the next tokens under the rules; for greedy search, of changed logits."""
        rules = cast(TokenRules, self.settings.rules)
        start_BK1 = torch.full_like(self.token_BKT[..., :1], self.settings.start)
        past_BKT = torch.cat([start_BK1, self.token_BKT], 2)
        length_B = 1 + self.step_B.clamp_max(self.settings.max_steps - 1)
        if self.settings.beam == 1:
            return rules(logits_BKV, past_BKT, length_B).log_softmax(2)
        return rules(gain_BKV, past_BKT, length_B)

    def _collect(
        self, final_BC: Tensor, ends_BC: Tensor, history: tuple[Tensor, Tensor], count_B1: Tensor
    ) -> None:
        """Put the hypotheses that end at this step, with their final scores and lengths, into the pool."""
        K, pool = self.settings.beam, self.pool
        ends_BK = ends_BC[:, :K] & ~pool.closed_B[:, None]
        final_BK = final_BC[:, :K].masked_fill(~ends_BK, _DEAD)
        merged_BN = torch.cat([pool.score_BK.to(final_BK.dtype), final_BK], dim=1)
        # fairseq keeps the first K that end, transformers the best K; ties keep the earlier one.
        key_BN = (merged_BN > _DEAD).float() if self.settings.stop == "fairseq" else merged_BN
        keep_BK = key_BN.sort(dim=1, descending=True, stable=True).indices[:, :K]
        length_BN = torch.cat([pool.length_BK, count_B1 * ends_BK.long()], dim=1)
        token_BNT, sum_BNT = (
            torch.cat([old_BKT, new_BCT[:, :K]], dim=1)
            for old_BKT, new_BCT in zip((pool.token_BKT, pool.sum_BKT), history, strict=True)
        )
        pool.score_BK = merged_BN.gather(1, keep_BK)
        pool.length_BK = length_BN.gather(1, keep_BK)
        pool.token_BKT, pool.sum_BKT = _beams(token_BNT, keep_BK), _beams(sum_BNT, keep_BK)

    def _mark_finished(self, attainable_B1: Tensor) -> None:
        """Mark the sentences whose search is finished after this step, given their best open scores."""
        full_B = (self.pool.score_BK > _DEAD).all(dim=1)
        settings = self.settings
        if settings.stop != "fairseq" and not settings.early_stopping and settings.beam > 1:
            full_B = full_B & (attainable_B1[:, 0] <= self.pool.score_BK.amin(dim=1))
        self.pool.closed_B = self.pool.closed_B | full_B


def _beams(history_BKT: Tensor, beam_BN: Tensor) -> Tensor:
    """The histories of some beams of each sentence."""
    return history_BKT.gather(1, beam_BN[..., None].expand(-1, -1, history_BKT.shape[2]))


def _largest(logits_BKV: Tensor, count: int) -> Tensor:
    """The tokens of the `count` largest values of each row, the largest first.

    The tokens are dealt out to columns of `_COLUMN`; the largest values stand in those columns that have
    the largest maxima, so that only these are searched. `topk` over a whole vocabulary costs more than
    a pass over its values by far.
    """
    tokens = logits_BKV.shape[2]
    columns = tokens // _COLUMN
    if columns <= 2 * count:
        return logits_BKV.topk(count, dim=2).indices
    dealt = columns * _COLUMN
    maxima = logits_BKV[:, :, :dealt].unflatten(2, (_COLUMN, columns)).amax(2)
    column = maxima.topk(count, dim=2, sorted=False).indices
    row = torch.arange(0, dealt, columns, device=column.device)
    rest = torch.arange(dealt, tokens, device=column.device).expand(*column.shape[:2], -1)
    token = torch.cat([(column[..., None] + row).flatten(2), rest], 2)
    return token.gather(2, logits_BKV.gather(2, token).topk(count, dim=2).indices)


def _pad_sorted(score_BN: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The best `width` scores and their indices, best first; dead ones fill up a row that is too short."""
    score_BC, index_BC = score_BN.topk(min(width, score_BN.shape[1]), dim=1)
    missing = width - score_BC.shape[1]
    if missing:
        score_BC = torch.nn.functional.pad(score_BC, (0, missing), value=_DEAD)
        index_BC = torch.nn.functional.pad(index_BC, (0, missing))
    return score_BC, index_BC
