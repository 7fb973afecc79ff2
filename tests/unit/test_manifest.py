"""Whole, torn and damaged checkpoints: what is found after a kill at any point."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.checkpoint import manager as manager_module
from janus_ds.checkpoint.manager import CheckpointManager, read_state
from janus_ds.checkpoint.manifest import COMPLETE, fault_of, write_manifest
from janus_ds.errors import CheckpointError, ResourceError
from janus_ds.parallel.topology import Topology

ALONE = Topology(torch.device("cpu"))


class Engine:
    """Writes one file; fails like torch.save on a full disk if told to."""

    def __init__(self, full_disk: bool = False) -> None:
        self.full_disk = full_disk

    def save(self, folder: Path) -> None:
        (folder / "shard.pt").write_bytes(b"weights" * 1000)
        if self.full_disk:
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    def full_weights(self) -> dict[str, Tensor]:
        return {"w": torch.ones(3)}


def saved(root: Path, steps: list[int], keep: int = 5) -> CheckpointManager:
    manager = CheckpointManager(root, keep, ALONE)
    for step in steps:
        manager.save(step, Engine(), {"step": step})
    return manager


def test_a_manifest_notices_every_kind_of_damage(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "sub" / "b").write_bytes(b"x")
    assert "missing" in str(fault_of(tmp_path))
    write_manifest(tmp_path)
    assert fault_of(tmp_path) is None
    (tmp_path / "a").write_bytes(b"012345678")
    assert fault_of(tmp_path) == "a has 9 bytes instead of 10"
    (tmp_path / "a").write_bytes(b"0123456780")
    assert fault_of(tmp_path) == "a has another checksum than at its save"
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "sub" / "b").unlink()
    assert fault_of(tmp_path) == "sub/b is missing"
    (tmp_path / COMPLETE).write_text('{"files": ')
    assert "cannot be read" in str(fault_of(tmp_path))


def test_the_newest_whole_one_is_found_and_old_ones_go(tmp_path: Path) -> None:
    manager = saved(tmp_path, [1, 2, 10], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    latest = manager.latest()
    assert latest is not None
    assert read_state(latest) == {"step": 10}
    assert {p.name for p in latest.iterdir()} == {"engine", "state.json", "weights.safetensors", COMPLETE}


def test_a_damaged_one_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002/engine/shard.pt").write_bytes(b"cut")
    latest = manager.latest()
    assert latest is not None
    assert latest.name == "step-00000001"
    assert "engine/shard.pt has 3 bytes" in caplog.text
    (tmp_path / "step-00000001" / COMPLETE).unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        manager.latest()


def test_a_newer_programs_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    manager = saved(tmp_path, [1, 2])
    manifest = tmp_path / "step-00000002" / COMPLETE
    manifest.write_text(json.dumps({"format_version": 2, "parts": []}))
    with pytest.raises(CheckpointError, match="format version 2, this program knows versions up to 1"):
        manager.latest()


def test_no_checkpoint_is_no_fault(tmp_path: Path) -> None:
    assert CheckpointManager(tmp_path / "none", 1, ALONE).latest() is None


def test_a_full_disk_is_an_error_in_three_parts_and_the_last_one_stays(tmp_path: Path) -> None:
    manager = saved(tmp_path, [1])
    with pytest.raises(ResourceError, match="file write failed") as caught:
        manager.save(2, Engine(full_disk=True), {"step": 2})
    assert str(tmp_path) in caught.value.where
    assert "free disk space" in caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert fault_of(tmp_path / "step-00000001") is None


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    manager = saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002/state.json").write_text(json.dumps({"step": -1}))
    manager.save(2, Engine(), {"step": 2})
    assert fault_of(tmp_path / "step-00000002") is None


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_a_kill_before_any_change_on_disk_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupts a save, with its pruning, before each of its acts in turn."""
    calls = 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise Killed
            return function(*args, **options)

        return wrapped

    for name in ("save_weights", "write_json", "sync_files", "write_manifest", "sync_folder"):
        monkeypatch.setattr(manager_module, name, killing(getattr(manager_module, name)))
    monkeypatch.setattr(shutil, "rmtree", killing(shutil.rmtree))
    for name in ("rename", "mkdir"):
        monkeypatch.setattr(Path, name, killing(getattr(Path, name)))
    found = []
    for kill_at in range(100):
        root = tmp_path / str(kill_at)
        calls = 1000
        manager = saved(root, [1], keep=1)
        calls = kill_at
        try:
            manager.save(2, Engine(), {"step": 2})
            break
        except Killed:
            calls = 1000
            latest = CheckpointManager(root, 1, ALONE).latest()
            assert latest is not None
            found.append(latest.name)
            assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert found == sorted(found)
    assert set(found) == {"step-00000001", "step-00000002"}
    assert len(found) >= 9
