"""Mode aux is lossless: in float64 its output is AUX's, written one token a pass by the training rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from janus_ds.config.schema import ObjectiveConfig, RunConfig
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run, with_decode
from janus_ds.errors import ConfigError
from janus_ds.model.janus import JanusModel
from tests.support.tiny_model import TINY, TINY_NMT, tiny_generator, tiny_model
from tests.support.two_stream import TOY, Conventions, Sample, make_batch

PAPER = ObjectiveConfig(decoder_start="bos")
RELEASED = ObjectiveConfig(
    decoder_start="bos",
    ar_query_position="previous",
    length_convention="with_specials",
    mask_symbol="unk",
)
AUX_ROWS = frozenset({"vis", "cmp", "msk", "qry"})


def sources(count: int, seed: int, vocabulary: int = 29, longest: int = 12) -> list[list[int]]:
    drawn = random.Random(seed)
    return [[drawn.randrange(5, vocabulary) for _ in range(drawn.randint(1, longest))] for _ in range(count)]


@torch.no_grad()
def one_token_a_pass(
    model: JanusModel, source: Sequence[int], inner: int, mask: int
) -> tuple[list[int], float]:
    """AUX left to right by `JanusModel.forward`: tokens and their mean log-probability."""
    special, written, total = model.special, [], 0.0
    blocked = [special.bos, special.pad, special.eos, special.unk, special.mask]
    how = Conventions(mask=mask, pad=special.pad, eos=special.eos, rows=AUX_ROWS)
    for slot in range(inner):
        target = [special.bos, *written, *[5] * (inner - slot), special.eos]
        sample = Sample([special.bos, *source, special.eos], target, list(range(1, inner + 1)))
        rows = model(make_batch([sample], how)).aux_BMD
        logits_V = model.logits(rows)[0, slot].double()
        allowed_V = logits_V.index_fill(0, torch.tensor(blocked), float("-inf"))
        written.append(int(allowed_V.argmax()))
        total += float(logits_V.log_softmax(0)[written[-1]])
    return written, total / inner


def check_lossless(generator: Generator, texts: list[list[int]], mask: int) -> tuple[int, int]:
    """Compare all candidates; passes made, and passes that one token a pass would have made."""
    passes = tokens = 0
    found = generator.generate_ids(texts)
    for source, candidates in zip(texts, found, strict=True):
        for item in candidates:
            written, score = one_token_a_pass(generator.model, source, len(item.tokens), mask)
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
    passes = tokens = 0
    for seed, lengths, batch in ((0, 1, 7), (1, 3, 5), (2, 3, 32)):
        model = tiny_model(config, seed)
        generator = tiny_generator(model, objective, batch, mode="aux", beam=1, length_beam=lengths)
        made, most = check_lossless(generator, sources(20, seed), mask)
        passes, tokens = passes + made, tokens + most
    assert passes < tokens


def test_the_packaged_model_in_float64() -> None:
    run = load_run("demo", {"mode": "aux", "length_beam": 2})
    assert run.text is not None
    generator = Generator(run.model.double(), run.text, run.special, run.config)
    texts = [run.text.encode(text) for text in ("Ich habe heute keine Zeit.", "Er wohnt in Berlin.", "Ja!")]
    passes, tokens = check_lossless(generator, texts, run.special.mask)
    assert passes < tokens
    assert generator.generate(["Er wohnt in Berlin."])[0].mode == "aux"


def test_one_token_and_no_text() -> None:
    generator = tiny_generator(tiny_model(TINY), PAPER, mode="aux", beam=1, max_length=1, length_beam=1)
    found = generator.generate_ids([[], [7, 8, 9]])
    assert found[0][0].tokens == ()
    assert len(found[1][0].tokens) == found[1][0].passes == 1


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        (
            replace(PAPER, weight_aux=0.0),
            r"not trained to decode in mode 'aux' \(objective\.weight_aux is 0",
        ),
        (replace(PAPER, weight_length=0.0), r"objective\.weight_length is 0"),
    ],
)
def test_a_checkpoint_without_aux_is_refused(objective: ObjectiveConfig, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        tiny_generator(tiny_model(TINY), objective, mode="aux", beam=1)
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize(
    ("decode", "told"),
    [
        ({"beam": 4}, r"decode\.beam is 4, but mode aux has no beam"),
        ({"temperature": 0.5}, r"decode\.temperature is 0\.5, but mode aux draws no samples"),
    ],
)
def test_options_that_aux_does_not_know(decode: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        with_decode(RunConfig(), {"mode": "aux", **decode})
    assert caught.value.where
    assert caught.value.fix
    # A beam that the recipe names is AR's.
    assert with_decode(RunConfig(), {"mode": "aux"}).decode.beam == 1


def test_every_hypothesis_says_what_it_cost() -> None:
    """Passes are those of the sentence alone, in a batch as well."""
    run = load_run("demo", {"beam": 1, "length_beam": 1, "iterations": 2})
    assert run.text is not None
    texts = ["Er wohnt in Berlin.", "Ja!", "Ich habe heute keine Zeit.", ""]
    for mode in ("ar", "nar", "draft", "aux"):
        found = []
        for batch in (1, 4):
            config = with_decode(run.config, {"mode": mode})
            generator = Generator(run.model, run.text, run.special, config, batch_sentences=batch)
            found.append(generator.generate(texts))
        for one, other in zip(*found, strict=True):
            assert one.mode == other.mode == mode
            assert one.passes == other.passes
            assert (one.seconds > 0) == (one.passes > 0) == bool(one.tokens)
        if mode == "ar":
            # One pass a token, eos included.
            assert [item.passes for item in found[0]][:3] == [len(i.tokens) + 1 for i in found[0]][:3]
