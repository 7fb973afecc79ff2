"""Which checkpoints stay, and what becomes of those that go."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from janus_ds.checkpoint.manifest import fault_of
from tests.checkpoint.test_manifest import Engine, saved


def test_what_stays_follows_the_policy(tmp_path: Path) -> None:
    saved(tmp_path, list(range(10, 80, 10)), keep=2, every=30)
    kept = sorted(int(path.name[-2:]) for path in tmp_path.iterdir())
    assert kept == [30, 60, 70]


def test_an_old_one_that_cannot_go_yet_costs_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On NFS a folder stays as long as somebody has a file of it open, such as an evaluation its weights."""
    remove = shutil.rmtree

    def open_still(path: Path, ignore_errors: bool = False, **options: Any) -> None:
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", open_still)
        manager = saved(tmp_path, [10, 20], keep=1)
        assert shutil.rmtree is not remove
    assert caplog.text == ""
    assert fault_of(tmp_path / "step-00000020") is None
    assert manager.save(30, Engine(), {"step": 30})
    manager.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000030"]
