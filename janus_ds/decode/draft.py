"""Lossless drafting: NAR drafts a sentence, AR checks all of it in one pass and keeps what it would say.

A round proposes and checks. The check feeds AR a block of content rows: the last token that is settled and
the drafted ones behind it; the query row of each gives AR's own choice for the next token. The longest
prefix of the draft that equals these choices is accepted, and one more token is known for certain: AR's
choice where the draft differs, or behind its end. So a round settles at least one token, and by induction
every settled token is what AR decoding one by one would have chosen: the output is that of greedy search
(or, under a temperature, a sample of AR's distribution: `model_drafts.py`). Several drafts of a sentence
are checked at once, as beams; the one of which most is accepted counts.

Sentences of a batch stand at points of their own. Rejected rows are dropped from the cache.

Shape letters: B sentences, K drafts of a sentence, T rows of a block, P checked rows, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from janus_ds.decode.hypothesis import ScoredTokens
from janus_ds.decode.search_settings import SearchSettings


@dataclass(frozen=True)
class DraftRound:
    """What became of one draft.

    Attributes:
        prefix: inner tokens that were settled before.
        drafted: tokens of the draft.
        accepted: how many of them AR would have chosen; the next one was rejected if there was one.
        passes: decoder passes of the round, the check included.
    """

    prefix: int
    drafted: int
    accepted: int
    passes: int


@dataclass(frozen=True)
class DraftedTokens(ScoredTokens):
    """An output and how it came about, draft by draft."""

    rounds: tuple[DraftRound, ...] = ()


@dataclass
class Payoff:
    """Whether drafts save more than they cost, by what was accepted so far.

    A check costs as much as `1 + _CHECK_COST * sentences` steps of greedy AR: measured with the packaged
    model on one CPU thread, where the rows of a block are not free; nothing was measured on a GPU.
    """

    sentences: int = 0
    passes: int = 0
    steps: int = 0

    def note(self, found: Sequence[DraftedTokens]) -> None:
        """Count outputs that were drafted; greedy AR needs a step a token and one for eos."""
        self.sentences += len(found)
        self.passes += sum(item.passes for item in found)
        self.steps += sum(len(item.tokens) + 1 for item in found)

    def pays(self, sentences: int) -> bool:
        """Whether a batch of so many sentences should be drafted; the first small ones are, to find out."""
        if self.sentences < _TRIED:
            return sentences <= _TRIED // 2
        return self.steps > self.passes * (1 + _CHECK_COST * sentences)


_CHECK_COST, _TRIED = 0.65, 8


@dataclass(frozen=True)
class Proposal:
    """What is proposed for one sentence.

    Attributes:
        drafts: at least one; each is what may follow the settled tokens, and may be empty.
        passes: decoder passes that they cost.
        drawn_MV: the distributions that the tokens of the only draft were drawn from, each by itself; None:
            they were not drawn but chosen.
    """

    drafts: list[list[int]]
    passes: int
    drawn_MV: Tensor | None = None


@dataclass
class Sentence:
    """The state of one sentence.

    Attributes:
        number: which sentence of the call it is.
        pending: settled tokens that AR has not been fed yet, at least one.
        inner: settled tokens without start symbols.
        steps: settled tokens as AR counts them (a forced first one included).
        pool: drafts of the whole sentence, the latest first: what was proposed, and AR's choices behind
            each difference.
    """

    number: int
    pending: list[int]
    inner: list[int] = field(default_factory=list)
    steps: int = 0
    total: float = 0.0
    passes: int = 0
    rounds: list[DraftRound] = field(default_factory=list)
    pool: list[list[int]] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        """eos is settled: nothing waits to be fed."""
        return not self.pending

    def settle(self, proposal: Proposal, verdict: Verdict, settings: SearchSettings) -> None:
        """Record a verdict."""
        passes, draft = proposal.passes + 1, proposal.drafts[verdict.draft]
        self.rounds.append(DraftRound(len(self.inner), len(draft), verdict.accepted, passes))
        self.passes += passes
        self.total += verdict.gain
        self.steps += verdict.accepted + 1
        self.inner += draft[: verdict.accepted]
        ended = verdict.following == settings.eos
        self.inner += [] if ended else [verdict.following]
        self.pending = [] if ended else [verdict.following]
        if verdict.spare:
            self.pool.insert(0, self.inner + verdict.spare)

    def room(self, settings: SearchSettings) -> int:
        """Most tokens that a draft may have; the last step is eos's."""
        return settings.max_steps - 1 - self.steps


class DraftDecoder(Protocol):
    """What the search asks of a model."""

    def propose(self, sentences: Sequence[Sentence]) -> list[Proposal]:
        """Drafts for each open sentence, no longer than its room."""

    def check(self, token_BKT: Tensor, parent_B: Tensor | None) -> Tensor:
        """AR's hidden rows that predict what follows each token of a block, (B, K, T, D).

        All drafts of a sentence go on from the draft `parent_B` of the block before.
        """

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """Logits over the vocabulary, (X, V), in float32 at least."""

    def accept(self, kept_B: Tensor) -> None:
        """Keep the first rows of the last block only."""

    def keep(self, sentence_B: Tensor) -> None:
        """Go on with these sentences only, by index."""


@dataclass(frozen=True)
class Verdict:
    """What AR says about the drafts of one sentence.

    Attributes:
        draft: which one counts.
        accepted: tokens of it that stand.
        following: the token behind them; may be eos.
        gain: log-probability of all these tokens.
        spare: AR's choices behind a difference.
    """

    draft: int
    accepted: int
    following: int
    gain: float
    spare: list[int]


class Judge(Protocol):
    """How drafts are accepted."""

    def __call__(
        self, logits_PV: Tensor, sentences: Sequence[Sentence], proposals: Sequence[Proposal]
    ) -> list[Verdict]:
        """Verdicts, from the logits of M + 1 rows for each draft of M tokens, in order."""


def draft_search(
    decoder: DraftDecoder,
    numbers: Sequence[int],
    settings: SearchSettings,
    judge: Judge | None = None,
) -> list[DraftedTokens]:
    """Decode a batch of sentences.

    Args:
        decoder: the model on the encoded sources, with an empty cache.
        numbers: a name for each sentence, by which a sampling judge draws.
        settings: as for :func:`beam_search` with one beam; `stop` only says what a forced token costs.
        judge: None: greedy.

    Returns:
        For each sentence what greedy search finds, with AR's score.
    """
    first = [] if settings.forced_first is None else [settings.forced_first]
    sentences = [Sentence(number, [settings.start, *first], steps=len(first)) for number in numbers]
    judge = judge or GreedyJudge(settings)
    going, parents = list(sentences), None
    while going:
        chosen = _round(decoder, going, parents, judge, settings)
        left = [place for place, sentence in enumerate(going) if not sentence.closed]
        if left and len(left) < len(going):
            decoder.keep(torch.tensor(left))
        going = [going[place] for place in left]
        parents = torch.tensor([chosen[place] for place in left])
    return [_result(sentence, settings) for sentence in sentences]


def _round(
    decoder: DraftDecoder,
    going: Sequence[Sentence],
    parent_B: Tensor | None,
    judge: Judge,
    settings: SearchSettings,
) -> list[int]:
    """Propose, check, and settle what is certain; which draft of each sentence goes on."""
    proposals = decoder.propose(going)
    blocks = [[s.pending + draft for draft in p.drafts] for s, p in zip(going, proposals, strict=True)]
    width = max(len(block) for drafts in blocks for block in drafts)
    beams = max(len(drafts) for drafts in blocks)
    filled = [drafts + drafts[:1] * (beams - len(drafts)) for drafts in blocks]
    # What pads a block is rejected like any other row.
    padded = [[block + [settings.eos] * (width - len(block)) for block in drafts] for drafts in filled]
    hidden_BKTD = decoder.check(torch.tensor(padded), parent_B)
    for sentence, gain in zip(going, _forced_gains(decoder, hidden_BKTD, going, settings), strict=True):
        sentence.total += gain
    rows = [
        (place * beams + number) * width + row
        for place, (sentence, drafts) in enumerate(zip(going, blocks, strict=True))
        for number, block in enumerate(drafts)
        for row in range(len(sentence.pending) - 1, len(block))
    ]
    hidden_PD = hidden_BKTD.flatten(0, 2)[torch.tensor(rows, device=hidden_BKTD.device)]
    verdicts = judge(decoder.logits(hidden_PD), going, proposals)
    kept = [len(s.pending) + verdict.accepted for s, verdict in zip(going, verdicts, strict=True)]
    for sentence, proposal, verdict in zip(going, proposals, verdicts, strict=True):
        sentence.settle(proposal, verdict, settings)
    decoder.accept(torch.tensor(kept, device=hidden_BKTD.device))
    return [verdict.draft for verdict in verdicts]


def _forced_gains(
    decoder: DraftDecoder, hidden_BKTD: Tensor, going: Sequence[Sentence], settings: SearchSettings
) -> list[float]:
    """Log-probabilities of forced first tokens, in the first round of a search that counts them."""
    if settings.forced_first is None or settings.free_forced or going[0].passes:
        return [0.0] * len(going)
    logits_BV = decoder.logits(hidden_BKTD[:, 0, 0])
    return logits_BV.log_softmax(1)[:, settings.forced_first].tolist()


def _result(sentence: Sentence, settings: SearchSettings) -> DraftedTokens:
    score = sentence.total / sentence.steps**settings.length_penalty
    return DraftedTokens(tuple(sentence.inner), score, sentence.passes, rounds=tuple(sentence.rounds))


class GreedyJudge:
    """Accepts what AR would have chosen itself, with the tie rule of the beam search."""

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings

    def __call__(
        self, logits_PV: Tensor, sentences: Sequence[Sentence], proposals: Sequence[Proposal]
    ) -> list[Verdict]:
        """See :class:`Judge`."""
        settings = self._settings
        total_P = logits_PV.logsumexp(1)
        forbidden = torch.tensor(settings.forbidden, dtype=torch.long, device=logits_PV.device)
        # Two, as a search with one beam asks for: of equal logits, topk must give the same one here.
        best_P2, token_P2 = logits_PV.index_fill(1, forbidden, float("-inf")).topk(2, dim=1)
        choices, gains = token_P2[:, 0].tolist(), (best_P2[:, 0] - total_P).tolist()
        ends = (logits_PV[:, settings.eos] - total_P).tolist()
        verdicts, start = [], 0
        for sentence, proposal in zip(sentences, proposals, strict=True):
            found = []
            for number, draft in enumerate(proposal.drafts):
                stop = start + len(draft) + 1
                choice, gain = choices[start:stop], gains[start:stop]
                if sentence.room(settings) == len(draft):
                    choice[-1] = settings.eos
                    gain[-1] = 0.0 if settings.free_forced else ends[stop - 1]
                found.append(_agreement(number, draft, choice, gain, settings.eos))
                start = stop
            verdicts.append(max(found, key=lambda verdict: verdict.accepted))
        return verdicts


def _agreement(
    number: int, draft: Sequence[int], choice: Sequence[int], gain: Sequence[float], eos: int
) -> Verdict:
    """Accept a draft up to where it differs from AR's choices; eos among these ends it."""
    accepted = 0
    while accepted < len(draft) and draft[accepted] == choice[accepted] != eos:
        accepted += 1
    spare = list(choice[accepted + 1 :])
    if eos in spare:
        spare = spare[: spare.index(eos)]
    return Verdict(number, accepted, choice[accepted], sum(gain[: accepted + 1]), spare)
