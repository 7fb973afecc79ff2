"""`janus-ds explain KEY` says what each preset gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_ds.__main__ import main
from janus_ds.cli.settings import explain
from janus_ds.config.schema import FIELDS
from janus_ds.errors import UsageError


def test_values_of_the_presets_are_shown() -> None:
    lines = explain("objective.weight_nar").splitlines()
    assert "  presets  paper: 1.0" in lines
    assert "           released/pair: 0.5" in lines
    assert "presets" not in explain("train.seed")
    assert "           paper/pair: 0.7" in explain("masking.target_share").splitlines()
    assert "           bart_base: 768" in explain("model.d_model").splitlines()


def test_names_that_are_near_are_given() -> None:
    with pytest.raises(UsageError, match=r"did you mean one of objective\.weight_ar, objective\.weight_nar"):
        explain("weight")
    with pytest.raises(UsageError, match=r"did you mean 'decode\.beam'"):
        explain("decode.beems")


def test_home_is_found_behind_an_equals_sign(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("Hallo.\n")
    words = ["--input=~/text.txt", "--output=~/out.txt", "--device", "cpu", "--mode", "ar"]
    assert main(["decode", "--demo", *words]) == 0
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 1


def test_nothing_is_written_as_recipes_write_it() -> None:
    assert all("None" not in explain(key) for key in [None, *FIELDS])
