"""An over-long line among the held-out ones: cut and counted, in validations and evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from janus_ds.config.load import load_run_config
from janus_ds.config.presets import resolve
from janus_ds.data.prepare.pair_files import PairText
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.decode.load import load_run
from janus_ds.decode.text import cut_sources, cut_warning
from janus_ds.evaluate.evaluation import encode_sources
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.layers import ParallelLayers
from janus_ds.train.loop.outputs import OutputScores, SampleDecoder, TextPair, WeightsHolder
from tests.support.tiny_pairs import TINY_PAIR_RECIPE, prepare_tiny

LONG = "ein kind sucht nichts . " * 60


def test_a_validation_survives_a_line_that_is_too_long(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(prepare_tiny(tmp_path).output / "tokenizer")
    (tmp_path / "tiny.yaml").write_text(TINY_PAIR_RECIPE)
    config = resolve(load_run_config(tmp_path / "tiny.yaml", ["decode.max_length=4"]))
    holder = WeightsHolder(config, tokenizer, torch.device("cpu"))
    scorer = OutputScores(holder, PairText(["nichts .", LONG], ["nothing .", "a"], ("valid.de", "valid.en")))
    assert scorer.warning
    assert "1 of 2 inputs is longer than the 48 positions" in scorer.warning
    weights = JanusModel(holder.config.model, tokenizer.special, ParallelLayers()).state_dict()
    scores = scorer(weights)
    assert scores is not None
    assert set(scores) == {"ar", "nar"}
    assert "- **ar**" in SampleDecoder(holder, [TextPair(LONG, "a")])(weights)


def test_an_evaluation_cuts_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run("demo")
    rows = encode_sources(run, PairText(["Guten Morgen.", LONG, LONG], None, ("test.de", "")))
    table = run.config.model.max_source_positions
    assert [len(row) == table - 2 for row in rows] == [False, True, True]
    assert capsys.readouterr().err.startswith("warning: 2 of 3 inputs are longer than")


def test_cutting_and_what_is_said_of_it() -> None:
    assert cut_sources([[1], [1, 2, 3], [1, 2, 3, 4]], 5) == ([[1], [1, 2, 3], [1, 2, 3]], [3])
    said = cut_warning(range(1, 8), 9, 5, "skipped")
    assert said.endswith(
        "7 of 9 inputs are longer than the 5 positions of the encoder and were skipped "
        "(lines 1, 2, 3, 4, 5, ...)"
    )
