"""`launch/prepare_glge.py`: the official layout in, pair shards out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from janus_ds.config.load import load_run_config
from janus_ds.data.prepare.pairs import prepare_glge
from janus_ds.data.prepare.settings import GlgeSettings, Limits
from janus_ds.data.stream.index import Manifest
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.source import SampleSource
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.errors import ConfigError, DataError
from tests.support.commands import say
from tests.support.hf_models import letters_tokenizer

TRAIN = [(f"ab sep cd{'e' * i}", f"q{'x' * i}") for i in range(30)]
DEV = [("some text </s> here", "the answer."), ("", "nothing"), ("b" * 90, "c" * 50)]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task folder without targets for the test set."""
    folder = tmp_path / "squadqg_data" / "org_data"
    folder.mkdir(parents=True)
    for split, pairs in (("train", TRAIN), ("dev", DEV), ("test", DEV[:1])):
        for side, name in enumerate(("src", "tgt")):
            (folder / f"{split}.{name}").write_text("".join(f"{pair[side]}\n" for pair in pairs))
    (folder / "test.tgt").unlink()
    letters_tokenizer(tmp_path / "tokenizer", 120)
    return folder.parent


def settings(task: Path, **more: Any) -> GlgeSettings:
    return GlgeSettings("squadqg", task.parent / "tokenizer", Limits(20, 12), **more)


def test_pairs_become_shards_that_a_run_reads(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    report = prepare_glge(task, out, settings(task, samples_per_member=8))
    assert {name: totals.samples for name, totals in report.manifest.splits.items()} == {
        "train": 30,
        "valid": 2,
    }
    counts = report.counts["valid"]
    assert (counts["lines"], counts["kept"], counts["with_an_empty_side"]) == (3, 2, 1)
    assert counts["source_special_symbols_removed"] == 1
    assert (counts["source_cut"], counts["target_cut"]) == (1, 1)
    tokenizer = load_tokenizer(out / "tokenizer")
    valid = SampleSource(out / "valid").read(np.arange(2))
    assert tokenizer.decode(valid["source"].row(0)) == "some text  here"
    assert list(valid["source"].row(1)) == tokenizer.encode("b" * 90)[:20]
    assert list(valid["target"].row(1)) == tokenizer.encode("c" * 50)[:12]
    train = SampleSource(out / "train").read(np.arange(30))
    pairs = [
        (tokenizer.decode(a), tokenizer.decode(b))
        for a, b in zip(
            (train["source"].row(i) for i in range(30)),
            (train["target"].row(i) for i in range(30)),
            strict=True,
        )
    ]
    whole = [
        pair
        for pair in TRAIN
        if len(tokenizer.encode(pair[0])) <= 20 and len(tokenizer.encode(pair[1])) <= 12
    ]
    assert set(whole) <= set(pairs)
    assert pairs[:5] != TRAIN[:5]
    assert (out / "raw" / "valid.src").read_text().splitlines() == [source for source, _ in DEV]
    assert (out / "raw" / "test.src").exists()
    assert not (out / "raw" / "test.tgt").exists()
    overrides = ["data.task=pair", "data.block_tokens=12", "objective.decoder_start=eos_bos"]
    run = load_run_config(None, [*overrides, "objective.preset=cmlm"])
    maker = BatchMaker(out / "train", run, tokenizer.special)
    made = maker.make((np.zeros(4, int), np.arange(4)))
    assert made["batches"][0].counts.samples == 4
    again = prepare_glge(task, out, settings(task, samples_per_member=8), processes=2)
    assert again.already_whole
    other = prepare_glge(task, tmp_path / "other", settings(task, samples_per_member=8), processes=2)
    assert other.manifest == report.manifest


def test_bad_input(task: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    with pytest.raises(ConfigError, match="--target-tokens must be at least 1, not 0"):
        prepare_glge(task, out, GlgeSettings("xsum", task.parent / "tokenizer", Limits(5, 0)))
    (task / "org_data" / "train.tgt").write_text("a\nb\n")
    with pytest.raises(DataError, match="different numbers of lines: 30 and 2"):
        prepare_glge(task, out, settings(task))
    (task / "org_data" / "train.tgt").write_text("\n" * 30)
    with pytest.raises(DataError, match="no pair of train has text"):
        prepare_glge(task, out, settings(task))
    assert not out.exists()
    assert list(tmp_path.glob(".*building")) == []
    (task / "org_data" / "dev.tgt").unlink()
    with pytest.raises(DataError, match=r"dev\.tgt not found"):
        prepare_glge(task, out, settings(task))


def test_the_command_reports(task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "squadqg", "--input", task, "--tokenizer", task.parent / "tokenizer"]
    words += ["--output", tmp_path / "data", "--processes", 1]
    assert "source cut" in say(capsys, "prepare", "glge", *words)
    assert Manifest.load(tmp_path / "data").task == "pair"
