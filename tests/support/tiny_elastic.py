"""Segments of one run on the ranks of a job, and what each rank trained on in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from janus_ds.data.stream.loader import StepData
from janus_ds.parallel.topology import init_topology
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
