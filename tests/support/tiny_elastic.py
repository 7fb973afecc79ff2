"""Segments of one run on the ranks of a job, and what each rank trained on in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from janus_ds.parallel.topology import init_topology
from tests.support.bad_steps import watched_steps
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
    with watched_steps() as watched:
        for segment in segments:
            settings = (f"train.max_steps={segment.end}", f"data.workers={segment.workers}")
            start = replace(run, stage=segment.stage, overrides=(*run.overrides, *settings))
            result = train(folder, topology, start)
    ids = {step: [sample for micro in micros for sample in micro] for step, micros in watched.ids.items()}
    return Trained(ids, result)
