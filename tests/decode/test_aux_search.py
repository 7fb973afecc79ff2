"""Mode aux is lossless: in float64 its output is AUX's, written one token a pass by the training rows."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.config.modes import with_decode
from janus_ds.config.schema import MaskingConfig, ObjectiveConfig, RunConfig
from janus_ds.decode.aux_search import AuxDecoder, aux_search
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run
from janus_ds.decode.mask_predict import plain_settings
from janus_ds.decode.sample import Draws, Sampling, token_shares
from janus_ds.model.janus import JanusModel
from tests.numerics.test_drafting import OBJECTIVES, SMALL, chi_square, small_model
from tests.support.tiny_model import TINY, TINY_NMT, tiny_generator, tiny_model
from tests.support.two_stream import TOY, Conventions, Sample, make_batch

PAPER, RELEASED = OBJECTIVES["query"], OBJECTIVES["previous"]
AUX_ROWS = frozenset({"vis", "cmp", "msk", "qry"})


def sources(count: int, seed: int) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(5, 29) for _ in range(drawn.randint(1, 12))] for _ in range(count)]


@torch.no_grad()
def aux_logits(
    model: JanusModel,
    sources: Sequence[Sequence[int]],
    written: Sequence[dict[int, int]],
    orders: Sequence[list[int]],
    mask: int,
) -> list[tuple[Tensor, Tensor]]:
    """AUX's logits by `JanusModel.forward`, where each place sees those before it in an order.

    Args:
        written: of each sentence, tokens by place; where none is, no row that counts sees it.
        orders: of each sentence, the inner places to be filled, from 1; all others are written.

    Returns:
        of each sentence, logits in that order, and the same without special symbols, (N, V) each.
    """
    special = model.special
    how = Conventions(mask=mask, pad=special.pad, eos=special.eos, rows=AUX_ROWS)
    blocked = torch.tensor([special.bos, special.pad, special.eos, special.unk, special.mask])
    samples = []
    for source, tokens, order in zip(sources, written, orders, strict=True):
        inner = [tokens.get(place, 5) for place in range(1, max([*order, *tokens]) + 1)]
        whole = [special.bos, *source, special.eos]
        samples.append(Sample(whole, [special.bos, *inner, special.eos], order))
    found = model.logits(model(make_batch(samples, how)).aux_BMD).double()
    rows = [logits_MV[: len(order)] for logits_MV, order in zip(found, orders, strict=True)]
    return [(logits_NV, logits_NV.index_fill(1, blocked, -torch.inf)) for logits_NV in rows]


def one_token_a_pass(
    model: JanusModel,
    sources: Sequence[Sequence[int]],
    inner: Sequence[int],
    mask: int,
    certain: bool = False,
) -> list[tuple[list[int], float]]:
    """AUX one after another, all sentences side by side: tokens and their mean log-probability."""
    orders = [list(range(1, count + 1)) for count in inner]
    if certain:
        orders = [by_certainty(model, *pair, mask) for pair in zip(sources, orders, strict=True)]
    written, total = [dict[int, int]() for _ in inner], [0.0 for _ in inner]
    for slot in range(max(inner)):
        for i, (logits_NV, allowed_NV) in enumerate(aux_logits(model, sources, written, orders, mask)):
            if slot < inner[i]:
                token = written[i][orders[i][slot]] = int(allowed_NV[slot].argmax())
                total[i] += float(logits_NV[slot].log_softmax(0)[token])
    outputs = [[tokens[place] for place in sorted(tokens)] for tokens in written]
    return [(tokens, sum_ / len(tokens)) for tokens, sum_ in zip(outputs, total, strict=True)]


def by_certainty(model: JanusModel, source: Sequence[int], places: list[int], mask: int) -> list[int]:
    """Places by NAR's highest log-probability; a row with no token before it is the NAR row of its place."""
    sure = {}
    for place in places:
        first = [place, *[other for other in places if other != place]]
        ((logits_NV, allowed_NV),) = aux_logits(model, [source], [{}], [first], mask)
        sure[place] = float(logits_NV[0].log_softmax(0)[allowed_NV[0].argmax()])
    return sorted(places, key=lambda place: -sure[place])


def check_lossless(
    generator: Generator, texts: list[list[int]], mask: int, certain: bool = False
) -> tuple[int, int]:
    """Compare all candidates; passes made, and passes that one token a pass would have made."""
    passes = tokens = 0
    found = generator.generate_ids(texts)
    asked = [source for source, candidates in zip(texts, found, strict=True) for _ in candidates]
    inner = [len(item.tokens) for candidates in found for item in candidates]
    expected = iter(one_token_a_pass(generator.model, asked, inner, mask, certain))
    for candidates in found:
        for item in candidates:
            written, score = next(expected)
            assert list(item.tokens) == written
            assert item.score == pytest.approx(score, abs=1e-9)
        assert [item.score for item in candidates] == sorted((i.score for i in candidates), reverse=True)
        longest = max(len(item.tokens) for item in candidates)
        assert 1 <= candidates[0].passes <= longest
        passes, tokens = passes + candidates[0].passes, tokens + longest
    return passes, tokens


@pytest.mark.parametrize(
    ("config", "objective", "mask"), [(TINY, PAPER, TOY.mask), (TINY_NMT, RELEASED, TOY.unk)]
)
def test_the_output_is_that_of_aux_token_by_token(config: Any, objective: ObjectiveConfig, mask: int) -> None:
    """300 sentences in all."""
    passes = tokens = 0
    for seed, lengths, batch in ((0, 1, 7), (1, 3, 5), (2, 3, 32)):
        model = tiny_model(config, seed)
        generator = tiny_generator(model, objective, batch, mode="aux", beam=1, length_beam=lengths)
        made, most = check_lossless(generator, sources(50, seed), mask)
        passes, tokens = passes + made, tokens + most
    assert passes < tokens


def test_the_packaged_model_in_float64() -> None:
    run = load_run("demo", {"mode": "aux", "length_beam": 2})
    assert run.text is not None
    generator = Generator(run.model.double(), run.text, run.config)
    texts = [run.text.encode(text) for text in ("Ich habe heute keine Zeit.", "Er wohnt in Berlin.", "Ja!")]
    passes, tokens = check_lossless(generator, texts, run.special.mask)
    assert passes < tokens
    assert generator.generate(["Er wohnt in Berlin."])[0].mode == "aux"


def test_most_certain_first_is_lossless_too() -> None:
    masking = MaskingConfig(aux_order="random")
    left_to_right = []
    for seed, lengths in ((0, 1), (1, 2)):
        options = {"mode": "aux", "beam": 1, "length_beam": lengths}
        model, texts = tiny_model(TINY, seed), sources(12, seed)
        base = tiny_generator(model, PAPER, 5, **options, aux_order="left_to_right").config
        config = replace(base, masking=masking, decode=replace(base.decode, aux_order="certain"))
        generator = Generator(model, None, config, batch_sentences=5)
        passes, tokens = check_lossless(generator, texts, TOY.mask, certain=True)
        assert passes < tokens
        plain = Generator(model, None, base).generate_ids(texts)
        left_to_right += [a[0] == b[0] for a, b in zip(plain, generator.generate_ids(texts), strict=True)]
    assert not all(left_to_right)


@pytest.mark.parametrize(
    ("certain", "temperature", "top_k"), [(False, 1.0, 0), (True, 2.0, 0), (False, 1.0, 2)]
)
def test_samples_have_auxs_distribution(
    certain: bool, temperature: float, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """27 outputs: with 26 degrees of freedom 54.1 is passed once in a thousand times."""
    # NAR and AUX of this one are far apart: where they are not, nearly every draft stands.
    model, draws, order = small_model(2, 0.5), 4000, [1, 2, 3]
    source = [5, 7, 6]
    if certain:
        order = by_certainty(model, source, order, SMALL.mask)
        assert order != [1, 2, 3]

    def shares(temperature: float) -> dict[tuple[int, ...], float]:
        sampling, found = Sampling(temperature, top_k), {}
        for output in itertools.product((5, 6, 7), repeat=3):
            written = dict(enumerate(output, 1))
            ((_, allowed_NV),) = aux_logits(model, [source], [written], [order], SMALL.mask)
            share_NV = token_shares(allowed_NV, (), sampling)
            found[output] = math.prod(float(share_NV[i, written[p]]) for i, p in enumerate(order))
        assert sum(found.values()) == pytest.approx(1.0)
        return {output: share for output, share in found.items() if share}

    def drawn() -> tuple[Counter[tuple[int, ...]], int]:
        with torch.inference_mode():
            source_BS = torch.tensor([[SMALL.bos, *source, SMALL.eos]]).expand(draws, -1)
            memory = model.encode(source_BS, torch.full((draws,), 5))
            settings = plain_settings(RunConfig(objective=PAPER), SMALL)
            numbers = Draws(Sampling(temperature, top_k, 1.0, 7), range(draws))
            decoder, length_BC = AuxDecoder(model, memory, SMALL.mask), torch.full((draws, 1), 5)
            found = aux_search(decoder, length_BC, settings, None, certain, numbers)
        return Counter(group[0].tokens for group in found), sum(group[0].passes for group in found)

    (counts, passes), expected = drawn(), shares(temperature)
    assert set(counts) <= set(expected)
    assert chi_square(counts, expected, draws) < 54.1
    # The test can tell, and drafts save passes.
    assert chi_square(counts, shares(1.5 * temperature), draws) > 100
    assert passes < 2.9 * draws
    for name, wrong in (
        ("left_over", lambda share_XV, drawn_XV: share_XV),
        ("stands", lambda share_XV, drawn_XV, token_X, uniform_X: uniform_X < 1),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(f"janus_ds.decode.aux_search.{name}", wrong)
            assert chi_square(drawn()[0], expected, draws) > 100


def test_one_token_and_no_text() -> None:
    generator = tiny_generator(tiny_model(TINY), PAPER, mode="aux", beam=1, max_length=1, length_beam=1)
    found = generator.generate_ids([[], [7, 8, 9]])
    assert found[0][0].tokens == ()
    assert len(found[1][0].tokens) == found[1][0].passes == 1


def test_every_hypothesis_says_what_it_cost() -> None:
    """Passes are those of the sentence alone, in a batch as well."""
    run = load_run("demo", {"beam": 1, "length_beam": 1, "iterations": 2})
    assert run.text is not None
    texts = ["Er wohnt in Berlin.", "Ja!", "Ich habe heute keine Zeit.", ""]
    for mode in ("ar", "nar", "draft", "aux"):
        found = []
        for batch in (1, 4):
            config = with_decode(run.config, {"mode": mode})
            generator = Generator(run.model, run.text, config, batch_sentences=batch)
            found.append(generator.generate(texts))
        for one, other in zip(*found, strict=True):
            assert one.mode == other.mode == mode
            assert one.passes == other.passes
            assert (one.seconds > 0) == (one.passes > 0) == bool(one.tokens)
        if mode == "ar":
            # One pass a token, eos included.
            assert [item.passes for item in found[0]][:3] == [len(i.tokens) + 1 for i in found[0]][:3]
