"""Whole, torn and damaged checkpoints: what is found after a kill at any point."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.checkpoint import manager as manager_module
from janus_ds.checkpoint import manifest as manifest_module
from janus_ds.checkpoint import tensors as snapshot_module
from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.checkpoint.manifest import (
    COMPLETE,
    WEIGHTS_FILE,
    fault_of,
    read_state,
    write_json,
    write_manifest,
)
from janus_ds.checkpoint.tensors import OPTIMIZER_FILE, Snapshot
from janus_ds.config.schema import TrainConfig
from janus_ds.errors import CheckpointError, ResourceError
from janus_ds.parallel.topology import Topology

ALONE = Topology(torch.device("cpu"))


class Engine:
    """Three weights with their moments."""

    def __init__(self, parameters: int = 3) -> None:
        self.parameters = parameters

    def snapshot(self) -> Snapshot:
        moments = {f"{moment}.w": torch.ones(3) for moment in ("exp_avg", "exp_avg_sq")}
        return Snapshot({"w": torch.ones(3)}, moments, {"adam_steps": 7})


def saved(root: Path, steps: list[int], keep: int = 5, every: int = 0) -> CheckpointManager:
    manager = CheckpointManager(root, TrainConfig(keep_last=keep, keep_every=every), ALONE)
    for step in steps:
        assert manager.save(step, Engine(), {"step": step})
    manager.finish()
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
    assert read_state(latest) == {"step": 10, "optimizer": {"adam_steps": 7}}
    assert {p.name for p in latest.iterdir()} == {"state.json", WEIGHTS_FILE, OPTIMIZER_FILE, COMPLETE}


def test_a_damaged_one_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manager = saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002" / OPTIMIZER_FILE).write_bytes(b"cut")
    latest = manager.latest()
    assert latest is not None
    assert latest.name == "step-00000001"
    assert f"{OPTIMIZER_FILE} has 3 bytes" in caplog.text
    (tmp_path / "step-00000001" / COMPLETE).unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints is whole"):
        manager.latest()


def test_a_newer_programs_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    manager = saved(tmp_path, [1, 2])
    manifest = tmp_path / "step-00000002" / COMPLETE
    manifest.write_text(json.dumps({"format_version": 3, "parts": []}))
    with pytest.raises(CheckpointError, match="format version 3, this program knows versions up to 2"):
        manager.latest()


def failing(monkeypatch: pytest.MonkeyPatch, steps: Sequence[int]) -> None:
    """The disk fills up in the middle of the saves of these steps."""
    write = snapshot_module.write_tensors

    def full(path: Path, tensors: Any) -> None:
        if int(path.parent.name.removeprefix(".saving-")) in steps:
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(snapshot_module, "write_tensors", full)


def test_a_save_that_fails_is_a_warning_and_the_last_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manager = saved(tmp_path, [1])
    failing(monkeypatch, [2])
    assert manager.save(2, Engine(), {"step": 2})
    with pytest.raises(ResourceError, match=r"a checkpoint could not be written.*No space left") as caught:
        manager.finish()
    assert str(tmp_path) in caught.value.where
    assert "free disk space" in caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert fault_of(tmp_path / "step-00000001") is None
    assert "no checkpoint of step 2: [Errno 28] No space left on device; training goes on" in caplog.text
    assert f"where: {tmp_path}" in caplog.text
    assert "to do: free disk space" in caplog.text
    assert manager.save(3, Engine(), {"step": 3})
    manager.finish()
    assert fault_of(tmp_path / "step-00000003") is None


def test_several_failed_saves_in_a_row_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = saved(tmp_path, [1])
    failing(monkeypatch, [2, 3, 5, 6, 7])
    for step in range(2, 8):
        manager.save(step, Engine(), {})
    with pytest.raises(ResourceError, match="3 checkpoints in a row could not be written"):
        manager.save(8, Engine(), {})
    latest = manager.latest()
    assert latest is not None
    assert latest.name == "step-00000004"


def test_a_save_without_room_is_not_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager = saved(tmp_path, [1])
    huge = Engine(parameters=10**15)
    manager.look_for_room(huge)
    assert "there is no room for a checkpoint: it needs 12,000,000,001.0 MB" in caplog.text
    assert not manager.save(2, huge, {})
    assert "it needs 12,000,000,001.0 MB, the disk has" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    with pytest.raises(ResourceError):
        manager.finish()
    manager.save(2, huge, {})
    with pytest.raises(ResourceError, match="3 checkpoints in a row"):
        manager.save(3, huge, {})


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, released = threading.Event(), threading.Event()
    publish = manifest_module.write_manifest

    def waiting(folder: Path) -> None:
        reached.set()
        assert released.wait(600)
        publish(folder)

    monkeypatch.setattr(manifest_module, "write_manifest", waiting)
    manager = CheckpointManager(tmp_path, TrainConfig(), ALONE)
    assert manager.save(1, Engine(), {"step": 1})
    # save() has come back, and the checkpoint is still to be published.
    assert reached.wait(600)
    assert [path.name for path in tmp_path.iterdir()] == [".saving-00000001"]
    released.set()
    manager.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_leftovers_of_killed_saves_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (".saving-00000007", ".removing-step-00000001", ".saving-best", "best", "step-notes"):
        (tmp_path / name).mkdir()
    assert CheckpointManager(tmp_path, TrainConfig(), ALONE).latest() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-notes"]
    # Killed between the two renames that put better weights in the place of the best ones.
    (tmp_path / "best").rename(tmp_path / ".previous-best")
    assert CheckpointManager(tmp_path, TrainConfig(), ALONE).latest() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-notes"]


@pytest.mark.parametrize("name", [WEIGHTS_FILE, OPTIMIZER_FILE, "state.json", COMPLETE])
def test_each_flipped_byte_and_each_cut_of_each_file_is_found(tmp_path: Path, name: str) -> None:
    """Every byte in turn; the checkpoint before is taken each time."""
    manager = saved(tmp_path, [1, 2])
    path = tmp_path / "step-00000002" / name
    content = path.read_bytes()
    logging.getLogger("janus_ds").setLevel(logging.ERROR)
    found = 0
    try:
        for place in range(len(content)):
            for damaged in (
                content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :],
                content[:place],
            ):
                path.write_bytes(damaged)
                latest = manager.latest()
                found += latest is not None and latest.name == "step-00000001"
    finally:
        logging.getLogger("janus_ds").setLevel(logging.NOTSET)
    assert found == 2 * len(content)


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    manager = saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002/state.json").write_text(json.dumps({"step": -1}))
    manager.save(2, Engine(), {"step": 2})
    manager.finish()
    assert fault_of(tmp_path / "step-00000002") is None


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("step", [2, 1])
def test_a_kill_before_any_change_on_disk_leaves_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Interrupts a save after that of step 1, with its pruning, before each of its acts in turn."""
    calls = 0

    def killing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls -= 1
            if calls < 0:
                raise Killed
            return function(*args, **options)

        return wrapped

    monkeypatch.setattr(snapshot_module, "write_tensors", killing(snapshot_module.write_tensors))
    monkeypatch.setattr(manager_module, "write_json", killing(manager_module.write_json))
    for name in ("sync_tree", "write_manifest", "sync_path"):
        monkeypatch.setattr(manifest_module, name, killing(getattr(manifest_module, name)))
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
            manager.save(step, Engine(), {"step": step})
            manager.finish()
            break
        except Killed:
            calls = 1000
            latest = CheckpointManager(root, TrainConfig(), ALONE).latest()
            assert latest is not None
            found.append(latest.name)
            assert not [path for path in root.iterdir() if path.name.startswith(".")]
    assert found == sorted(found)
    assert set(found) == {"step-00000001", f"step-{step:08d}"}
    assert len(found) >= 9


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', "{}", "[" * 200_000, '{"files": []}', "\xff"])
def test_a_manifest_that_is_none_costs_its_checkpoint_only(tmp_path: Path, text: str) -> None:
    saved(tmp_path, [1, 2])
    (tmp_path / "step-00000002" / COMPLETE).write_bytes(text.encode("latin-1"))
    latest = CheckpointManager(tmp_path, TrainConfig(), ALONE).latest()
    assert latest is not None
    assert latest.name == "step-00000001"


@pytest.mark.parametrize("name", ["/etc/passwd", "../step-00000001/state.json", "a\0b"])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    saved(tmp_path, [1])
    folder = tmp_path / "step-00000001"
    content = {"format_version": 2, "files": {name: {"size": 1, "crc32": 1}}}
    text = json.dumps(content, indent=1) + "\n"
    write_json(folder / COMPLETE, {**content, "crc32": zlib.crc32(text.encode())})
    assert "is not in the folder" in str(fault_of(folder))
