"""A run goes on over other ranks, ZeRO stages, tensor-parallel sizes and workers.

Each job is a number of processes that starts the run several times; the jobs come one after the
other and continue one run. A reference run is never stopped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from janus_ds.checkpoint.manifest import read_state
from janus_ds.parallel.topology import Topology, init_topology
from tests.conftest import Tally
from tests.support.bad_steps import watched_steps
from tests.support.launch import run_ranks
from tests.support.tiny_training import (
    NO_DROPOUT,
    Result,
    Run,
    allow_fp16,
    assert_bitwise,
    assert_same_training,
    make_inputs,
    train,
)

pytestmark = pytest.mark.timeout(1800)
EPOCH = 270
"""Samples of the tiny training split; an update takes 8."""
SETTINGS = ("train.save_every=1000", "train.valid_every=0", "train.keep_last=9")
CHAIN = Run("chain", micro_batch=2, overrides=(*SETTINGS, *NO_DROPOUT))
WHOLE = ("train.max_steps=5", *SETTINGS)
HALF = ("train.max_steps=2", *SETTINGS)
HIGH_SCALE = {"enabled": True, "loss_scale": 0, "initial_scale_power": 18, "hysteresis": 1}
HIGH_SCALE["loss_scale_window"] = 2

PAIRS = {
    "fp16": Run("fp16", 2, 2, engine={"fp16": HIGH_SCALE}),
    "mixed": Run(
        "mixed",
        engine={
            "bf16": {"enabled": True},
            "zero_optimization": {
                "stage": 2,
                "round_robin_gradients": True,
                "offload_optimizer": {"device": "cpu"},
            },
        },
    ),
}
FP32_SUMS = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
ON_HOST = {"device": "cpu", "pin_memory": True}
WAYS: dict[str, dict[str, Any]] = {
    "whole-buckets": {
        "stage": 1,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "reduce_scatter": False,
    },
    "small-buckets": {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": False,
        "allgather_partitions": False,
        "allgather_bucket_size": 500,
        "reduce_bucket_size": 1000,
    },
    "aligned": {
        "stage": 2,
        "reduce_scatter": False,
        "parameter_alignment": True,
        "use_multi_rank_bucket_allreduce": False,
        "round_robin_gradients": True,
    },
    "fetched-in-pieces": {
        "stage": 3,
        "overlap_comm": False,
        "sub_group_size": 2000,
        "stage3_prefetch_bucket_size": 100,
        "stage3_param_persistence_threshold": 40,
        "stage3_model_persistence_threshold": 200,
        "stage3_max_live_parameters": 1000,
        "stage3_max_reuse_distance": 0,
        "stage3_allgather_sequential": True,
    },
    "fetched-whole": {
        "stage": 3,
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "memory_efficient_linear": False,
        "stage3_use_all_reduce_for_fetch_params": True,
        "stage3_param_persistence_threshold": 0,
    },
    "all-on-host": {
        "stage": 3,
        "offload_param": ON_HOST,
        "offload_optimizer": ON_HOST,
        "stage3_param_persistence_threshold": 0,
    },
}
"""Keys of `zero_optimization` that change how and when something is sent, and no number but for rounding."""
RARE = {
    **{name: Run(name, 0, 2, engine={"zero_optimization": zero}) for name, zero in WAYS.items()},
    "zero3-offload": Run(
        "zero3-offload",
        3,
        2,
        engine={**FP32_SUMS, "zero_optimization": {"stage": 3, "offload_optimizer": ON_HOST}},
    ),
    "fp16-zero3": Run("fp16-zero3", 3, 2, engine={"fp16": HIGH_SCALE}),
    "bf16-sums": Run("bf16-sums", 1, 2, engine=FP32_SUMS),
    "unpartitioned": Run("unpartitioned", 0, 2),
}
"""Executions whose resumed run must be the unbroken one bit for bit, dropout on."""


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


def run_segments(folder: Path, tensor_size: int, segments: list[Segment], run: Run = CHAIN) -> Trained:
    """Start the run once for each segment, on the ranks of this job; it goes on where it stopped."""
    topology = init_topology(tensor_size, process_group=True)
    with watched_steps() as watched:
        for segment in segments:
            settings = (f"train.max_steps={segment.end}", f"data.workers={segment.workers}")
            start = replace(run, stage=segment.stage, overrides=(*run.overrides, *settings))
            result = train(folder, topology, start)
    ids = {step: [sample for micro in micros for sample in micro] for step, micros in watched.ids.items()}
    return Trained(ids, result)


@dataclass(frozen=True)
class Extras:
    """Results of a job beside the chain."""

    chain: Trained
    pairs: dict[str, tuple[Result, Result]]


def two_ranks(folder: Path, segments: list[Segment]) -> Extras:
    chain = run_segments(folder, 1, segments)
    topology = init_topology(1, process_group=True)
    allow_fp16()
    pairs = {name: whole_and_resumed(folder, topology, run) for name, run in PAIRS.items()}
    return Extras(chain, pairs)


def rare_executions(folder: Path) -> dict[str, tuple[Result, Result]]:
    topology = init_topology(1, process_group=True)
    allow_fp16()
    return {name: whole_and_resumed(folder, topology, run) for name, run in RARE.items()}


def whole_and_resumed(folder: Path, topology: Topology, run: Run) -> tuple[Result, Result]:
    whole = train(folder, topology, replace(run, name=f"{run.name}-whole", overrides=WHOLE))
    train(folder, topology, replace(run, overrides=HALF))
    return whole, train(folder, topology, replace(run, overrides=WHOLE))


def tensor_ranks(folder: Path, segments: list[Segment]) -> Extras:
    return Extras(run_segments(folder, 2, segments), {})


def one_rank(folder: Path, segments: list[Segment]) -> tuple[Extras, Trained]:
    chain = run_segments(folder, 1, segments)
    end = segments[-1].end
    reference = run_segments(folder, 1, [Segment(1, 0, end)], replace(CHAIN, name="reference"))
    allow_fp16()
    longer = replace(PAIRS["fp16"], overrides=("train.max_steps=9", *SETTINGS))
    fp16 = train(folder, init_topology(1, process_group=True), longer)
    return Extras(chain, {"fp16": (fp16, fp16)}), reference


@pytest.fixture(scope="module")
def jobs(inputs: Path) -> dict[str, Any]:
    """Two data-parallel ranks, then two tensor-parallel ones, then one process."""
    zero = [Segment(1, 0, 6), Segment(2, 1, 12), Segment(3, 0, 18), Segment(0, 0, 21)]
    found: dict[str, Any] = {"two": run_ranks(two_ranks, 2, inputs, zero)}
    tensor = [Segment(2, 1, 25), Segment(3, 0, 29), Segment(1, 0, 32)]
    found["tensor"] = run_ranks(tensor_ranks, 2, inputs, tensor)
    last = [Segment(3, 0, 35), Segment(2, 1, 40)]
    found["one"], found["reference"] = run_ranks(one_rank, 1, inputs, last)[0]
    return found


def merged(ranks: list[dict[int, list[int]]]) -> dict[int, list[int]]:
    """All samples of each step, over data-parallel ranks."""
    return {step: sorted(id for ids in ranks for id in ids[step]) for step in ranks[0]}


def assert_each_once(ids: dict[int, list[int]]) -> None:
    steps = sorted(ids)
    assert steps == list(range(len(steps)))
    order = [id for step in steps[: EPOCH // 8] for id in ids[step]]
    assert len(set(order)) == len(order)
    # The step across the border has the rest of the first epoch, and the beginning of the second.
    assert set(order) | set(ids[EPOCH // 8]) == set(range(EPOCH))


def test_losses_go_on_as_if_nothing_had_changed(jobs: dict[str, Any]) -> None:
    assert_same_training(jobs["one"].chain.result, jobs["reference"].result, 40)


def test_every_sample_comes_at_its_step_and_once_an_epoch(jobs: dict[str, Any]) -> None:
    first, second = (extras.chain.ids for extras in jobs["tensor"])
    assert first == second
    ids = merged([extras.chain.ids for extras in jobs["two"]])
    ids |= merged([first]) | merged([jobs["one"].chain.ids])
    assert ids == merged([jobs["reference"].ids])
    assert_each_once(ids)


@pytest.mark.parametrize("name", [*PAIRS])
def test_the_same_ranks_go_on_bit_for_bit(jobs: dict[str, Any], name: str) -> None:
    assert_bitwise(*jobs["two"][0].pairs[name])


@pytest.mark.heavy
def test_rarer_executions_go_on_bit_for_bit(inputs: Path) -> None:
    found = run_ranks(rare_executions, 2, inputs)[0]
    for name, (whole, resumed) in found.items():
        assert_bitwise(whole, resumed)
        if name in WAYS:
            assert_same_training(whole, found["unpartitioned"][0], 5)


def test_the_loss_scale_and_skipped_steps_go_on_elsewhere(jobs: dict[str, Any], inputs: Path) -> None:
    """fp16 on two ranks, with overflows before the stop, then on one."""
    whole = jobs["two"][0].pairs["fp16"][0]
    result = jobs["one"].pairs["fp16"][0]
    scales = result.series("loss_scale")
    assert scales[:5] == whole.series("loss_scale")
    assert scales[0] == 2**18
    # The scale that was found goes on, and doubles where the window of good steps says so.
    assert scales[5] in (scales[4], 2 * scales[4])
    assert scales[5] < scales[0]
    assert result.lines[5]["skipped_steps"] >= whole.lines[-1]["skipped_steps"] > 0
    state = read_state(inputs / "fp16/checkpoints/step-00000009")
    assert state["optimizer"]["adam_steps"] == 9 - result.lines[-1]["skipped_steps"]
    assert state["optimizer"]["loss_scale"]["cur_iter"] == 9


@pytest.mark.heavy
def test_one_two_four_and_one_rank_with_all_workers(inputs: Path, jobs: dict[str, Any], tally: Tally) -> None:
    """Ranks 1 -> 2 -> 4 -> 1, tensor-parallel size 1 -> 2 -> 1, ZeRO 1 -> 2 -> 3, workers 0, 1, 4 each."""
    ids: dict[int, list[int]] = {}
    run_folder = make_inputs(inputs / "full")
    end = 0
    for ranks, tensor_size in ((1, 1), (2, 1), (4, 2), (4, 1), (2, 2), (1, 1)):
        segments = []
        for stage, workers in ((1, 0), (2, 1), (3, 4)):
            end += 2
            segments.append(Segment(stage, workers, end))
        found = run_ranks(run_segments, ranks, run_folder, tensor_size, segments)
        ids |= merged([trained.ids for trained in found[::tensor_size]])
        for rank, trained in enumerate(found):
            assert trained.ids == found[rank // tensor_size * tensor_size].ids
    reference = jobs["reference"]
    assert ids == {step: rows for step, rows in merged([reference.ids]).items() if step < end}
    cut = replace(reference.result, lines=reference.result.lines[:end], weights={})
    assert_same_training(found[0].result, cut, end)
    tally(
        "resume over 1, 2, 4 ranks x 0, 1, 4 workers x TP 1, 2 x ZeRO 1-3: ids, losses", f"{end // 2} starts"
    )
