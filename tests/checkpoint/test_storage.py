"""Storage that fails, is gone, or can do less than a disk."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from janus_ds.checkpoint import manifest as manifest_module
from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.config.schema import TrainConfig
from janus_ds.errors import CheckpointError, ResourceError
from tests.checkpoint.test_manifest import ALONE, Engine, failing, saved


def test_checkpoints_that_cannot_be_reached_are_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, root = tmp_path / "disk", tmp_path / "checkpoints"
    root.symlink_to(disk)
    with pytest.raises(CheckpointError, match="a link that leads to nothing") as caught:
        CheckpointManager(root, TrainConfig(), ALONE).latest()
    assert str(disk) in caught.value.where
    disk.mkdir()
    manager = saved(root, [1, 2])
    newest = manager.latest()
    assert newest is not None
    assert newest.name == "step-00000002"

    def fails(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(manifest_module, "_record", fails)
    with pytest.raises(ResourceError, match="the disk or the network file system failed") as failed:
        manager.latest()
    assert str(newest) in failed.value.where


def test_storage_that_is_gone_in_a_save_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager, clean = saved(tmp_path, [1]), CheckpointManager._clean

    def gone(self: CheckpointManager) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ESTALE, "Stale file handle")
        clean(self)

    monkeypatch.setattr(CheckpointManager, "_clean", gone)
    failing(monkeypatch, [2])
    assert manager.save(2, Engine(), {})
    with pytest.raises(ResourceError):
        manager.finish()
    assert "no checkpoint of step 2: [Errno 28] No space left on device; training goes on" in caplog.text


def test_a_file_system_may_tell_no_size_and_sync_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (0, 0, 0))
    newest = saved(tmp_path, [1, 2]).latest()
    assert newest is not None
    assert newest.name == "step-00000002"
