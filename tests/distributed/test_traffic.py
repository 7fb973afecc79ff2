"""What `plan` says that ranks send is what they send: every collective of a step, by kind and group."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from janus_ds.cli.traffic import (
    BatchShape,
    Execution,
    Sent,
    agreements,
    rank_parameters,
    tensor_traffic,
    zero_traffic,
)
from janus_ds.config.load import load_run_config
from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.index import Manifest
from janus_ds.parallel.topology import Topology, init_topology
from tests.support.comm_counter import StepSent, counted_steps
from tests.support.launch import run_ranks
from tests.support.tiny_training import Run, make_inputs, train

STEPS = 4
SETTINGS = (f"train.max_steps={STEPS}", "train.save_every=1000", "train.valid_every=0", "data.workers=0")
SETTLED = 2
"""The first step after DeepSpeed has seen one whole step of stage 3."""
Found = dict[tuple[str, str], tuple[int, int]]
"""(operation, group) -> calls, bytes."""


@dataclass(frozen=True)
class Case:
    """A run, and what of it the plan is told."""

    name: str
    execution: Execution
    overrides: tuple[str, ...] = ()
    engine: dict[str, Any] | None = None

    def run(self) -> Run:
        micro = 8 // self.execution.micro_batches // self.execution.data_size
        return Run(self.name, self.execution.stage, micro, (*SETTINGS, *self.overrides), self.engine or {})


@dataclass(frozen=True)
class Counted:
    """What one rank sent in a settled step, and the shapes of its micro-batches."""

    found: Found
    shapes: list[BatchShape]


BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
DATA = [Case(f"zero{stage}", Execution(stage, data_size=2, persistence=0)) for stage in range(4)]
DATA += [
    Case(f"halves{stage}", Execution(stage, data_size=2, micro_batches=2, persistence=0))
    for stage in (1, 2, 3)
]
DATA += [
    Case("bf16", Execution(2, "bf16", data_size=2), engine=BF16),
    Case("bf16-sums", Execution(1, "bf16", data_size=2, micro_batches=2), engine=FP32_SUMS),
    Case("bf16-zero3", Execution(3, "bf16", data_size=2, persistence=0), engine=BF16),
    Case(
        "small-buckets",
        Execution(2, data_size=2, bucket=9000),
        engine={"zero_optimization": {"stage": 2, "reduce_bucket_size": 9000}},
    ),
    Case("kept", Execution(3, data_size=2), engine={"zero_optimization": {"stage": 3}}),
    Case("ar", Execution(1, data_size=2), ("objective.preset=ar",)),
]
TENSOR = [Case(f"tensor{stage}", Execution(stage, tensor_size=2, persistence=0)) for stage in (0, 2, 3)]
TENSOR += [
    Case("recomputed", Execution(1, tensor_size=2, recompute=True), ("train.activation_checkpointing=true",)),
    Case("tensor-bf16", Execution(2, "bf16", tensor_size=2), engine=BF16),
    Case("tensor-sums", Execution(1, "bf16", tensor_size=2), engine=FP32_SUMS),
    Case("tensor-cmlm", Execution(2, tensor_size=2), ("objective.preset=cmlm",)),
]
BOTH = [Case(f"both{s}", Execution(s, data_size=2, tensor_size=2, persistence=0)) for s in (2, 3)]


def count(folder: Path, cases: list[Case]) -> dict[str, Counted]:
    topology = init_topology(cases[0].execution.tensor_size, process_group=True)
    found = {}
    for case in cases:
        with counted_steps() as steps:
            train(folder, topology, case.run())
        found[case.name] = counted(steps[SETTLED], topology)
    return found


def counted(step: StepSent, topology: Topology) -> Counted:
    assert step.step == SETTLED
    first, size = topology.rank - topology.tensor_rank, topology.tensor_size
    groups = {
        tuple(range(first, first + size)): "tensor",
        tuple(range(topology.tensor_rank, topology.world_size, size)): "data",
        tuple(range(topology.world_size)): "world",
    }
    found: Found = {}
    for message, times in step.messages.items():
        if len(message.ranks) == 1:
            continue  # nothing leaves the rank
        key = (message.operation, groups[message.ranks])
        calls, size = found.get(key, (0, 0))
        found[key] = (calls + times, size + times * message.bytes)
    shapes = [
        BatchShape(
            *batch.source_BS.shape,
            batch.layout,
            len(batch.masked_T),
            len(batch.ar_unmasked_U),
        )
        for batch in step.batches
    ]
    return Counted(found, shapes)


def predicted(case: Case, config: RunConfig, vocab_size: int, shapes: list[BatchShape]) -> list[Sent]:
    execution = case.execution
    parameters = rank_parameters(config.model, vocab_size, execution.tensor_size)
    return [
        *zero_traffic(parameters, execution),
        *agreements(config.objective, execution),
        *tensor_traffic(config.model, vocab_size, config.objective, shapes, execution, "cpu"),
    ]


def summed(sents: list[Sent], execution: Execution) -> Found:
    """By operation and group; a group of all ranks is the world."""
    calls: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for sent in sents:
        whole = 1 in (execution.data_size, execution.tensor_size)
        key = (sent.operation, "world" if whole else sent.group)
        calls[key] += sent.calls
        sizes[key] += sent.bytes
    return {key: (calls[key], sizes[key]) for key in calls}


def check(folder: Path, cases: list[Case], world_size: int) -> None:
    make_inputs(folder)
    vocab_size = Manifest.load(folder / "data").vocab_size
    wrong = []
    for rank, found in enumerate(run_ranks(count, world_size, folder, cases)):
        for case in cases:
            overrides = [*case.run().overrides, f"data.path={folder / 'data'}"]
            config = load_run_config(folder / "recipe.yaml", overrides)
            sents = predicted(case, config, vocab_size, found[case.name].shapes)
            expected = summed(sents, case.execution)
            if found[case.name].found != expected:
                wrong.append((case.name, rank, found[case.name].found, expected))
    assert wrong == []


def test_two_data_parallel_ranks_send_what_is_predicted(tmp_path: Path) -> None:
    """ZeRO 0 to 3, accumulation, bf16, small buckets, small weights kept whole, AR alone."""
    check(tmp_path, DATA, 2)


def test_two_tensor_parallel_ranks_send_what_is_predicted(tmp_path: Path) -> None:
    check(tmp_path, TENSOR, 2)


@pytest.mark.heavy
def test_two_by_two_ranks_send_what_is_predicted(tmp_path: Path) -> None:
    check(tmp_path, BOTH, 4)
