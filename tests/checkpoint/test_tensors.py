"""Our writer against the library's own reader."""

from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from janus_ds.checkpoint import tensors as tensor_file
from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.checkpoint.manifest import WEIGHTS_FILE, step_folders, step_of, write_manifest
from janus_ds.checkpoint.tensors import (
    MOMENTS,
    OPTIMIZER_FILE,
    Snapshot,
    find_weights,
    last_checkpoints,
    open_saved,
    snapshot_bytes,
    write_tensors,
)
from janus_ds.config.schema import TrainConfig
from janus_ds.errors import CheckpointError
from tests.checkpoint.test_manifest import ALONE, Engine

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b": torch.tensor([float("nan"), -0.0, float("-inf"), 1e-45]),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "turned": torch.arange(6.0).view(2, 3).t(),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(3.0),
}


def test_the_library_reads_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_CHUNK", 7)
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    loaded = load_file(str(path))
    assert list(loaded) == list(TENSORS) or set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        expected = tensor.float().contiguous()
        assert loaded[name].shape == expected.shape
        assert torch.equal(loaded[name].view(-1).view(torch.int32), expected.view(-1).view(torch.int32))
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    assert size % 8 == 0
    assert json.loads(content[8 : 8 + size])["__metadata__"] == {"format": "pt"}
    assert len(content) == 8 + size + 4 * sum(tensor.numel() for tensor in TENSORS.values())


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_FILE
    Snapshot(TENSORS, {}, {}).write(tmp_path)
    with open_saved(tmp_path) as read:
        assert torch.equal(read("a.weight", None), TENSORS["a.weight"])
        with pytest.raises(CheckpointError, match="tensor c cannot be read"):
            read("c", None)
    for content in (b"", b"\x01" * 64, path.read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="tensors cannot be read") as caught, open_saved(tmp_path):
            pass
        assert caught.value.where == str(path)


def test_a_snapshot_comes_back_whole(tmp_path: Path) -> None:
    weights = {"w": torch.randn(4, 3), "b": torch.randn(5)}
    moments = {f"{moment}.{name}": torch.randn_like(w) for moment in MOMENTS for name, w in weights.items()}
    Snapshot(weights, moments, {"adam_steps": 3}).write(tmp_path)
    with open_saved(tmp_path) as read:
        assert torch.equal(read("w", None), weights["w"])
        assert torch.equal(read("b", "exp_avg_sq"), moments["exp_avg_sq.b"])
    (tmp_path / OPTIMIZER_FILE).unlink()
    with pytest.raises(CheckpointError), open_saved(tmp_path):
        pass
    assert snapshot_bytes(17) == 4 * 3 * 17


def test_tensors_may_be_written_over_the_file_that_they_came_from(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(100_000.0)})
    # The loaded tensor lies in the file's memory map.
    write_tensors(path, {"a": load_file(str(path))["a"]})
    assert torch.equal(load_file(str(path))["a"], torch.arange(100_000.0))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_first_weights_are_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-00000004"
    step.mkdir(parents=True)
    write_tensors(step / WEIGHTS_FILE, TENSORS)
    write_manifest(step)
    assert find_weights(tmp_path) == find_weights(step) == step / WEIGHTS_FILE
    content = bytearray((step / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (step / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="another checksum"):
        find_weights(tmp_path)


def test_averages_of_a_run_that_was_stopped_are_those_of_one_that_was_not(tmp_path: Path) -> None:
    """Stopped at 25 and 27, later gone back from a damaged 50 to 40, stopped at 45."""

    def kept() -> list[int]:
        return [step_of(path.parent) or 0 for path in last_checkpoints(tmp_path, 3)]

    train = TrainConfig(keep_last=3, save_every=10)
    manager = CheckpointManager(tmp_path / "checkpoints", train, ALONE)
    for step, names in ((10, None), (20, None), (25, [10, 20, 25]), (27, [10, 20, 27]), (30, [10, 20, 30])):
        assert manager.save(step, Engine(), {})
        manager.finish()
        assert names is None or kept() == names
    for step in (40, 50, 45):
        manager.save(step, Engine(), {})
        manager.finish()
    assert kept() == [30, 40, 45]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert step_folders(tmp_path / "none") == []

    def fails(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", fails)
    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(PermissionError):
        step_folders(tmp_path)
