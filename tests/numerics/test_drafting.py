"""Drafting is lossless: in float64 its output is AR greedy's on every sentence, whatever the drafts are."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.decode.draft import DraftSearch, Payoff, Proposal, Sentence
from janus_ds.decode.generator import Generator
from janus_ds.decode.rescore import ArScorer
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.tiny_model import TINY, TINY_NMT, tiny_generator, tiny_model
from tests.support.two_stream import TOY

OBJECTIVES = {
    "query": ObjectiveConfig(decoder_start="bos"),
    "previous": ObjectiveConfig(
        decoder_start="bos",
        ar_query_position="previous",
        length_convention="with_specials",
        mask_symbol="unk",
    ),
    "content": ObjectiveConfig(decoder_start="bos", ar_stream="content"),
    "eos_bos": ObjectiveConfig(decoder_start="eos_bos"),
    "eos_bos content": ObjectiveConfig(decoder_start="eos_bos", ar_stream="content"),
}
SOURCES = [[9, 8, 7, 6, 5], [7], [6, 5], [15, 14, 13, 12, 11, 10, 9, 8], [20, 21, 22, 23], [], [28, 5, 6, 7]]


def peaked(seed: int, config: ModelConfig, eos: float) -> JanusModel:
    """A random model whose outputs end early or late; some draft well, as their decoders agree."""
    model = tiny_model(config, seed)
    with torch.no_grad():
        model.embedding.weight.mul_(1 + seed % 3)
        model.embedding.weight[TOY.eos] *= eos
    return model


def generator(model: JanusModel, objective: ObjectiveConfig, **decode: Any) -> Generator:
    return tiny_generator(model, objective, beam=1, **decode)


def best(found: list[list[Hypothesis]]) -> list[Hypothesis]:
    return [group[0] for group in found]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_drafts_change_nothing(name: str) -> None:
    objective, accepted, lengths = OBJECTIVES[name], 0, set()
    config = TINY_NMT if name == "previous" else TINY
    for seed, eos in itertools.product(range(2), (0.7, 1.1, 1.4, 1.8)):
        model = peaked(seed, config, eos)
        for longest, stop in ((0, "fairseq"), (4, "transformers"), (1, "fairseq")):
            common = {"max_length": longest, "beam_stop": stop}
            expected = best(generator(model, objective, mode="ar", **common).generate_ids(SOURCES))
            found = best(generator(model, objective, mode="draft", **common).generate_ids(SOURCES))
            assert [item.tokens for item in found] == [item.tokens for item in expected]
            for item, other in zip(found, expected, strict=True):
                assert item.score == pytest.approx(other.score, abs=1e-9)
            # One pass drafts, each other one settles a token of AR's beside the accepted ones.
            accepted += sum(len(i.tokens) + 2 - i.passes for i in found if i.tokens and i.mode != "ar")
            lengths |= {len(item.tokens) for item in expected}
    assert accepted > 20
    # None, one, as many as allowed, as many as the position table has, and others.
    assert {0, 1, 4, 14} < lengths


@pytest.mark.parametrize("name", ["query", "eos_bos"])
@torch.no_grad()
def test_a_forced_first_token_other_than_bos_is_part_of_outputs(name: str) -> None:
    model, common = peaked(1, TINY, 1.1), {"max_length": 5, "forced_bos": 9}
    ar = generator(model, OBJECTIVES[name], mode="ar", **common)
    expected = best(ar.generate_ids(SOURCES[:4]))
    found = best(generator(model, OBJECTIVES[name], mode="draft", **common).generate_ids(SOURCES[:4]))
    assert [item.tokens for item in found] == [item.tokens for item in expected]
    assert {item.tokens[0] for item in found} == {9}
    memory = ar.model.encode(*ar._pad(SOURCES[:4]))
    scores = ArScorer(model, ar.config).scores(memory, [[item.tokens] for item in expected])
    assert [score for (score,) in scores] == pytest.approx([item.score for item in expected])


def test_a_right_draft_takes_one_check(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sources = peaked(1, TINY, 0.6), [[9, 8, 7], [7, 9, 9], [6, 5, 8], [15, 14, 13], [20, 21, 22]]
    expected = best(generator(model, OBJECTIVES["query"], mode="ar").generate_ids(sources))
    calls = []

    def first_drafts(_: Any, sentences: list[Sentence]) -> list[Proposal]:
        calls.append(len(sentences))
        for sentence in sentences:
            sentence.passes = 1
        return [Proposal(list(expected[4 * (len(calls) - 1) + s.number].tokens)) for s in sentences]

    monkeypatch.setattr(DraftSearch, "first_drafts", first_drafts)
    found = best(generator(model, OBJECTIVES["query"], mode="draft").generate_ids(sources))
    assert [item.tokens for item in found] == [item.tokens for item in expected]
    assert calls == [4, 1]
    assert {item.passes for item in found} == {2}


def test_where_drafts_do_not_pay_ar_goes_on_alone() -> None:
    """Large batches are not drafted, small ones only while that is faster; the result says which."""
    model, objective = peaked(0, TINY, 1.1), OBJECTIVES["query"]
    sources = SOURCES[:5] * 4
    expected = [item.tokens for item in best(generator(model, objective, mode="ar").generate_ids(sources))]
    large, small = (generator(model, objective, mode="draft") for _ in range(2))
    large.batch_sentences, small.batch_sentences = 32, 1
    found = best(large.generate_ids(sources))
    assert [item.tokens for item in found] == expected
    assert {item.mode for item in found} == {"ar"}
    found = best(small.generate_ids(sources))
    assert [item.tokens for item in found] == expected
    # Batches are decoded by length: four are drafted and four are not, to see what is faster.
    first = sorted(range(20), key=lambda i: -len(sources[i]))[:8]
    assert [found[i].mode for i in first] == ["draft"] * 4 + ["ar"] * 4


@pytest.mark.parametrize(("drafted", "pays"), [(0.9, True), (1.1, False)])
def test_what_was_faster_goes_on(drafted: float, pays: bool) -> None:
    payoff, batch = Payoff(), [Hypothesis((5, 6, 7), 0.0)]
    for seconds in (9.0, *[drafted] * 3):
        assert payoff.pays(1)
        payoff.note(batch, True, seconds)
    for _ in range(4):
        assert not payoff.pays(1)
        payoff.note(batch, False, 1.0)
    # The slow first batch does not decide, and other sizes are measured by themselves.
    assert payoff.pays(1) == pays
    assert payoff.pays(2)
    assert not payoff.pays(5)
    chosen = []
    for _ in range(100):
        chosen.append(payoff.pays(1))
        payoff.note(batch, chosen[-1], drafted if chosen[-1] else 1.0)
    # What was slower is tried again now and then.
    assert chosen.count(not pays) == 3


SMALL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4, vocab_size=8)


def small_model(seed: int = 3, init_std: float = 0.25) -> JanusModel:
    torch.manual_seed(seed)
    config = replace(TINY, init_std=init_std, encoder_layers=1)
    model = JanusModel(config, SMALL, ParallelLayers()).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(2.0)
    return model


def exact_distribution(
    model: JanusModel, config: RunConfig, temperature: float
) -> dict[tuple[int, ...], float]:
    """Probability of every output of at most two tokens, from AR's logits alone."""
    outputs = [p for n in range(3) for p in itertools.product((5, 6, 7), repeat=n)]
    with torch.no_grad():
        memory = model.encode(torch.tensor([[0, 5, 7, 6, 2]]), torch.tensor([5]))
        scorer = ArScorer(model, config)
        (rows,) = scorer.logits(memory, [outputs])
    found = {}
    for output, logits_TV in zip(outputs, rows, strict=True):
        logits_TV[:, [0, 1, 3, 4]] = -math.inf
        share_TV = (logits_TV / temperature).softmax(1)
        # A third token is eos by force.
        tokens = [*output, SMALL.eos][:2]
        found[output] = math.prod(float(share_TV[t, token]) for t, token in enumerate(tokens))
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def chi_square(counts: Counter[tuple[int, ...]], shares: dict[tuple[int, ...], float], draws: int) -> float:
    """Pearson's statistic; outcomes that are expected fewer than five times are one cell."""
    cells = [(counts[k], draws * p) for k, p in shares.items() if draws * p >= 5]
    rest = (draws - sum(c for c, _ in cells), draws - sum(e for _, e in cells))
    cells += [rest] if rest[1] >= 5 else []
    assert len(cells) > 6
    return sum((count - expected) ** 2 / expected for count, expected in cells)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_have_ars_distribution(temperature: float) -> None:
    """13 outputs: with 12 degrees of freedom 32.9 is passed once in a thousand times."""
    model, draws = small_model(), 3000
    drafts = generator(
        model,
        OBJECTIVES["query"],
        mode="draft",
        max_length=2,
        temperature=temperature,
        seed=5,
    )
    drafts.batch_sentences = 500
    counts = Counter(item.tokens for item in best(drafts.generate_ids([[5, 7, 6]] * draws)))
    shares = exact_distribution(model, drafts.config, temperature)
    assert set(counts) <= set(shares)
    assert chi_square(counts, shares, draws) < 32.9
    # The test can tell: AR at another temperature is another distribution.
    assert chi_square(counts, exact_distribution(model, drafts.config, 2 * temperature), draws) > 100
