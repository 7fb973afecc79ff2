"""What the released code decoded with its own weights, through `convert --from fairseq`, in float64.

Its AR scores are those of a search without a cache, so that ours, which has one, is held to it.
"""

from __future__ import annotations

from typing import Any

import pytest

from janus_ds.cli import convert
from janus_ds.config.modes import with_decode
from janus_ds.decode.generator import Generator
from tests.support.released import FIXTURE, released_file

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    """The fixture as a user meets it: a fairseq file, the converter, a run folder."""
    folder = tmp_path_factory.mktemp("convert")
    convert.main(["--from", "fairseq", str(released_file(folder)), "--to", str(folder / "run")])
    loaded = Generator.from_checkpoint(folder / "run", ids=True, device="cpu")
    loaded.model.double()
    return loaded


def with_options(generator: Generator, **options: Any) -> Generator:
    config = with_decode(generator.config, options)
    return Generator(generator.model, generator.text, config)


def sources() -> list[list[int]]:
    """The two sentences without bos, eos and their left padding."""
    return [[t for t in row if t > 2] for row in FIXTURE["src_tokens"].tolist()]


def test_conventions_of_the_released_code(generator: Generator) -> None:
    objective, decode = generator.config.objective, generator.config.decode
    assert (objective.ar_query_position, objective.decoder_start) == ("previous", "bos")
    assert (objective.mask_symbol, objective.length_convention) == ("unk", "with_specials")
    assert (decode.nar_score, decode.length_beam, decode.iterations) == ("released", 3, 10)


@pytest.mark.parametrize("length_beam", [1, 3])
@pytest.mark.parametrize("iterations", [0, 1, 4, 10])
def test_nar_decodes(generator: Generator, iterations: int, length_beam: int) -> None:
    nar = with_options(generator, mode="nar", iterations=iterations, length_beam=length_beam)
    found = nar.generate_ids(sources())
    expected = FIXTURE["expect"]["nar_decode"][f"{iterations},{length_beam}"]
    for candidates, item in zip(found, expected, strict=True):
        assert len(candidates) == length_beam
        assert [0, *candidates[0].tokens, 2] == item["tokens"]
        assert candidates[0].score == pytest.approx(item["score"], abs=TOLERANCE)


def test_ar_beam_5(generator: Generator) -> None:
    ar = with_options(generator, mode="ar", beam=5, beam_stop="fairseq")
    found = ar.generate_ids(sources())
    for hypotheses, expected in zip(found, FIXTURE["expect"]["ar_beam5_exact_no_cache"], strict=True):
        assert [[*item.tokens, 2] for item in hypotheses] == [item["tokens"] for item in expected]
        for hypothesis, item in zip(hypotheses, expected, strict=True):
            assert hypothesis.score == pytest.approx(item["score"], abs=TOLERANCE)


def test_the_released_codes_own_cache_is_not_what_we_do(generator: Generator) -> None:
    """Its column differs by more than the tolerance, so the test above can tell the two apart."""
    expect = FIXTURE["expect"]
    pairs = zip(expect["ar_beam5_exact_no_cache"], expect["ar_beam5_reference_cache"], strict=True)
    gaps = [abs(a["score"] - b["score"]) for rows in pairs for a, b in zip(*rows, strict=True)]
    assert max(gaps) > 100 * TOLERANCE
