"""What the released code decoded with its own weights, through `convert --from fairseq`, in float64.

The invariant behind AR decoding as well: a cached search equals one that decodes every prefix anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.cli import convert
from janus_ds.config.schema import DataConfig, DecodeConfig, ObjectiveConfig, RunConfig
from janus_ds.decode.beam_search import beam_search
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import with_decode
from janus_ds.model.janus import JanusModel
from tests.support.tiny_model import TINY, tiny_model
from tests.support.two_stream import TOY, Conventions, Sample, make_batch

FIXTURE = Path(__file__).parents[1] / "fixtures" / "janus_tiny_fixture.pt"
TOLERANCE = 2e-5
TWO_STREAMS = frozenset({"arc", "arq"})


@pytest.fixture(scope="module")
def fixture() -> dict[str, Any]:
    return torch.load(FIXTURE, weights_only=True)


@pytest.fixture(scope="module")
def generator(fixture: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """The fixture as a user meets it: a fairseq file, the converter, a run folder."""
    folder = tmp_path_factory.mktemp("convert")
    config = fixture["config"]
    args = argparse.Namespace(
        encoder_attention_heads=config["heads"],
        decoder_attention_heads=config["heads"],
        activation_fn=config["activation"],
    )
    torch.save({"model": fixture["state_dict"], "args": args}, folder / "model.pt")
    convert.main(["--from", "fairseq", str(folder / "model.pt"), "--to", str(folder / "run")])
    loaded = Generator.from_checkpoint(folder / "run", ids=True, device="cpu")
    loaded.model.double()
    return loaded


def with_options(generator: Generator, **options: Any) -> Generator:
    config = with_decode(generator.config, options)
    return Generator(generator.model, generator.text, generator.special, config)


def sources(fixture: dict[str, Any]) -> list[list[int]]:
    """The two sentences without bos, eos and their left padding."""
    return [[t for t in row if t > 2] for row in fixture["src_tokens"].tolist()]


def test_conventions_of_the_released_code(generator: Generator) -> None:
    objective, decode = generator.config.objective, generator.config.decode
    assert (objective.ar_query_position, objective.decoder_start) == ("previous", "bos")
    assert (objective.mask_symbol, objective.length_convention) == ("unk", "with_specials")
    assert (decode.nar_score, decode.length_beam, decode.iterations) == ("released", 3, 10)


@pytest.mark.parametrize("length_beam", [1, 3])
@pytest.mark.parametrize("iterations", [0, 1, 4, 10])
def test_nar_decodes(
    generator: Generator, fixture: dict[str, Any], iterations: int, length_beam: int
) -> None:
    nar = with_options(generator, mode="nar", iterations=iterations, length_beam=length_beam)
    found = nar.generate_ids(sources(fixture))
    expected = fixture["expect"]["nar_decode"][f"{iterations},{length_beam}"]
    for candidates, item in zip(found, expected, strict=True):
        assert len(candidates) == length_beam
        assert [0, *candidates[0].tokens, 2] == item["tokens"]
        assert candidates[0].score == pytest.approx(item["score"], abs=TOLERANCE)


def test_ar_beam_5(generator: Generator, fixture: dict[str, Any]) -> None:
    ar = with_options(generator, mode="ar", beam=5, beam_stop="fairseq")
    found = ar.generate_ids(sources(fixture))
    for hypotheses, expected in zip(found, fixture["expect"]["ar_beam5_exact_no_cache"], strict=True):
        assert [[*item.tokens, 2] for item in hypotheses] == [item["tokens"] for item in expected]
        for hypothesis, item in zip(hypotheses, expected, strict=True):
            assert hypothesis.score == pytest.approx(item["score"], abs=TOLERANCE)


def test_the_released_codes_own_cache_is_not_what_we_do(
    generator: Generator, fixture: dict[str, Any]
) -> None:
    """Its column differs by more than the tolerance, so the test above can tell the two apart."""
    expect = fixture["expect"]
    pairs = zip(expect["ar_beam5_exact_no_cache"], expect["ar_beam5_reference_cache"], strict=True)
    gaps = [abs(a["score"] - b["score"]) for rows in pairs for a, b in zip(*rows, strict=True)]
    assert max(gaps) > 100 * TOLERANCE


def test_text_in_and_out_keeps_the_order(generator: Generator, fixture: dict[str, Any]) -> None:
    lines = [" ".join(map(str, row)) for row in sources(fixture)]
    seen: list[tuple[int, int]] = []
    found = with_options(generator, mode="nar").generate(
        [*lines, lines[0]], lambda done, of: seen.append((done, of))
    )
    assert [item.text for item in found] == ["5 6 7 8 9 10", "14 15 16", "5 6 7 8 9 10"]
    assert seen == [(3, 3)]
    assert {item.mode for item in found} == {"nar"}


CONVENTIONS = {
    "paper": (ObjectiveConfig(), Conventions(rows=TWO_STREAMS)),
    "paper, BART layout": (
        ObjectiveConfig(decoder_start="eos_bos"),
        Conventions(start="eos_bos", rows=TWO_STREAMS),
    ),
    "released": (
        ObjectiveConfig(preset="released"),
        Conventions(query_position="previous", mask=TOY.unk, rows=TWO_STREAMS),
    ),
    "plain BART": (
        ObjectiveConfig(preset="ar", decoder_start="eos_bos"),
        Conventions(start="eos_bos", rows=frozenset({"arc"})),
    ),
}
SOURCES = [[9, 8, 7, 6, 5], [15, 14], [5, 6, 7, 8, 9, 10, 11]]


class Uncached:
    """The step function of a search without a cache: every prefix goes through the training pass."""

    def __init__(self, model: JanusModel, how: Conventions) -> None:
        self.model, self.how = model, how
        self.sources = [[TOY.bos, *source, TOY.eos] for source in SOURCES]
        self.prefix: list[list[list[int]]] = []

    def __call__(self, token_BK: Tensor, parent_BK: Tensor | None, step: int) -> Tensor:
        first = [TOY.bos] if self.how.start == "bos" else []
        if parent_BK is None:
            self.prefix = [[first for _ in row] for row in token_BK]
        else:
            pairs = zip(token_BK.tolist(), parent_BK.tolist(), strict=True)
            self.prefix = [
                [[*self.prefix[b][k], t] for t, k in zip(*row, strict=True)] for b, row in enumerate(pairs)
            ]
        samples = [
            Sample(source, [*prefix, TOY.eos], [])
            for source, row in zip(self.sources, self.prefix, strict=True)
            for prefix in row
        ]
        with torch.no_grad():
            rows = self.model(make_batch(samples, self.how)).ar_BAD
        assert rows is not None
        return self.model.logits(rows[:, -1]).view(*token_BK.shape, -1)

    def keep(self, sentence_B: Tensor) -> None:
        self.sources = [self.sources[b] for b in sentence_B.tolist()]
        self.prefix = [self.prefix[b] for b in sentence_B.tolist()]


@pytest.mark.parametrize("beam_stop", ["fairseq", "transformers"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_cached_search_equals_the_search_without_a_cache(name: str, beam_stop: str) -> None:
    objective, how = CONVENTIONS[name]
    decode = DecodeConfig(mode="ar", beam=3, max_length=6, beam_stop=beam_stop)
    model = tiny_model(seed=5)
    with torch.no_grad():
        model.embedding.weight[TOY.eos] *= 0.8  # hypotheses of many lengths end before the limit
    run = RunConfig(model=TINY, data=DataConfig(task="pair"), objective=objective, decode=decode)
    generator = Generator(model, None, TOY, run)
    found = generator.generate_ids(SOURCES)
    expected = beam_search(Uncached(model, how), len(SOURCES), generator._search_settings())
    lengths = {len(item.tokens) for row in expected for item in row}
    assert len(lengths) > 2
    for ours, theirs in zip(found, expected, strict=True):
        assert [item.tokens for item in ours] == [item.tokens for item in theirs]
        gaps = [abs(a.score - b.score) for a, b in zip(ours, theirs, strict=True)]
        assert max(gaps) < 1e-10
