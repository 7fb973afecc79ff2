"""Lossless drafting: NAR drafts a sentence, AR checks the whole draft in one pass and keeps what it would say.

A round is one draft and one check. The check feeds AR a block of content rows: the last token that is
settled and the drafted ones behind it; the query row of each gives AR's own choice for the next token.
The longest prefix of the draft that equals these choices is accepted, and one more token is known for
certain: AR's choice where the draft differs, or behind its end. So a round settles at least one token,
and by induction every settled token is what AR decoding one by one would have chosen: the output is that
of greedy search (or, under a temperature, a sample of AR's distribution: `draft_sampling.py`).

What is not settled is drafted again, in one of two ways:

- `nar`: by mask-predict with the settled tokens given and the length estimated anew: the likeliest of
  those classes of the length head that the settled tokens leave possible;
- `ar`: AR's choices behind the difference, which the check has computed already. They have seen the
  rejected token, so they may be wrong, but they cost no pass.

Sentences of a batch stand at points of their own. Rejected rows are dropped from the cache.

Shape letters: B sentences, T rows of a block, P checked rows, D width, V vocabulary, K length classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from janus_ds.decode.beam_search import SearchSettings
from janus_ds.decode.hypothesis import ScoredTokens

__all__ = ["Draft", "DraftDecoder", "DraftRound", "DraftedTokens", "Judge", "Verdict", "draft_search"]

_CHUNK_ROWS = 1024
"""Rows that are projected to the vocabulary at a time."""


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


@dataclass(frozen=True)
class Draft:
    """Tokens that are proposed for one sentence.

    Attributes:
        tokens: what follows the settled tokens.
        passes: decoder passes that they cost.
        proposal_MV: the distributions that the tokens were drawn from, each by itself; None: the tokens
            were not drawn but chosen.
    """

    tokens: list[int]
    passes: int
    proposal_MV: Tensor | None = None


@dataclass
class Sentence:
    """The books of one sentence.

    Attributes:
        number: which sentence of the call it is.
        pending: settled tokens that AR has not been fed yet, at least one.
        inner: settled tokens without start symbols.
        steps: settled tokens as AR counts them (a forced first one included).
        spare: AR's choices behind the last difference.
    """

    number: int
    pending: list[int]
    inner: list[int] = field(default_factory=list)
    steps: int = 0
    total: float = 0.0
    passes: int = 0
    rounds: list[DraftRound] = field(default_factory=list)
    spare: list[int] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        """eos is settled: nothing waits to be fed."""
        return not self.pending

    def settle(self, draft: Draft, verdict: Verdict, settings: SearchSettings) -> None:
        """Enter a verdict into the books."""
        passes = draft.passes + 1
        self.rounds.append(DraftRound(len(self.inner), len(draft.tokens), verdict.accepted, passes))
        self.passes += passes
        self.total += verdict.gain
        self.steps += verdict.accepted + 1
        self.inner += draft.tokens[: verdict.accepted]
        self.spare = verdict.spare
        ended = verdict.following == settings.eos
        self.inner += [] if ended else [verdict.following]
        self.pending = [] if ended else [verdict.following]

    def room(self, settings: SearchSettings) -> int:
        """Most tokens that a draft may have; the last step is eos's."""
        return settings.max_steps - 1 - self.steps


class DraftDecoder(Protocol):
    """What the search asks of a model."""

    def propose(self, sentences: Sequence[Sentence]) -> list[Draft]:
        """A draft for each open sentence, no longer than its room."""

    def check(self, token_BT: Tensor) -> Tensor:
        """AR's hidden rows that predict what follows each token of a block, (B, T, D)."""

    def logits(self, hidden_XD: Tensor) -> Tensor:
        """Logits over the vocabulary, (X, V)."""

    def accept(self, kept_B: Tensor) -> None:
        """Keep the first rows of the last block only."""

    def keep(self, sentence_B: Tensor) -> None:
        """Go on with these sentences only, by index."""


@dataclass(frozen=True)
class Verdict:
    """What AR says about one draft.

    Attributes:
        accepted: tokens of the draft that stand.
        following: the token behind them; may be eos.
        gain: log-probability of all these tokens.
        spare: AR's choices behind a difference.
    """

    accepted: int
    following: int
    gain: float
    spare: list[int]


class Judge(Protocol):
    """How drafts are accepted."""

    def __call__(
        self, logits_PV: Tensor, sentences: Sequence[Sentence], drafts: Sequence[Draft]
    ) -> list[Verdict]:
        """Verdicts, from the logits of M + 1 rows for each draft of M tokens (and of a forced first one)."""


def draft_search(
    decoder: DraftDecoder,
    numbers: Sequence[int],
    settings: SearchSettings,
    judge: Judge | None = None,
    prefixes: Sequence[Sequence[int]] | None = None,
) -> list[DraftedTokens]:
    """Decode a batch of sentences.

    Args:
        decoder: the model on the encoded sources, with an empty cache.
        numbers: a name for each sentence, by which a sampling judge draws.
        settings: as for :func:`beam_search` with one beam; `stop` only says what a forced token costs.
        judge: None: greedy.
        prefixes: tokens that each output begins with.

    Returns:
        For each sentence what greedy search finds, with AR's score.
    """
    first = [] if settings.forced_first is None else [settings.forced_first]
    books = []
    for place, number in enumerate(numbers):
        given = list(prefixes[place]) if prefixes else []
        books.append(Sentence(number, [settings.start, *first, *given], given, len(first) + len(given)))
    judge = judge or GreedyJudge(settings)
    going = list(books)
    while going:
        _round(decoder, going, settings, judge)
        left = [place for place, sentence in enumerate(going) if not sentence.closed]
        if left and len(left) < len(going):
            decoder.keep(torch.tensor(left))
        going = [going[place] for place in left]
    return [_result(sentence, settings) for sentence in books]


def _round(
    decoder: DraftDecoder, going: Sequence[Sentence], settings: SearchSettings, judge: Judge
) -> None:
    """Draft, check, and settle what is certain."""
    drafts = decoder.propose(going)
    blocks = [sentence.pending + draft.tokens for sentence, draft in zip(going, drafts, strict=True)]
    width = max(len(block) for block in blocks)
    # What pads a block is rejected like any other row.
    token_BT = torch.tensor([block + [settings.eos] * (width - len(block)) for block in blocks])
    hidden_BTD = decoder.check(token_BT)
    for sentence, gain in zip(going, _forced_gains(decoder, hidden_BTD, going, settings), strict=True):
        sentence.total += gain
    rows = [
        place * width + row
        for place, (sentence, block) in enumerate(zip(going, blocks, strict=True))
        for row in range(len(sentence.pending) - 1, len(block))
    ]
    row_P = torch.tensor(rows, device=hidden_BTD.device)
    hidden_PD = hidden_BTD.flatten(0, 1)[row_P]
    parts = [decoder.logits(hidden_PD[i : i + _CHUNK_ROWS]) for i in range(0, len(rows), _CHUNK_ROWS)]
    logits_PV = parts[0] if len(parts) == 1 else torch.cat(parts)
    kept = []
    for sentence, draft, verdict in zip(going, drafts, judge(logits_PV, going, drafts), strict=True):
        kept.append(len(sentence.pending) + verdict.accepted)
        sentence.settle(draft, verdict, settings)
    decoder.accept(torch.tensor(kept, device=hidden_BTD.device))


def _forced_gains(
    decoder: DraftDecoder, hidden_BTD: Tensor, going: Sequence[Sentence], settings: SearchSettings
) -> list[float]:
    """Log-probabilities of forced first tokens, in the first round of a search that counts them."""
    if settings.forced_first is None or settings.stop == "transformers" or going[0].passes:
        return [0.0] * len(going)
    return log_softmax(decoder.logits(hidden_BTD[:, 0]))[:, settings.forced_first].tolist()


def log_softmax(logits_XV: Tensor) -> Tensor:
    """Log-probabilities in at least float32."""
    return (logits_XV if logits_XV.dtype == torch.float64 else logits_XV.float()).log_softmax(-1)


def _result(sentence: Sentence, settings: SearchSettings) -> DraftedTokens:
    score = sentence.total / sentence.steps**settings.length_penalty
    return DraftedTokens(tuple(sentence.inner), score, sentence.passes, tuple(sentence.rounds))


class GreedyJudge:
    """Accepts what AR would have chosen itself, with the tie rule of the beam search."""

    def __init__(self, settings: SearchSettings) -> None:
        self._settings = settings

    def __call__(
        self, logits_PV: Tensor, sentences: Sequence[Sentence], drafts: Sequence[Draft]
    ) -> list[Verdict]:
        """See :class:`Judge`."""
        settings = self._settings
        logits_PV = logits_PV if logits_PV.dtype == torch.float64 else logits_PV.float()
        total_P = logits_PV.logsumexp(1)
        forbidden = torch.tensor(settings.forbidden, dtype=torch.long, device=logits_PV.device)
        # Two, as a search with one beam asks for: of equal logits, topk must give the same one here.
        best_P2, token_P2 = logits_PV.index_fill(1, forbidden, float("-inf")).topk(2, dim=1)
        choices, gains = token_P2[:, 0].tolist(), (best_P2[:, 0] - total_P).tolist()
        ends = (logits_PV[:, settings.eos] - total_P).tolist()
        verdicts, start = [], 0
        for sentence, draft in zip(sentences, drafts, strict=True):
            stop = start + len(draft.tokens) + 1
            choice, gain = choices[start:stop], gains[start:stop]
            if sentence.room(settings) == len(draft.tokens):
                choice[-1] = settings.eos
                gain[-1] = 0.0 if settings.stop == "transformers" else ends[stop - 1]
            verdicts.append(_agreement(draft.tokens, choice, gain, settings.eos))
            start = stop
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
