"""An over-long line among the held-out ones: cut and counted, in validations and evaluations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from janus_ds.cli.evaluate import evaluate_nmt
from janus_ds.config.load import load_run_config
from janus_ds.config.presets import resolve
from janus_ds.data.prepare.pair_files import PairText
from janus_ds.data.text.tokenizer import Tokenizer, load_tokenizer
from janus_ds.decode.load import load_run, usable_device
from janus_ds.decode.text import fit_sources, long_warning
from janus_ds.errors import ConfigError, DataError
from janus_ds.evaluate import tasks
from janus_ds.evaluate.evaluation import encode_sources
from janus_ds.evaluate.latency import device_name
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.train.validation import OutputDecoder
from tests.support.tiny_pairs import TINY_PAIR_RECIPE

LONG = "ein kind sucht nichts . " * 60


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_PAIR_RECIPE)
    return path


@pytest.fixture
def tokenizer(tiny_pairs: Path) -> Tokenizer:
    return load_tokenizer(tiny_pairs / "tokenizer")


def test_a_validation_survives_a_line_that_is_too_long(recipe: Path, tokenizer: Tokenizer) -> None:
    config = resolve(load_run_config(recipe, ["decode.max_length=4"]))
    text = PairText(["nichts .", LONG], ["nothing .", "a"], ("valid.de", "valid.en"))
    outputs = OutputDecoder(config, tokenizer, torch.device("cpu"), [(LONG, "a")], text)
    assert outputs.warning
    assert "1 of 2 inputs is longer than the 46 tokens" in outputs.warning
    weights = JanusModel(config.model, tokenizer.special, ParallelLayers()).state_dict()
    scores = outputs.score(weights)
    assert scores is not None
    assert set(scores) == {"ar", "nar"}
    assert "- **ar**" in outputs.samples(weights)


def test_scores_of_a_validation_do_not_depend_on_how_the_recipe_decodes_later(
    recipe: Path, tokenizer: Tokenizer
) -> None:
    """AR is greedy and NAR makes `train.valid_bleu_iterations` passes, whatever `decode` says."""
    torch.manual_seed(3)
    weights, made = None, []
    for decode in (
        (),
        ("decode.mode=ar", "decode.temperature=2"),
        ("decode.rescore=ar",),
        ("decode.threshold=0.01",),
    ):
        mode = "decode.mode=nar" if decode and decode[0] != "decode.mode=ar" else "decode.beam=1"
        config = resolve(load_run_config(recipe, [mode, *decode]))
        sources = ["nichts .", "ein kind sucht nichts ."]
        text = PairText(sources, ["nothing .", "a child"], ("valid.de", "valid.en"))
        outputs = OutputDecoder(config, tokenizer, torch.device("cpu"), [], text)
        weights = weights or JanusModel(config.model, tokenizer.special, ParallelLayers()).state_dict()
        outputs._load(weights)
        made.append([outputs.texts(mode) for mode in ("ar", "nar")])
    assert all(texts == made[0] for texts in made)


@pytest.mark.parametrize("decode", ["forbid=99999", "forced_bos=99999", "prefix=ein kind sucht nichts"])
def test_what_ar_cannot_decode_is_told_before_the_first_step(
    recipe: Path, tokenizer: Tokenizer, decode: str
) -> None:
    settings = ["decode.mode=ar", "decode.max_length=2", f"decode.{decode}"]
    config = load_run_config(recipe, settings)
    with pytest.raises(ConfigError, match=r"99999 is no token|the prefix has"):
        OutputDecoder(config, tokenizer, torch.device("cpu"), [], None)
    alone = load_run_config(
        recipe,
        [*settings, "objective.preset=cmlm", "train.valid_bleu=nar", "train.keep_best=nar"],
    )
    OutputDecoder(alone, tokenizer, torch.device("cpu"), [], None)


def test_samples_of_a_run_without_ar_are_not_scored_by_it(recipe: Path, tokenizer: Tokenizer) -> None:
    asked = ["objective.preset=cmlm", "train.valid_bleu=nar", "train.keep_best=nar", "decode.rescore=ar"]
    config = load_run_config(recipe, [*asked, "decode.max_length=4"])
    outputs = OutputDecoder(config, tokenizer, torch.device("cpu"), [("nichts .", "nothing .")], None)
    samples = outputs.samples(JanusModel(config.model, tokenizer.special, ParallelLayers()).state_dict())
    assert "- **nar**" in samples
    assert "- **ar**" not in samples


def test_an_evaluation_says_what_was_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load_run("demo")
    text = PairText(["Guten Morgen.", LONG, LONG], ["Good morning.", "a", "b"], ("test.de", "test.en"))
    monkeypatch.setattr(tasks, "check_vocabulary", lambda *_: None)
    monkeypatch.setattr(tasks, "held_out_text", lambda *_: text)
    command = [
        "--checkpoint",
        "demo",
        "--data",
        str(tmp_path),
        "--output",
        str(tmp_path),
        "--mode",
        "ar-greedy",
    ]
    outputs = {}
    for action in ("cut", "skip"):
        assert evaluate_nmt([*command, "--latency-samples", "0", "--on-long", action]) == 0
        found = json.loads((tmp_path / "ar-greedy.scores.json").read_text())
        assert (found["long_inputs"]["count"], found["long_inputs"]["action"]) == (2, action)
        assert (found["precision"], found["device"]) == ("fp32", device_name(usable_device(None)))
        assert "2 of 3 inputs are longer than" in found["warnings"][0]
        assert f"warning: {found['warnings'][0]}" in capsys.readouterr().out
        outputs[action] = (tmp_path / "ar-greedy.txt").read_text().split("\n")
    assert outputs["skip"] == [outputs["cut"][0], "", "", ""]
    assert outputs["cut"][1]
    with pytest.raises(DataError, match="the model reads up to") as caught:
        evaluate_nmt([*command, "--on-long", "stop"])
    assert caught.value.where == "line 2 of the input"
    # What the task reads is a limit like the model's.
    rows, long = encode_sources(run, replace(text, longest=2))
    assert [len(row) for row in rows] == [2, 2, 2]
    assert long["count"] == 3
    assert encode_sources(run, text.first(1))[1] == {}


def test_cutting_and_what_is_said_of_it() -> None:
    sources = [[1], [1, 2, 3], [1, 2, 3, 4], [2]]
    assert fit_sources(sources, 5) == ([[1], [1, 2, 3], [1, 2, 3], [2]], [3])
    assert fit_sources(sources, 5, "skip") == ([[1], [1, 2, 3], [], [2]], [3])
    assert fit_sources(sources, 5, "stop") == ([[1], [1, 2, 3]], [3])
    said = long_warning(range(1, 8), 9, 5, "skip")
    assert said == (
        "7 of 9 inputs are longer than the 3 tokens that are read (lines 1, 2, 3, 4, 5, ...) and were "
        "skipped: an empty output"
    )
