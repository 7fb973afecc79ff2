"""Parts of launch/experiments/demo_de_en.py: cutting long lines, the results page, what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import demo_scores as scores
import driver
import pytest

from janus_ds.errors import MissingDependencyError


def test_long_lines_are_cut_at_punctuation_and_lose_nothing() -> None:
    line = "eins , zwei , drei vier fünf . sechs sieben acht neun zehn elf zwölf"
    parts = scores.cut(line, lambda text: len(text.split()) <= 7)
    assert " ".join(parts) == line
    assert parts[-1] == "sechs sieben acht neun zehn elf zwölf"
    assert all(len(part.split()) <= 7 for part in parts)
    assert scores.cut("kurz .", lambda text: True) == ["kurz ."]
    # No punctuation to cut at, and a word that no cut makes fit.
    assert scores.cut("a b c d", lambda text: len(text.split()) <= 1) == ["a", "b", "c", "d"]
    assert scores.cut("lang", lambda text: False) == ["lang"]


def test_the_page_is_made_of_the_asset(tmp_path: Path) -> None:
    metrics = {"sacrebleu": 31.25, "tokenized_bleu": 30.0, "repetition": 1.5}
    part = {"n": 2000, "systems": dict.fromkeys(scores.SYSTEMS, metrics), "signatures": {"sacrebleu": "x"}}
    away = {**part, "signatures": {"tokenized_bleu": "y"}}
    names = list(scores.TITLES)
    (tmp_path / "scores.json").write_text(json.dumps({names[0]: part, names[1]: part, names[2]: away}))
    training = {
        "pairs": {"train": 165639, "joined": 16564},
        "minutes": {"ar": 12.0, "janus": 50.0},
        "ar_steps": 5000,
        "averaged_steps": [6750, 7000],
    }
    (tmp_path / "run.json").write_text(json.dumps({"training": training}))
    scores.write_page(tmp_path, tmp_path / "docs" / "page.md")
    page = (tmp_path / "docs" / "page.md").read_text()
    assert "| 2,000 | 31.25 | 31.25 | 31.25 | 31.25 | 31.25 | 1.50 / 1.50 |" in page
    assert "(tokenised BLEU as fairseq's) | 2,000 | 30.00 |" in page
    assert "165,639 Tatoeba pairs" in page
    assert "5,000 updates AR (12 min), then 7,000 updates JANUS" in page


def test_missing_text_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JANUS_SHARED_DATA", raising=False)
    with pytest.raises(MissingDependencyError, match="does not say where Tatoeba is"):
        driver.shared_text("tatoeba_de-en", "Tatoeba", "two files")
    monkeypatch.setenv("JANUS_SHARED_DATA", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="Tatoeba is not here") as error:
        driver.shared_text("tatoeba_de-en", "Tatoeba", "two files")
    assert "tatoeba_de-en/ (two files)" in error.value.fix
