"""The step benchmark: what it writes, and that both steps do the work they are named for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import main
from benchmarks.common import count_calls, interleave, ratio_summary
from benchmarks.shapes import SHAPES
from benchmarks.train import exponents
from janus_ds.errors import UsageError

SHORT = {"source_tokens": 16, "target_tokens": 16, "masked_tokens": 8}
"""The small shape's rows in a quarter of its length, for what needs no time."""


def test_result_has_the_ratio_and_where_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "result.json"
    assert main(["train", "--shape", "small", "--rounds", "2", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    ratio = result["ratios"]["janus_over_ar"]
    assert set(ratio) == {"median", "min", "max"}
    # 64 AR rows against 2 x 64 + 32 visible + 3 x 32 masked ones, for 8 samples.
    assert result["decoder_rows"] == {"ar": 512, "janus": 2048}
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert result["hardware"]["cores"] >= 1
    assert result["versions"]["torch"]
    printed = capsys.readouterr().out
    assert "JANUS / AR" in printed
    assert f"{ratio['median']:.2f}" in printed


def test_rounds_are_interleaved_and_ratios_taken_within_a_round() -> None:
    order: list[str] = []
    ticks = iter([0.0, 1.0, 1.0, 3.0, 3.0, 9.0, 9.0, 11.0])
    taken = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, clock=lambda: next(ticks)
    )
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert taken == {"a": [1.0, 2.0], "b": [2.0, 6.0]}
    assert ratio_summary(taken["b"], taken["a"]) == {"median": 2.5, "min": 2.0, "max": 3.0}


@pytest.mark.parametrize("kind", ["train", "attention", "decode", "save", "gpu"])
def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=r"(?s)no CUDA device.*--device cpu"):
        main([kind, "--device", "cuda"])


def test_the_share_of_a_known_peak_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("benchmarks.train.device_peak_flops", lambda device, dtype: 1e12)
    monkeypatch.setitem(SHAPES, "small", replace(SHAPES["small"], **SHORT))
    file = tmp_path / "result.json"
    options = ["--shape", "small", "--rounds", "1", "--precision", "bfloat16", "--json", str(file)]
    assert main(["train", *options]) == 0
    result = json.loads(file.read_text())
    assert result["precision"] == "bfloat16"
    assert result["launches"] == {}
    # Share x seconds is in FLOPs: those of JANUS are so many times those of AR, however long they took.
    flops = result["mfu"]["janus"] * result["milliseconds"]["janus"]["median"] * 1e9
    ar = result["mfu"]["ar"] * result["milliseconds"]["ar"]["median"] * 1e9
    assert 1.5 < flops / ar < 3.5
    assert "share of the peak" in capsys.readouterr().out


def test_launches_and_waits_are_counted_by_name() -> None:
    events = [
        SimpleNamespace(key=key, count=count)
        for key, count in {
            "cudaLaunchKernel": 7,
            "cuLaunchKernelEx": 2,
            "cudaStreamSynchronize": 4,
            "cudaMemcpyAsync": 50,
            "aten::mm": 60,
        }.items()
    ]
    assert count_calls(events) == {"launches": 9, "waits": 4}


def test_an_axis_gives_a_case_a_number_and_exponents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "axis.json"
    command = ["train", "--shape", "small", "--length", "8,40", "--rounds", "1", "--json", str(file)]
    assert main(command) == 0
    result = json.loads(file.read_text())
    assert [case["decoder_rows"]["janus"] for case in result["cases"]] == [8 * 4 * 8, 8 * 4 * 40]
    assert "exponent" in capsys.readouterr().out
    for factor, case in zip((1.0, 4.0), result["cases"], strict=True):
        case["milliseconds"] = {"ar": {"median": factor}, "janus": {"median": factor**2}}
        case["ratios"]["janus_over_ar"]["median"] = factor
    expected = {"ar": 1.0, "janus": 2.0, "janus_over_ar": 1.0}
    assert exponents(result["cases"], (8, 32)) == pytest.approx(expected)
    with pytest.raises(UsageError, match="two axes"):
        main(["train", "--vocabulary", "10,20", "--length", "8,9"])
    with pytest.raises(UsageError, match="no exponent"):
        main(["train", "--length", "8"])
