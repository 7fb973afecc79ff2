"""Beam search against list-based references of both stop rules, on tables instead of a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from janus_ds.decode.beam_search import _largest, beam_search
from janus_ds.decode.search_settings import SearchSettings

BOS, PAD, EOS, UNK, VOCAB = 0, 1, 2, 3, 11
BASE = SearchSettings(beam=4, max_steps=7, start=BOS, eos=EOS, forbidden=(BOS, PAD, UNK))
Next = Callable[[int, tuple[int, ...]], Tensor]


def table(seed: int, eos_bonus: float = 1.0) -> Next:
    """Log-probabilities of the next token that depend on the sentence and the whole prefix."""

    def next_log_probs(sentence: int, prefix: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, sentence, prefix)) % 2**31)
        logits = 2.0 * torch.randn(VOCAB, generator=generator, dtype=torch.float64)
        logits[EOS] += eos_bonus
        return logits.log_softmax(0)

    return next_log_probs


class Decoder:
    """The step function of a table: it follows the parents it is given, as a cache does."""

    def __init__(self, next_log_probs: Next, sentences: int, start: int) -> None:
        self.next_log_probs = next_log_probs
        self.prefix: list[list[tuple[int, ...]]] = [[] for _ in range(sentences)]
        self.sentences = list(range(sentences))
        self.start = start
        self.steps = 0

    def __call__(self, token_BK: Tensor, parent_BK: Tensor | None) -> Tensor:
        self.steps += 1
        if parent_BK is None:
            assert (token_BK == self.start).all()
            self.prefix = [[()] * token_BK.shape[1] for _ in self.sentences]
        else:
            pairs = zip(token_BK.tolist(), parent_BK.tolist(), strict=True)
            self.prefix = [
                [self.prefix[b][p] + (t,) for t, p in zip(*rows, strict=True)] for b, rows in enumerate(pairs)
            ]
        # Raw logits: a shift by a constant must not matter.
        rows = zip(self.sentences, self.prefix, strict=True)
        return torch.stack([torch.stack([self.next_log_probs(b, p) + 3.0 for p in row]) for b, row in rows])

    def keep(self, sentence_B: Tensor) -> None:
        kept = sentence_B.tolist()
        assert 2 * len(kept) <= len(self.sentences)
        self.sentences = [self.sentences[b] for b in kept]
        self.prefix = [self.prefix[b] for b in kept]


class FedTogether(Decoder):
    """One that feeds `start` together with the first tokens it is given, which the prefix holds then."""

    def __call__(self, token_BK: Tensor, parent_BK: Tensor | None) -> Tensor:
        if parent_BK is None:
            super().__call__(torch.full_like(token_BK, self.start), None)
            self.steps -= 1
            parent_BK = torch.zeros_like(token_BK)
        return super().__call__(token_BK, parent_BK)


Found = list[tuple[tuple[int, ...], float]]


def reference(next_log_probs: Next, sentence: int, s: SearchSettings) -> Found:
    """One sentence, lists and loops: fairseq's SequenceGenerator or transformers' beam search."""
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    done: Found = []
    for step in range(s.max_steps):
        forced = s.forced_first if step == 0 else None
        forced = s.eos if step == s.max_steps - 1 else forced
        candidates = []
        for prefix, score in live:
            log_probs = next_log_probs(sentence, prefix).tolist()
            for token in range(VOCAB) if forced is None else [forced]:
                if forced is None and token in s.forbidden:
                    continue
                gain = 0.0 if forced is not None and s.stop == "transformers" else log_probs[token]
                candidates.append(((*prefix, token), score + gain))
        candidates.sort(key=lambda item: -item[1])
        candidates = candidates[: 2 * s.beam]
        length = (step + 1) ** s.length_penalty
        for prefix, score in candidates[: s.beam]:
            if prefix[-1] == s.eos:
                if s.stop == "transformers":
                    done = sorted([*done, (prefix, score / length)], key=lambda item: -item[1])[: s.beam]
                elif len(done) < s.beam:
                    done.append((prefix, score / length))
        live = [item for item in candidates if item[0][-1] != s.eos][: s.beam]
        if len(done) == s.beam:
            if s.stop == "fairseq" or s.early_stopping:
                break
            if live and live[0][1] / length <= done[-1][1]:
                break
    skip = 0 if s.forced_first is None else 1
    return [(prefix[skip:-1], score) for prefix, score in sorted(done, key=lambda item: -item[1])]


@pytest.mark.parametrize("beam", [1, 2, 4])
@pytest.mark.parametrize(
    ("stop", "early"), [("fairseq", False), ("transformers", False), ("transformers", True)]
)
def test_search_equals_the_reference(stop: str, early: bool, beam: int) -> None:
    sentences = 6
    for seed, penalty, forced in [(1, 1.0, None), (2, 0.0, 5), (3, 2.0, None), (4, 0.6, 7)]:
        forbidden = BASE.forbidden if forced is None else (*BASE.forbidden, forced)
        settings = replace(
            BASE,
            beam=beam,
            stop=stop,
            early_stopping=early,
            length_penalty=penalty,
            forced_first=forced,
            forbidden=forbidden,
        )
        model = table(seed)
        found = beam_search(Decoder(model, sentences, BOS), sentences, settings)
        for sentence, hypotheses in enumerate(found):
            expected = reference(model, sentence, settings)
            assert [item.tokens for item in hypotheses] == [tokens for tokens, _ in expected]
            assert [item.score for item in hypotheses] == pytest.approx(
                [score for _, score in expected], abs=1e-12
            )


def test_the_two_rules_differ_where_a_later_hypothesis_is_better() -> None:
    """Two poor endings come first, a good one last: fairseq stops at two, transformers waits."""
    eos, poor = math.log(0.4), math.log(0.6)

    def next_log_probs(sentence: int, prefix: tuple[int, ...]) -> Tensor:
        log_probs = torch.full((VOCAB,), -40.0, dtype=torch.float64)
        log_probs[EOS], log_probs[5] = (eos, poor) if len(prefix) < 2 else (-40.0, -1e-9)
        if len(prefix) == 5:
            log_probs[EOS], log_probs[5] = 0.0, -40.0
        return log_probs

    settings = replace(BASE, beam=2, max_steps=7)
    (first,) = beam_search(Decoder(next_log_probs, 1, BOS), 1, settings)
    (best,) = beam_search(Decoder(next_log_probs, 1, BOS), 1, replace(settings, stop="transformers"))
    assert {len(item.tokens) for item in first} == {0, 1}
    assert best[0].tokens == (5,) * 5
    assert best[0].score == pytest.approx(2 * poor / 6, abs=1e-6)


@pytest.mark.parametrize("stop", ["fairseq", "transformers"])
@pytest.mark.parametrize("prefix", [(), (5, UNK, 9)])
def test_each_token_has_its_score_and_a_given_beginning_counts(stop: str, prefix: tuple[int, ...]) -> None:
    next_log_probs = table(3)
    for beam in (1, 4):
        settings = replace(BASE, stop=stop, prefix=prefix, beam=beam, max_steps=40)
        found = beam_search(Decoder(next_log_probs, 5, BOS), 5, settings)
        for sentence, items in enumerate(found):
            for item in items:
                said = item.tokens
                gains = [float(next_log_probs(sentence, said[:i])[said[i]]) for i in range(len(said))]
                assert said[: len(prefix)] == prefix
                assert item.token_scores == pytest.approx(gains)
                free_end = stop == "transformers" and len(said) + 1 == settings.max_steps
                end = 0.0 if free_end else float(next_log_probs(sentence, said)[EOS])
                assert item.score == pytest.approx((sum(gains) + end) / (len(said) + 1))
            if beam == 1:
                free = next_log_probs(sentence, prefix).index_fill(0, torch.tensor(BASE.forbidden), -math.inf)
                assert [*items[0].tokens, EOS][len(prefix)] == int(free.argmax())


def test_search_ends_early_and_forbidden_tokens_never_appear() -> None:
    decoder = Decoder(table(6, eos_bonus=4.0), 8, BOS)
    found = beam_search(decoder, 8, replace(BASE, max_steps=30))
    assert decoder.steps < 30
    assert len(decoder.sentences) <= 4
    assert all(not set(item.tokens) & {BOS, PAD, UNK, EOS} for row in found for item in row)
    assert all([item.score for item in row] == sorted((i.score for i in row), reverse=True) for row in found)


def test_a_beam_wider_than_the_vocabulary_gives_fewer_hypotheses() -> None:
    forbidden = tuple(token for token in range(VOCAB) if token not in (EOS, 5))
    ((*found,),) = beam_search(Decoder(table(7), 1, BOS), 1, replace(BASE, max_steps=2, forbidden=forbidden))
    assert sorted(item.tokens for item in found) == [(), (5,)]


def test_values_that_are_not_finite_end_nothing() -> None:
    decoder = Decoder(lambda sentence, prefix: torch.full((VOCAB,), math.nan), 2, BOS)
    assert beam_search(decoder, 2, replace(BASE, max_steps=3)) == [[], []]


@pytest.mark.parametrize("tokens", [11, 1280, 5003])
def test_the_largest_of_a_vocabulary_are_those_of_topk(tokens: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, tokens)
    logits[0, 0, -9:] += 9.0  # all in the rest behind the columns
    logits[1, 1, :900:100] = float("-inf")
    count = min(9, tokens)
    assert torch.equal(_largest(logits, count), logits.topk(count, 2).indices)


@pytest.mark.parametrize("max_steps", [2, 3, 9])
def test_a_first_token_that_is_free_can_be_fed_with_the_start(max_steps: int) -> None:
    settings = replace(BASE, stop="transformers", forced_first=4, start=EOS, max_steps=max_steps)
    one_by_one, together = Decoder(table(3), 5, EOS), FedTogether(table(3), 5, EOS)
    expected = beam_search(one_by_one, 5, settings)
    assert beam_search(together, 5, replace(settings, fed_first=True)) == expected
    assert together.steps == one_by_one.steps - 1
    assert any(hypotheses for hypotheses in expected)
