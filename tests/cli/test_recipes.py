"""`janus-ds explain KEY` says what each preset gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_ds.__main__ import main
from janus_ds.cli.recipes import explain


def test_values_of_the_presets_are_shown() -> None:
    lines = explain("objective.weight_nar").splitlines()
    assert "  presets  paper: 1.0" in lines
    assert "           released/pair: 0.5" in lines
    assert "presets" not in explain("train.seed")


def test_home_is_found_behind_an_equals_sign(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("Hallo.\n")
    words = ["--input=~/text.txt", "--output=~/out.txt", "--device", "cpu", "--mode", "ar"]
    assert main(["decode", "--demo", *words]) == 0
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 1
