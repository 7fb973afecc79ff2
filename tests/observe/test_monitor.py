"""Scalars at wandb, in its offline mode; refusals of a monitor that cannot be."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from janus_ds.config import deepspeed
from janus_ds.config.deepspeed import read_setup
from janus_ds.config.locations import packaged_folder
from janus_ds.errors import ConfigError
from janus_ds.observe import MetricsWriter, read_metrics
from tests.support.processes import wait_until


def records(path: Path) -> list[Any]:
    """LevelDB's log: behind 7 bytes, records with checksum, length and kind; a short file is one block."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, found = path.read_bytes(), 7, []
    while place + 7 <= len(data):
        _, length, _ = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):
            break  # it is being written
        found.append(Record.FromString(data[place + 7 : place + 7 + length]))
        place += 7 + length
    return found


def logged(folder: Path) -> list[tuple[str, list[dict[str, float]]]]:
    """Number of the run, and its lines, of each start in order, from wandb's own files."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        # A process of wandb's own writes; its last record ends the run.
        wait_until(
            lambda p=path: any(r.HasField("exit") for r in records(p)[-1:]), 300, "wandb's last record"
        )
        read = records(path)
        lines = []
        for record in read:
            items = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}
            if items:
                lines.append({key: value for key, value in items.items() if key[0] != "_" or key == "_step"})
        found.append((next(record.run.run_id for record in read if record.HasField("run")), lines))
    return found


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_gets_the_scalars_of_the_other_writers(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB__SERVICE_WAIT", "300")
    monkeypatch.setattr("sys.argv", ["janus-ds", "--data", "https://me:topsecret@host/data"])
    for start, end in ((0, 3), (2, 4)):
        writer = MetricsWriter(tmp_path, start, "wandb")
        for step in range(start + 1, end + 1):
            writer.write(step, {"loss": 1.0 / step, "nar": 2 * step, "bad": float("nan"), "note": "text"})
        writer.close()
    numbers, starts = zip(*logged(tmp_path), strict=True)
    assert len(numbers[0]) == 16
    assert numbers[0] == numbers[1]
    lines = [line for start in starts for line in start]
    assert [line.pop("_step") for line in lines] == [1, 2, 3, 3, 4]
    expected = [
        {key: line[key] for key in ("loss", "nar")} for line in read_metrics(tmp_path / "metrics.jsonl")
    ]
    assert [lines[0], lines[1], lines[3], lines[4]] == expected
    assert lines[2] == lines[3]
    written = [path for path in (tmp_path / "wandb").rglob("*") if path.is_file()]
    assert len(written) > 2
    assert not [path for path in written if b"topsecret" in path.read_bytes()]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_monitor_that_fails_is_a_warning(tmp_path, monkeypatch, caplog):
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    writer = MetricsWriter(tmp_path, 0, "wandb")
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert "wandb gets no figures from now on (No API key configured.)" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize(
    ("monitor", "what"),
    [("wandb", "train.monitor is wandb, which is not installed"), ("mlflow", "mlflow")],
)
def test_an_unknown_or_absent_monitor_is_refused_before_a_run(monitor, what, monkeypatch):
    monkeypatch.setattr(deepspeed, "find_spec", lambda name: None)
    zero1 = packaged_folder("ds_configs") / "zero1.json"
    assert read_setup(None, [], zero1, 1)[0].train.monitor == "none"
    with pytest.raises(ConfigError, match=what) as refused:
        read_setup(None, [f"train.monitor={monitor}"], zero1, 1)
    assert "train.monitor" in refused.value.where
    assert refused.value.fix
