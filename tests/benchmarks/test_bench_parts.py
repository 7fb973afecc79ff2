"""The benches of head, attention and saves: what they write, and the counted figures among it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import save
from benchmarks.__main__ import main
from benchmarks.shapes import SHAPES, BenchShape
from janus_ds.errors import ResourceError


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "iwslt", BenchShape("quickstart", "pair", 4, 12, 256, 128, 20000, 1))


def test_the_head_writes_ratios_and_needs_a_tenth_of_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "head.json"
    assert main(["head", "--rounds", "1", "--no-compile", "--json", str(file)]) == 0
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
    assert main(["attention", "--rounds", "1", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["milliseconds"]) == {"dense", "grouped"}
    assert set(result["ratios"]) == {"dense_over_grouped"}
    assert result["auto"] == "grouped"
    options = ["--rounds", "1", "--attention-dropout", ".1", "--json", str(file)]
    assert main(["attention", *options]) == 0
    assert set(json.loads(file.read_text())["milliseconds"]) == {"dense", "grouped"}
    with pytest.raises(SystemExit):
        main(["attention", "--attention-dropout", "2"])


def test_figures_of_saves_follow_from_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "disk", tmp_path / "save.json"
    folder.mkdir()
    arguments = ["--shape", "quickstart", "--rounds", "1", "--every", "7", "--folder", str(folder)]
    assert main(["save", *arguments, "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures["bytes"] == 12 * figures["parameters"]
    assert figures["waiting_seconds"]["median"] > 0
    assert figures["writing_seconds"]["median"] > 0
    step = figures["waiting_seconds"]["median"] / 0.02 / 7 * 1000
    printed = capsys.readouterr().out
    assert f"2% of the time at train.save_every=7 is held by steps of {step:.0f} ms" in printed
    assert not list(folder.iterdir())
    with pytest.raises(SystemExit):
        main(["save", "--rounds", "0"])
    with pytest.raises(ResourceError, match="cannot be written"):
        main(["save", "--folder", str(file / "x")])


def test_a_gpu_is_copied_as_training_copies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    empty = torch.empty

    class Stream:
        def synchronize(self) -> None:
            calls.append("wait")

    def noted(*shape: object, pin_memory: bool) -> torch.Tensor:
        calls.append(pin_memory)
        return empty(*shape)  # type: ignore[arg-type]

    state = save._State("quickstart", "cpu")
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch, "empty", noted)
    for pinned in (False, True):
        calls.clear()
        monkeypatch.setattr(state, "_pinned", pinned, raising=False)
        found = state.snapshot()
        assert all(torch.equal(copy, state._weights[name]) for name, copy in found.weights.items())
        assert set(calls) == ({True, "wait"} if pinned else {False})
        assert calls.count("wait") == pinned
