"""The decoding benchmark: what it writes, and that all jobs do the work they are named for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.decode import _compare
from janus_ds.errors import CheckpointError, UsageError


def test_result_has_peers_ratios_and_equal_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("ctranslate2")
    file = tmp_path / "result.json"
    only = "transformers,ctranslate2,ar fp32,janus fp32,int8,bf16,nar 10"
    options = ["--shape", "tiny", "--rounds", "1", "--batch", "2", "--only", only, "--json", str(file)]
    assert main(["decode", *options, "--peers", "hf,ct2,none"]) == 0
    result = json.loads(file.read_text())
    (case,) = result["cases"]
    assert case["sentences"] == 4
    assert case["outputs_equal_to_ar"]["transformers"] == "4 of 4"
    assert case["outputs_equal_to_ar"]["ctranslate2 fp32"] == "4 of 4"
    assert set(result["ratios"]["transformers_over_ar_b2_t6"]) == {"median", "min", "max"}
    for name in ("janus_over_ar", "ctranslate2_int8_over_ar_int8"):
        assert f"{name}_b2_t6" in result["ratios"]
    assert "ms/sentence" in capsys.readouterr().out


def test_other_work_and_other_tokens_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"outputs of \[2\] tokens, not 3"):
        _compare({"ar fp32": [(5, 6)]}, 3)
    with pytest.raises(CheckpointError, match="for 1 of 2 sentences"):
        _compare({"ar fp32": [(5, 6), (7, 8)], "transformers": [(5, 6), (7, 9)]}, 2)


def test_a_job_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="no job's name contains beam"):
        main(["decode", "--shape", "tiny", "--peers", "none", "--only", "beam"])


@pytest.mark.parametrize(("option", "given"), [("--peers", "hff"), ("--batch", "1,x"), ("--batch", "0")])
def test_bad_lists_are_named(option: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["decode", "--shape", "tiny", option, given])
    assert option in capsys.readouterr().err
