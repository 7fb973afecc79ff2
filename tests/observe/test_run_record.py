"""What `run.json` says of a run."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from janus_ds.batch import SpecialTokens
from janus_ds.config.load import load_run_config
from janus_ds.observe import note_end, write_run_record


@pytest.mark.parametrize("program", ["janus-ds finetune", "/my clone/launch/finetune.py"])
def test_the_recorded_command_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(sys, "argv", [program, "--output", "my runs/a"])
    special = SpecialTokens(0, 1, 2, 3, 4, 8)
    write_run_record(tmp_path, load_run_config(None, []), special, "", {}, 0)
    words = ["janus-ds", "finetune"] if program.startswith("janus-ds") else [program]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["command"] == record["attempts"][0]["command"] == [*words, "--output", "my runs/a"]


def test_a_full_disk_behind_the_last_save_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_run_record(tmp_path, load_run_config(None, []), SpecialTokens(0, 1, 2, 3, 4, 8), "", {}, 0)
    before = (tmp_path / "run.json").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    note_end(tmp_path, "stopped: SIGTERM")
    assert "run.json does not say how this start has ended: the disk is full" in caplog.text
    assert (tmp_path / "run.json").read_bytes() == before
