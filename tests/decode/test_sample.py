"""Samples of AR: shares by hand, exact frequencies on a small vocabulary, no dependence on the batch."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.config.schema import ObjectiveConfig
from janus_ds.decode.generator import Generator
from janus_ds.decode.sample import Draws, Sampling, draw_rows, sample_search, token_shares
from janus_ds.decode.search_settings import SearchSettings
from tests.support.tiny_model import TINY, tiny_generator, tiny_model

START, EOS = 0, 1
SETTINGS = SearchSettings(beam=1, max_steps=3, start=START, eos=EOS, forbidden=(START,))


class Chain:
    """Logits that depend on the last token only."""

    def __init__(self) -> None:
        self.table_VV = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))

    def __call__(self, token_BK: Tensor, parent_BK: Tensor | None) -> Tensor:
        return self.table_VV[token_BK]

    def keep(self, sentence_B: Tensor) -> None:
        pass


def test_shares_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log()

    def shares(**options: float) -> list[float]:
        given = {"temperature": 1.0, **options}
        return [round(x, 6) for x in token_shares(logits, (), Sampling(**given))[0].tolist()]  # type: ignore[arg-type]

    assert shares() == [0.5, 0.2, 0.2, 0.1]
    assert shares(temperature=0.5) == [round(x / 0.34, 6) for x in (0.25, 0.04, 0.04, 0.01)]
    assert shares(top_k=2) == [round(5 / 7, 6), round(2 / 7, 6), 0, 0]
    assert shares(top_p=0.6) == shares(top_k=2)
    assert shares(top_p=0.01) == shares(top_k=1) == [1, 0, 0, 0]
    assert shares(top_k=9) == shares()
    # top_p is of what top_k has left: 5/7 of two tokens is enough.
    assert shares(top_k=2, top_p=0.7) == [1, 0, 0, 0]
    assert token_shares(logits, (0,), Sampling(1.0))[0].tolist() == pytest.approx([0, 0.4, 0.4, 0.2])
    shares_XV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).double().expand(5, 5)
    assert draw_rows(shares_XV, torch.tensor([0.0, 0.2, 0.25, 0.9, 1.0]).double()).tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=2), Sampling(1.3, top_p=0.8)])
def test_outputs_have_their_probabilities(sampling: Sampling) -> None:
    """All outputs of up to two tokens: 4,000 draws against exact shares, within 4.5 standard errors."""
    count, chain = 4000, Chain()
    found = sample_search(chain, Draws(sampling, range(count)), SETTINGS)
    step = token_shares(chain.table_VV, (START,), sampling)
    expected = {(): float(step[START, EOS])}
    for a in (2, 3):
        expected[(a,)] = float(step[START, a] * step[a, EOS])
    for a, b in product((2, 3), repeat=2):
        expected[(a, b)] = float(step[START, a] * step[a, b])
    assert sum(expected.values()) == pytest.approx(1)
    for tokens, share in expected.items():
        seen = sum(one.tokens == tokens for (one,) in found) / count
        assert abs(seen - share) <= 4.5 * math.sqrt(share * (1 - share) / count) + 1e-12
    gain = chain.table_VV.double().log_softmax(1)
    for (one,) in found[:50]:
        path = [START, *one.tokens, EOS]
        gains = [float(gain[a, b]) for a, b in pairwise(path)]
        assert one.score == pytest.approx(sum(gains) / len(gains))
        assert one.token_scores == pytest.approx(gains[:-1])
        assert one.passes == len(gains)


def test_a_model_samples_alike_in_every_batch() -> None:
    made = Generator.from_checkpoint("demo", "ar", device="cpu", temperature=1.0, seed=5, max_length=12)
    assert made.config.decode.beam == 1
    texts = ["Guten Morgen.", "Wie geht es dir?", "Ich habe heute keine Zeit, weil ich arbeiten muss."]
    found = made.generate(texts)
    assert [item.text for item in made.generate(texts)] == [item.text for item in found]
    codec = made.text
    assert codec is not None
    alone = [made.generate_ids([codec.encode(text)], None, i)[0][0] for i, text in enumerate(texts)]
    assert [item.tokens for item in alone] == [item.tokens for item in found]
    rules = {"no_repeat_ngram_size": 1, "repetition_penalty": 1.3, "min_length": 11}
    for options in ({}, rules):
        options |= {"device": "cpu", "max_length": 12}
        cold = Generator.from_checkpoint("demo", "ar", temperature=1.0, top_k=1, **options)
        greedy = Generator.from_checkpoint("demo", "ar", beam=1, **options)
        for one, other in zip(cold.generate(texts), greedy.generate(texts), strict=True):
            assert one.tokens == other.tokens
            if "min_length" in options:
                assert len(set(one.tokens)) == len(one.tokens) >= 11
            else:
                assert one.score == pytest.approx(other.score, abs=1e-4)
    three = Generator.from_checkpoint("demo", "ar", device="cpu", temperature=2.0, beam=3, max_length=6)
    assert len({item.text for item in three.generate_nbest(texts[:1])[0]}) == 3


@pytest.mark.parametrize(("mode", "lengths"), [("draft", 1), ("aux", 2)])
def test_drafted_samples_do_not_depend_on_the_batch(mode: str, lengths: int) -> None:
    texts = [[5 + (7 * i + j) % 20 for j in range(1 + (5 * i) % 9)] for i in range(9)]
    one, two, other = (
        tiny_generator(
            tiny_model(TINY, 2),
            ObjectiveConfig(decoder_start="bos"),
            batch,
            **{"mode": mode, "beam": 1, "temperature": 1.0, "length_beam": lengths, "seed": seed},
        ).generate_ids(texts)
        for batch, seed in ((9, 3), (1, 3), (9, 4))
    )
    assert [[item.tokens for item in group] for group in one] == [[i.tokens for i in group] for group in two]
    assert [group[0].tokens for group in one] != [group[0].tokens for group in other]


@pytest.mark.parametrize("mode", ["ar", "draft"])
def test_a_forced_end_costs_what_it_costs_a_search(mode: str) -> None:
    text = "Ich gehe nach Hause."
    options: Any = {"device": "cpu", "max_length": 2, "beam_stop": "transformers"}
    (one,) = Generator.from_checkpoint("demo", mode, temperature=1.0, top_k=1, **options).generate(text)
    (other,) = Generator.from_checkpoint("demo", "ar", beam=1, **options).generate(text)
    assert len(one.tokens) == 2
    assert one.tokens == other.tokens
    assert one.score == pytest.approx(other.score, abs=1e-4)
