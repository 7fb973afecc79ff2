"""Lossless drafting: NAR drafts a sentence, AR checks all of it in one pass and keeps what it would say.

A round proposes and checks. The check feeds AR a block of content rows: the last token that is settled and
the drafted ones behind it; the query row of each gives AR's own choice for the next token. The longest
prefix of the draft that equals these choices is accepted, and one more token is known for certain: AR's
choice where the draft differs, or behind its end. So a round settles at least one token, and by induction
every settled token is what AR decoding one by one would have chosen: the output is that of greedy search.

The first draft is one NAR pass over the likeliest length. The next ones come from the check itself: AR's
choices behind the difference, or what earlier drafts have from there on, at the same place or shifted by one
(AR wanted a token more, or one less). This costs no pass. A tail that continues AR's last token comes first.

Under a temperature outputs are exact samples of AR's distribution (speculative sampling: Leviathan et al.,
Chen et al., 2023; see `sample.stands`). The first draft is drawn from NAR then; what was chosen and not drawn
counts as drawn from a distribution that is sure of it. A draft that stands as a whole is followed by one more
token, drawn from AR.

Sentences of a batch stand at points of their own. Rejected rows are dropped from the cache.

Shape letters: B sentences, M drafted tokens, T rows of a block, P checked rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ds.config.schema import RunConfig
from janus_ds.decode.mask_predict import (
    NarDecoder,
    TargetRows,
    length_candidates,
    plain_settings,
)
from janus_ds.decode.sample import Draws, draw_rows, left_over, stands, token_shares
from janus_ds.decode.search_settings import Hypothesis, search_settings
from janus_ds.model.decoding.cache import ArStream, EncoderOutput
from janus_ds.model.janus import JanusModel

_TRIED, _RETRIED, _MOST = 4, 32, 4
_SHIFTS = (0, 1, -1)
_LONGEST = 6
"""Tokens of a draft that are checked at once: of longer ones the end is seldom accepted."""


class Payoff:
    """Whether drafts save time: seconds a token of each batch, drafted and by AR alone, as measured.

    The first batches of a size are drafted, the next ones are not; then what was faster goes on, and one of
    so many is done the other way, so that other work on the machine decides for a while only. Larger batches
    than `_MOST` are not drafted: there the rows of a check cost more than they save.
    """

    def __init__(self) -> None:
        self._rates: dict[tuple[int, bool], deque[float]] = defaultdict(lambda: deque(maxlen=4 * _TRIED))
        self._noted = 0

    def note(self, found: Sequence[Hypothesis], drafted: bool, seconds: float) -> None:
        """Add a batch; AR needs a step a token and one for eos."""
        steps = sum(len(item.tokens) + 1 for item in found)
        self._rates[len(found), drafted].append(seconds / steps)
        self._noted += 1

    def pays(self, sentences: int) -> bool:
        """Whether a batch of so many sentences should be drafted."""
        drafted, alone = self._rates[sentences, True], self._rates[sentences, False]
        if sentences > _MOST or len(drafted) < _TRIED or len(alone) < _TRIED:
            return sentences <= _MOST and len(drafted) < _TRIED
        return (median(drafted) < median(alone)) != (self._noted % _RETRIED == 0)


@dataclass(frozen=True)
class Proposal:
    """What is proposed for one sentence.

    Attributes:
        draft: what may follow the settled tokens; may be empty.
        drawn_MV: the distributions that its tokens were drawn from, each by itself; None: they were not drawn
            but chosen.
    """

    draft: list[int]
    drawn_MV: Tensor | None = None


@dataclass(frozen=True)
class Verdict:
    """What AR says about the draft of one sentence.

    Attributes:
        accepted: tokens of it that stand.
        following: the token behind them; may be eos.
        gain: log-probability of all these tokens.
        spare: AR's choices behind a difference.
    """

    accepted: int
    following: int
    gain: float
    spare: list[int]


@dataclass
class Sentence:
    """The state of one sentence.

    Attributes:
        number: which of the batch it is.
        pending: settled tokens that AR has not been fed yet; none once eos is settled.
        inner: settled tokens without start symbols.
        steps: settled tokens as AR counts them (a forced first one included).
        total: their log-probability.
        passes: decoder passes made.
        pool: drafts of the whole sentence, the latest first: what was proposed, and AR's choices behind
            each difference.
    """

    number: int
    pending: list[int]
    inner: list[int] = field(default_factory=list)
    steps: int = 0
    total: float = 0.0
    passes: int = 0
    pool: list[list[int]] = field(default_factory=list)

    def settle(self, draft: list[int], verdict: Verdict, eos: int) -> None:
        """Record a verdict."""
        self.total += verdict.gain
        self.steps += verdict.accepted + 1
        self.pending = [] if verdict.following == eos else [verdict.following]
        self.inner += draft[: verdict.accepted] + self.pending
        if verdict.spare:
            self.pool.insert(0, self.inner + verdict.spare)


def tail(sentence: Sentence, room: int) -> list[int]:
    """A continuation of the settled tokens from the pool, of at most `room` tokens."""
    start, likely = len(sentence.inner), list[int]()
    for shift in _SHIFTS:
        for draft in sentence.pool if start + shift > 0 else ():
            found = draft[start + shift :][:room]
            if found and draft[start + shift - 1 : start + shift] == sentence.inner[-1:]:
                return found
            likely = likely or found
    return likely


class DraftSearch:
    """Decodes one batch of sentences.

    Args:
        config: how AR searches (`stop` only says what a forced token costs), and what the length head counts.
        draws: outputs are samples, by these numbers; None: what greedy search finds.
    """

    def __init__(
        self, model: JanusModel, memory: EncoderOutput, config: RunConfig, draws: Draws | None = None
    ) -> None:
        self._model, self._draws, special = model, draws, model.special
        self._search = search = search_settings(config, special)
        # One pass, in which no special symbol is drafted.
        self._nar = replace(plain_settings(config, special), iterations=0, threshold=None)
        self._convention = config.objective.length_convention or "inner"
        self._device = memory.states_BSD.device
        stream = ArStream.of(config.objective, special)
        self._cache = model.start_cache(memory, stream, 1, search.max_steps)
        self._forbidden, self._special = (
            torch.tensor(tokens, dtype=torch.long, device=self._device)
            for tokens in (search.forbidden, self._nar.forbidden)
        )

    def run(self) -> list[Hypothesis]:
        """An output for each sentence, with AR's score."""
        search = self._search
        first = [] if search.forced_first is None else [search.forced_first]
        count = self._cache.memory.sentences
        sentences = [Sentence(number, [search.start, *first], steps=len(first)) for number in range(count)]
        going, proposals = sentences, self.first_drafts(sentences)
        while going:
            self._check(going, proposals)
            left = [place for place, sentence in enumerate(going) if sentence.pending]
            if left and len(left) < len(going):
                self._cache = self._cache.select(torch.tensor(left, device=self._device))
            going = [going[place] for place in left]
            proposals = [Proposal(tail(s, self._longest(s))) for s in going]
        shown = first if search.shows_first else []
        return [
            Hypothesis((*shown, *s.inner), s.total / s.steps**search.length_penalty, s.passes)
            for s in sentences
        ]

    def _room(self, sentence: Sentence) -> int:
        """Most tokens that a draft may have; the last step is eos's."""
        return self._search.max_steps - 1 - sentence.steps

    def _longest(self, sentence: Sentence) -> int:
        room = self._room(sentence)
        return room if self._draws else min(_LONGEST, room)

    def first_drafts(self, sentences: Sequence[Sentence]) -> list[Proposal]:
        """One NAR pass over the likeliest lengths."""
        nar, memory = self._nar, self._cache.memory
        decoder, room = NarDecoder(self._model, memory), self._room(sentences[0])
        length_logits_BK = self._model.length_logits(memory).float()
        length_B1 = length_candidates(length_logits_BK, "paper", 1, self._convention, room + 2)
        blank, counts = TargetRows(length_B1, nar), (length_B1[:, 0] - 2).tolist()
        picked_P = blank.inner_RL.flatten().nonzero().squeeze(1)
        logits_PV = decoder.logits(decoder.hidden(blank.token_RL, length_B1[:, 0], picked_P, max(counts)))
        shares: Sequence[Tensor | None] = [None] * len(counts)
        if self._draws is None:
            token_P = logits_PV.index_fill(1, self._special, float("-inf")).argmax(1)
        else:
            share_PV = token_shares(logits_PV, nar.forbidden, self._draws.sampling)
            token_P = draw_rows(share_PV, self._draws.uniform(counts).to(share_PV.device))
            shares = share_PV.split(counts)
        drafts = zip(token_P.split(counts), shares, strict=True)
        proposals = [Proposal(token_M.tolist(), share_MV) for token_M, share_MV in drafts]
        for sentence, proposal in zip(sentences, proposals, strict=True):
            sentence.passes, sentence.pool = 1, [proposal.draft]
        return proposals if self._draws else [Proposal(p.draft[:_LONGEST]) for p in proposals]

    def _check(self, going: Sequence[Sentence], proposals: Sequence[Proposal]) -> None:
        """One pass of AR over all drafts: settle what is certain."""
        search, cache = self._search, self._cache
        blocks = [s.pending + p.draft for s, p in zip(going, proposals, strict=True)]
        width, first = max(map(len, blocks)), cache.reach == 0
        rows = [
            place * width + row
            for place, (sentence, block) in enumerate(zip(going, blocks, strict=True))
            for row in range(len(sentence.pending) - 1, len(block))
        ]
        # What pads a block is rejected like any other row.
        token = [token for block in blocks for token in [*block, *[search.eos] * (width - len(block))]]
        # One copy to the device: tokens, rows that are judged, and where the blocks stand.
        sent = torch.tensor([*token, *rows, *cache.host_taken_B.tolist()], device=self._device)
        token_N, row_P, cache.taken_B = sent.tensor_split([len(token), len(token) + len(rows)])
        hidden_B1TD = self._model.ar_block(cache, token_N.view(len(going), 1, width))
        if first and search.forced_first is not None and not search.free_forced:
            forced_BV = self._model.logits(hidden_B1TD[:, 0, 0]).log_softmax(1)
            for sentence, gain in zip(going, forced_BV[:, search.forced_first].tolist(), strict=True):
                sentence.total += gain
        logits_PV = self._model.logits(hidden_B1TD.flatten(0, 2)[row_P])
        if self._draws is None:
            verdicts = self._greedy(logits_PV, going, proposals)
        else:
            verdicts = self._sampled(logits_PV, going, proposals, self._draws)
        kept = [len(s.pending) + verdict.accepted for s, verdict in zip(going, verdicts, strict=True)]
        for sentence, proposal, verdict in zip(going, proposals, verdicts, strict=True):
            sentence.passes += 1
            sentence.settle(proposal.draft, verdict, search.eos)
        cache.accept(torch.tensor(kept))

    def _greedy(
        self, logits_PV: Tensor, going: Sequence[Sentence], proposals: Sequence[Proposal]
    ) -> list[Verdict]:
        """Accept what AR would have chosen itself, with the tie rule of the beam search.

        Logits are those of M + 1 rows for a draft of M tokens, in order.
        """
        search, total_P = self._search, logits_PV.logsumexp(1)
        # Two, as a search with one beam asks for: of equal logits, topk must give the same one here.
        best_P2, token_P2 = logits_PV.index_fill(1, self._forbidden, float("-inf")).topk(2, dim=1)
        gain_P, end_P = best_P2[:, 0] - total_P, logits_PV[:, search.eos] - total_P
        told = torch.stack([x.double() for x in (token_P2[:, 0], gain_P, end_P)]).tolist()
        choices, gains, ends = [int(token) for token in told[0]], told[1], told[2]
        verdicts, start = [], 0
        for sentence, proposal in zip(going, proposals, strict=True):
            draft = proposal.draft
            stop = start + len(draft) + 1
            choice, gain = choices[start:stop], gains[start:stop]
            if self._room(sentence) == len(draft):
                choice[-1] = search.eos
                gain[-1] = 0.0 if search.free_forced else ends[stop - 1]
            verdicts.append(_agreement(draft, choice, gain, search.eos))
            start = stop
        return verdicts

    def _sampled(
        self, logits_PV: Tensor, going: Sequence[Sentence], proposals: Sequence[Proposal], draws: Draws
    ) -> list[Verdict]:
        """Accept so that outputs are samples."""
        search, gain_PV = self._search, logits_PV.double().log_softmax(1)
        share_PV = token_shares(logits_PV, search.forbidden, draws.sampling)
        counts = [len(proposal.draft) + 1 for proposal in proposals]
        of_all = dict(zip((sentence.number for sentence in going), counts, strict=True))
        uniform_P = draws.uniform([of_all.get(number, 0) for number in range(draws.sentences)])
        verdicts = []
        for sentence, proposal, share_TV, gain_TV, uniform_T in zip(
            going,
            proposals,
            share_PV.split(counts),
            gain_PV.split(counts),
            uniform_P.to(share_PV.device).split(counts),
            strict=True,
        ):
            draft, last, drawn_MV = proposal.draft, len(proposal.draft), proposal.drawn_MV
            draft_M = torch.tensor(draft, dtype=torch.long, device=share_PV.device)
            if drawn_MV is None:
                drawn_MV = F.one_hot(draft_M, share_PV.shape[1]).to(share_PV)
            accepted = int(
                stands(share_TV[:last], drawn_MV, draft_M, uniform_T[:last]).long().cumprod(0).sum()
            )
            source_1V = share_TV[accepted : accepted + 1]
            if accepted < last:
                source_1V = left_over(source_1V, drawn_MV[accepted : accepted + 1])
            following = int(draw_rows(source_1V, uniform_T[last:]))
            forced = accepted == last == self._room(sentence)
            if forced:
                following = search.eos
            tokens = [*draft[:accepted], following]
            token_T1 = torch.tensor(tokens, device=gain_TV.device)[:, None]
            costly = len(tokens) - int(forced and search.free_forced)
            gain = float(gain_TV.gather(1, token_T1)[:costly].sum())
            verdicts.append(Verdict(accepted, following, gain, []))
        return verdicts


def _agreement(draft: Sequence[int], choice: Sequence[int], gain: Sequence[float], eos: int) -> Verdict:
    """Accept a draft up to where it differs from AR's choices; eos among these ends it."""
    accepted = 0
    while accepted < len(draft) and draft[accepted] == choice[accepted] != eos:
        accepted += 1
    spare = list(choice[accepted + 1 :])
    if eos in spare:
        spare = spare[: spare.index(eos)]
    return Verdict(accepted, choice[accepted], sum(gain[: accepted + 1]), spare)
