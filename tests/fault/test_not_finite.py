"""NaN and Inf on one of two ranks, in every precision and ZeRO stage: skipped, agreed, named, given up.

One job of two ranks goes over its executions one after the other. A run of each has a bad loss, a bad
gradient and a bad gradient of one matrix alone, on rank 1; a second start of it never sees a good step.
The first job has a streak of fp16 overflows and a spike of the loss as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from janus_ds.checkpoint.manifest import read_state
from janus_ds.errors import TrainingError
from janus_ds.parallel.topology import Topology, init_topology
from janus_ds.train.guards import Decision, SkipCause
from tests.support.bad_steps import Watched, bad_passes, watched_steps
from tests.support.launch import run_ranks
from tests.support.tiny_training import Run, allow_fp16, make_inputs, train

STEPS = 7
SETTINGS = (f"train.max_steps={STEPS}", "train.save_every=1", "train.valid_every=0", "train.keep_last=99")
ENGINES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "hysteresis": 2}},
    # Host memory has an overflow check of its own in DeepSpeed.
    "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    # Stage 1 with fp32 sums of bf16 gradients is a class of its own.
    "sums": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}
SOME = [("fp32", 0), ("fp32", 3), ("bf16", 2), ("fp16", 2)]
ALL = [
    (name, stage) for name in ("fp32", "bf16", "fp16") for stage in (0, 1, 2, 3) if name == "fp32" or stage
]
ALL += [("offload", 2), ("sums", 1), ("sums", 2)]
LOSS, GRADIENT, WEIGHT = 1, 3, 5
"""The steps, from 0, at which something is wrong."""
FAULTS = {LOSS * 2: "nan", GRADIENT * 2 + 1: "gradient", WEIGHT * 2: "weight"}


@dataclass(frozen=True)
class Found:
    """What one rank saw of an execution."""

    watched: Watched
    streak: Watched
    lines: list[dict[str, Any]]
    error: TrainingError | None
    scales: list[float]


@dataclass(frozen=True)
class Extras:
    """What one rank saw beside the matrix."""

    overflow: Found
    spike: Watched
    resumed_spike: Watched
    losses: list[float]
    """Losses of the run with a spike."""


def go_over(folder: Path, executions: list[tuple[str, int]]) -> dict[tuple[str, int], Found]:
    topology = init_topology(1, process_group=True)
    allow_fp16()
    return {execution: spoil(folder, topology, *execution) for execution in executions}


SPIKE, WINDOW, SPIKE_STEPS = 10, 8, 12
SPIKES = (f"train.max_steps={SPIKE_STEPS}", "train.save_every=9", "train.valid_every=0", "train.keep_last=99")
SPIKES = (*SPIKES, f"train.spike_window={WINDOW}", "train.spike_action=skip", "train.spike_factor=20")


def go_further(folder: Path, executions: list[tuple[str, int]]) -> tuple[Any, Extras]:
    """The executions, then the rest."""
    found = go_over(folder, executions)
    topology = init_topology(1, process_group=True)
    scale = {"enabled": True, "loss_scale": 0, "initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 1}
    error = None
    with watched_steps() as streak, bad_passes(dict.fromkeys(range(99), "gradient"), topology, rank=1):
        try:
            train(folder, topology, Run("streak", 2, 2, SETTINGS, {"fp16": scale}))
        except TrainingError as raised:
            error = raised
    overflow = Found(Watched(), streak, [], error, [])
    with watched_steps() as spike, bad_passes({2 * SPIKE: "x4"}, topology, rank=1):
        lines = train(folder, topology, Run("spike", 3, 2, SPIKES)).lines
    train(folder, topology, Run("spike-resumed", 3, 2, (*SPIKES, "train.max_steps=9")))
    with watched_steps() as resumed, bad_passes({2 * (SPIKE - 9): "x4"}, topology, rank=1):
        train(folder, topology, Run("spike-resumed", 3, 2, SPIKES))
    return found, Extras(overflow, spike, resumed, [line["loss"] for line in lines])


def spoil(folder: Path, topology: Topology, name: str, stage: int) -> Found:
    run = Run(f"{name}-{stage}", stage, 2, SETTINGS, ENGINES[name])
    with watched_steps() as watched, bad_passes(FAULTS, topology, rank=1):
        result = train(folder, topology, run)
    longer = ("train.max_steps=99", "train.max_bad_steps=3")
    error = None
    with watched_steps() as streak, bad_passes(dict.fromkeys(range(99), "inf"), topology, rank=1):
        try:
            train(folder, topology, Run(run.name, stage, 2, (*SETTINGS, *longer), run.engine))
        except TrainingError as raised:
            error = raised
    return Found(watched, streak, result.lines, error, result.series("loss_scale"))


def check(folder: Path, ranks: list[dict[tuple[str, int], Found]]) -> None:
    """Hold what must hold of each execution."""
    for execution in ranks[0]:
        first, second = (rank[execution] for rank in ranks)
        assert first.watched.verdicts == second.watched.verdicts, execution
        assert_skipped(folder / f"{execution[0]}-{execution[1]}", first, second, execution[0])
        for found in (first, second):
            assert_given_up(found)


def assert_skipped(run: Path, first: Found, second: Found, name: str) -> None:
    verdicts = first.watched.verdicts
    decisions = [verdicts[step].decision for step in range(STEPS)]
    skipped = [
        Decision.SKIP if step in (LOSS, GRADIENT, WEIGHT) else Decision.PROCEED for step in range(STEPS)
    ]
    assert decisions == skipped, (run.name, verdicts)
    # The micro-batch that was spoiled on rank 1, and no other sample.
    ids = second.watched.ids
    assert verdicts[LOSS].cause is SkipCause.LOSS
    assert verdicts[LOSS].reason == "the loss is not finite on rank 1"
    assert verdicts[LOSS].sample_ids == sorted(ids[LOSS][0])
    if name == "fp16":
        for step in (GRADIENT, WEIGHT):
            assert verdicts[step].cause is SkipCause.OVERFLOW
            assert verdicts[step].reason.startswith("fp16 overflow at loss scale ")
            assert verdicts[step].sample_ids == []
        # A bad loss says nothing about the scale; the second overflow halves it (hysteresis 2).
        assert first.scales == [256.0] * 6 + [128.0]
    else:
        assert verdicts[GRADIENT].cause is SkipCause.GRADIENT
        assert verdicts[GRADIENT].reason == "the gradient is not finite on rank 1"
        assert verdicts[GRADIENT].sample_ids == sorted(ids[GRADIENT][1])
        assert "which micro-batch it comes from is not known" in verdicts[WEIGHT].reason
        everything = [*first.watched.ids[WEIGHT], *ids[WEIGHT]]
        assert verdicts[WEIGHT].sample_ids == sorted(id for micro in everything for id in micro)
    for step, line in enumerate(first.lines):
        assert line.get("skipped", False) == (step in (LOSS, GRADIENT, WEIGHT))
        assert line.get("bad_samples", []) == verdicts[step].sample_ids
    assert first.lines[LOSS]["loss"] is None
    assert first.lines[GRADIENT]["loss"] > 0
    assert_nothing_moved(run)


def assert_nothing_moved(run: Path) -> None:
    """Weights, both moments and Adam's counter, bit for bit; and each good step changes them."""
    folders = [run / f"checkpoints/step-{step:08d}" for step in range(1, STEPS + 1)]
    for step in range(1, STEPS):
        same = step in (LOSS, GRADIENT, WEIGHT)
        for name in ("weights.safetensors", "optimizer.safetensors"):
            before, after = (folder / name for folder in (folders[step - 1], folders[step]))
            assert (before.read_bytes() == after.read_bytes()) == same, (run.name, step, name)
        counts = [read_state(folder)["optimizer"]["adam_steps"] for folder in folders[step - 1 : step + 1]]
        assert counts[1] - counts[0] == (0 if same else 1), (run.name, step)


def assert_given_up(found: Found) -> None:
    assert sorted(found.streak.verdicts) == [STEPS, STEPS + 1, STEPS + 2]
    error = found.error
    assert error is not None
    assert error.exit_code == 6
    assert error.what == "3 steps in a row were skipped: the loss is not finite on rank 1"
    assert error.where.startswith(f"step {STEPS + 3}, samples [")
    assert "janus-ds inspect" in error.fix
    assert "goes on from the last checkpoint" in error.fix


def assert_streak(found: Found) -> None:
    """Scales 4, 2 and 1, and no further."""
    verdicts = [found.streak.verdicts[step] for step in sorted(found.streak.verdicts)]
    assert [verdict.cause for verdict in verdicts] == [SkipCause.OVERFLOW] * 3
    assert [verdict.decision for verdict in verdicts] == [Decision.SKIP, Decision.SKIP, Decision.ABORT]
    error = found.error
    assert error is not None
    assert "the loss scale of fp16 cannot come down any further" in error.what
    assert error.where == "step 3, loss scale 1, 3 overflows in a row"
    assert "use bf16 (ds_configs/zero2_bf16.json)" in error.fix


def assert_spike(folder: Path, first: Extras, second: Extras) -> None:
    """Skipped by both ranks from the loss of both; the same after a resume, bit for bit."""
    verdicts = first.spike.verdicts
    assert verdicts == second.spike.verdicts
    spikes = [step for step, verdict in verdicts.items() if verdict.spike]
    assert spikes == [SPIKE]
    verdict = verdicts[SPIKE]
    assert (verdict.decision, verdict.cause) == (Decision.SKIP, SkipCause.SPIKE)
    assert verdict.reason.startswith(
        f"the loss {first.losses[SPIKE]:.4g} is a spike: the median of the last 8 is "
    )
    assert verdict.reason.endswith("; most of it comes from rank 1")
    assert verdict.sample_ids == sorted(second.spike.ids[SPIKE][0])
    resumed = {step: verdict for step, verdict in verdicts.items() if step >= 9}
    assert first.resumed_spike.verdicts == second.resumed_spike.verdicts == resumed
    ends = [folder / name / f"checkpoints/step-{SPIKE_STEPS:08d}" for name in ("spike", "spike-resumed")]
    for name in ("weights.safetensors", "optimizer.safetensors"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    kept, again = (read_state(end)["meters"]["recent_losses"] for end in ends)
    assert kept == again
    assert kept == pytest.approx([*first.losses[3:SPIKE], first.losses[SPIKE + 1]], rel=1e-12)


def test_a_part_of_the_matrix_a_streak_and_a_spike(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    ranks = run_ranks(go_further, 2, tmp_path, SOME)
    check(tmp_path, [found for found, _ in ranks])
    for _, extras in ranks:
        assert_streak(extras.overflow)
    assert_spike(tmp_path, ranks[0][1], ranks[1][1])


@pytest.mark.heavy
@pytest.mark.timeout(2400)
def test_every_precision_and_zero_stage(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    rest = [execution for execution in ALL if execution not in SOME]
    check(tmp_path, run_ranks(go_over, 2, tmp_path, rest, timeout=1800))


def tensor_ranks(folder: Path) -> dict[int, Watched]:
    """Two ranks that share one model, with the same faults on the second one alone."""
    topology = init_topology(2, process_group=True)
    found = {}
    for stage in (1, 3):
        # In stage 3, DeepSpeed sees replicated parameters on the first rank alone.
        faults = FAULTS | {WEIGHT * 2: "replicated" if stage == 1 else "weight"}
        with watched_steps() as watched, bad_passes(faults, topology, rank=1):
            train(folder, topology, Run(f"tensor-{stage}", stage, 4, SETTINGS))
        found[stage] = watched
    return found


@pytest.mark.heavy
def test_tensor_parallel_ranks_agree_as_well(tmp_path: Path) -> None:
    first, second = run_ranks(tensor_ranks, 2, make_inputs(tmp_path))
    for stage in (1, 3):
        verdicts = first[stage].verdicts
        assert verdicts == second[stage].verdicts
        skipped = [step for step in range(STEPS) if verdicts[step].decision is Decision.SKIP]
        assert skipped == [LOSS, GRADIENT, WEIGHT]
        assert verdicts[LOSS].sample_ids == sorted(second[stage].ids[LOSS][0])
        assert_nothing_moved(tmp_path / f"tensor-{stage}")
