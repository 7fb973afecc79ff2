"""The check of a GPU, in its smallest form on a CPU: what it judges, what it writes, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.__main__ import main


def test_what_is_wrong_is_told_and_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_WAYS", {name: gpu._WAYS[name] for name in ("ar, greedy", "aux")})
    monkeypatch.setattr(gpu, "_TEXTS", gpu._TEXTS[1:4])
    monkeypatch.setitem(gpu._BOUNDS, "bfloat16", 1e-12)

    def fail(device: str) -> gpu.Outcome:
        raise ValueError(f"no training on {device}")

    monkeypatch.setattr(gpu, "check_resume", fail)
    file = tmp_path / "check.json"
    assert main(["gpu", "--device", "cpu", "--no-tables", "--json", str(file)]) == 1
    result, page = json.loads(file.read_text()), file.with_suffix(".md").read_text()
    attention, tokens, training = result["parts"].values()
    errors = attention["relative_errors"]
    assert {name: len(found) for name, found in errors.items() if "float32" in name} == {
        "dense float32": 4,
        "grouped float32": 4,
    }
    assert all(max(found) < 1e-5 for name, found in errors.items() if "float32" in name)
    assert all(1e-4 < max(found) < 2e-2 for name, found in errors.items() if "bfloat16" in name)
    assert tokens["right"]
    assert set(tokens["wrong"]) == {"ar, greedy", "aux"}
    assert not attention["right"]
    assert "no training on cpu" in training["error"]
    assert result["wrong"] == [name for name, part in result["parts"].items() if not part["right"]]
    assert "3 of 3" in page
    assert page.count("WRONG") == 2
    assert "wrong: attention against dense" in capsys.readouterr().out


def test_what_is_left_out_is_not_called_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "check_attention", lambda device: (None, {}, "torch not installed"))
    monkeypatch.setattr(gpu, "check_tokens", lambda device: (True, {}, ""))
    monkeypatch.setattr(gpu, "check_resume", lambda device: (True, {}, ""))
    file = tmp_path / "new" / "check.json"
    assert main(["gpu", "--device", "cpu", "--no-tables", "--json", str(file)]) == 0
    page = file.with_suffix(".md").read_text()
    assert "## attention against dense in float64: left out" in page
    assert "wrong: nothing; left out: attention against dense in float64;" in page
    assert json.loads(file.read_text())["wrong"] == []


@pytest.mark.heavy
def test_everything_is_right_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "check.json"
    assert main(["gpu", "--device", "cpu", "--rounds", "1", "--json", str(file)]) == 0
    parts = json.loads(file.read_text())["parts"]
    assert {"training, small", "attention, small", "decoding, tiny"} <= set(parts)
    assert parts["ZeRO-2, bf16: stopped and resumed, bit for bit"]["steps_before_the_stop"] == 21
