"""Segments of one run on the ranks of a job, and what each rank trained on in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from janus_ds.checkpoint.manager import CheckpointManager, Saveable
from janus_ds.checkpoint.manifest import COMPLETE, write_manifest
from janus_ds.checkpoint.tensors import WEIGHTS_FILE, write_tensors
from janus_ds.data.stream.loader import StepData
from janus_ds.parallel.topology import Topology, init_topology
from janus_ds.train.loop.trainer import Trainer
from tests.support.tiny_training import Result, Run, train


@dataclass(frozen=True)
class Segment:
    """A start of the run: its ZeRO stage, loader workers, and the step at which it ends."""

    stage: int
    workers: int
    end: int


@dataclass(frozen=True)
class Trained:
    """What one rank did in its segments."""

    ids: dict[int, list[int]]
    """Samples of each step."""
    result: Result


def run_segments(folder: Path, tensor_size: int, segments: list[Segment], run: Run) -> Trained:
    """Start the run once for each segment, on the ranks of this job; it goes on where it stopped."""
    topology = init_topology(tensor_size, process_group=True)
    with trained_ids() as ids:
        for segment in segments:
            settings = (f"train.max_steps={segment.end}", f"data.workers={segment.workers}")
            start = replace(run, stage=segment.stage, overrides=(*run.overrides, *settings))
            result = train(folder, topology, start)
    return Trained(ids, result)


@contextmanager
def trained_ids() -> Iterator[dict[int, list[int]]]:
    """Notes the samples that this rank trains on, by step."""
    ids: dict[int, list[int]] = {}
    original = Trainer.train_step

    def noting(self: Trainer, data: StepData) -> Any:
        assert data.step not in ids
        ids[data.step] = data.sample_ids.tolist()
        return original(self, data)

    Trainer.train_step = noting  # type: ignore[method-assign]
    try:
        yield ids
    finally:
        Trainer.train_step = original  # type: ignore[method-assign]


@contextmanager
def written_as_format_1(topology: Topology) -> Iterator[None]:
    """Saves checkpoints as version 1 of the format had them: DeepSpeed's own files in engine/."""
    original = CheckpointManager.save

    def save(self: CheckpointManager, step: int, engine: Saveable, state: dict[str, Any]) -> bool:
        inner: Any = engine
        folder = self._root / f"step-{step:08d}"
        (folder / "engine").mkdir(parents=True, exist_ok=True)
        inner._engine.save_checkpoint(str(folder / "engine"), tag="shards", save_latest=False)
        weights = inner.full_weights()
        if topology.is_main:
            write_tensors(folder / WEIGHTS_FILE, weights)
            (folder / "state.json").write_text(json.dumps({**state, "format_version": 1}))
            write_manifest(folder)
            manifest = json.loads((folder / COMPLETE).read_text())
            del manifest["crc32"]
            (folder / COMPLETE).write_text(json.dumps({**manifest, "format_version": 1}, indent=1) + "\n")
        topology.barrier()
        return True

    CheckpointManager.save = save  # type: ignore[method-assign]
    try:
        yield
    finally:
        CheckpointManager.save = original  # type: ignore[method-assign]
