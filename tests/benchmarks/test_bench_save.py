"""The save bench runs, adds up and leaves nothing behind; its figures are for people to read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.save import main


def test_figures_go_to_a_file_and_follow_from_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    arguments = ["--shape", "quickstart", "--rounds", "1", "--every", "7", "--folder", str(folder)]
    assert main([*arguments, "--json", str(tmp_path / "save.json")]) == 0
    figures = json.loads((tmp_path / "save.json").read_text())
    assert figures["bytes"] == 12 * figures["parameters"]
    assert figures["waiting_seconds"]["median"] > 0
    assert figures["writing_seconds"]["median"] > 0
    step = figures["waiting_seconds"]["median"] / 0.02 / 7 * 1000
    printed = capsys.readouterr().out
    assert f"2% of the time at train.save_every=7 is held by steps of {step:.0f} ms" in printed
    assert not list(folder.iterdir())
    with pytest.raises(SystemExit):
        main(["--rounds", "0"])
