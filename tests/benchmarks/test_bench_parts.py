"""The benches of head and attention: what they write, and the counted figures among it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import attention, head
from benchmarks.shapes import SHAPES, BenchShape


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "iwslt", BenchShape("quickstart", "pair", 4, 12, 256, 128, 20000, 1))


def test_the_head_writes_ratios_and_needs_a_tenth_of_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "head.json"
    assert head.main(["--rounds", "1", "--no-compile", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["milliseconds"]) == {"ar_naive", "ar_fused", "naive", "fused"}
    assert {"naive_over_fused", "head_memory_over_naive"} <= set(result["ratios"])
    peaks = result["peak_megabytes"]
    # Whole logits of N + 2 M rows exist in the naive form, whatever else.
    assert peaks["naive"] > (1024 + 2 * 512) * 20000 * 4 / 1e6
    # The gradient of the table counts on both sides.
    assert result["ratios"]["head_memory_over_naive"]["median"] <= 0.1
    assert peaks["fused"] <= 0.1 * peaks["naive"]


def test_attention_writes_all_back_ends_and_refuses_none_silently(tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    assert attention.main(["--rounds", "1", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["milliseconds"]) == {"dense", "grouped"}
    assert set(result["ratios"]) == {"dense_over_grouped"}
    assert result["auto"] == "grouped"
    options = ["--rounds", "1", "--attention-dropout", ".1", "--json", str(file)]
    assert attention.main(options) == 0
    assert set(json.loads(file.read_text())["milliseconds"]) == {"dense", "grouped"}
