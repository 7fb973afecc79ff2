"""`janus-ds explain KEY` says what each preset gives."""

from __future__ import annotations

from janus_ds.cli.recipes import explain


def test_values_of_the_presets_are_shown() -> None:
    lines = explain("objective.weight_nar").splitlines()
    assert "  presets  paper: 1.0" in lines
    assert "           released/pair: 0.5" in lines
    assert "presets" not in explain("train.seed")
