"""Skipping, giving up and stopping, as one process sees them (several: tests/distributed)."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch

from janus_ds.config.schema import TrainConfig
from janus_ds.errors import TrainingError
from janus_ds.parallel.topology import Topology
from janus_ds.train.engine import LossScale, Update
from janus_ds.train.guards import Decision, SkipCause, SpikeDetector, StepGuard, Verdict
from janus_ds.train.signals import StopSignals

ALONE = Topology(torch.device("cpu"))
GOOD, BAD = torch.tensor(1.5), torch.tensor(float("inf"))
DONE = Update(True, 1.0, 1.0)
LEFT_OUT = Update(False, math.nan, 1.0)
OVERFLOW = Update(False, math.inf, 256.0, scaled=True)


def guards(recent: list[float] | None = None, **train: Any) -> StepGuard:
    settings = TrainConfig(**{"max_bad_steps": 3, **train})
    return StepGuard(ALONE, settings, StopSignals(), [] if recent is None else recent)


def test_a_bad_micro_batch_spoils_the_last_one_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    guard = guards()
    assert guard.loss_or_nan(BAD, last=False).isinf()
    assert guard.loss_or_nan(GOOD, last=True).isnan()
    verdict = guard.judge(4, LEFT_OUT, [[11, 12], [21, 22]])
    assert verdict.decision is Decision.SKIP
    assert verdict.cause is SkipCause.LOSS
    assert verdict.sample_ids == [11, 12]
    assert "step 5 skipped on all ranks: the loss is not finite on rank 0; samples [11, 12]" in caplog.text
    assert guard.loss_or_nan(GOOD, last=True).item() == 1.5


def test_a_streak_ends_the_run_and_a_good_step_ends_the_streak() -> None:
    guard = guards(max_bad_steps=2)
    decisions = []
    for loss in (BAD, GOOD, BAD, BAD):
        guard.loss_or_nan(loss, last=True)
        update = DONE if torch.isfinite(loss) else LEFT_OUT
        verdict = guard.judge(0, update, [[7]])
        decisions.append(verdict.decision)
    assert decisions == [Decision.SKIP, Decision.PROCEED, Decision.SKIP, Decision.ABORT]
    error = guard.error(9, verdict, update)
    assert isinstance(error, TrainingError)
    assert "2 steps in a row" in error.what
    assert "step 10, samples [7]" in error.where


def test_a_gradient_that_is_not_finite_is_traced_to_its_micro_batch() -> None:
    guard = guards()
    for last, largest in ((False, 0.5), (True, math.nan)):
        guard.loss_or_nan(GOOD, last=last)
        guard.after_backward(torch.tensor(largest))
    verdict = guard.judge(2, LEFT_OUT, [[11, 12], [21, 22]])
    assert verdict.cause is SkipCause.GRADIENT
    assert (verdict.reason, verdict.sample_ids) == ("the gradient is not finite on rank 0", [21, 22])
    guard.loss_or_nan(GOOD, last=True)
    guard.after_backward(torch.tensor(0.5))
    verdict = guard.judge(3, LEFT_OUT, [[31, 32]])
    assert "which micro-batch it comes from is not known" in verdict.reason
    assert verdict.sample_ids == [31, 32]


def overflow(guard: StepGuard, update: Update = OVERFLOW) -> Verdict:
    guard.loss_or_nan(GOOD, last=True)
    return guard.judge(0, update, [[7]])


def test_fp16_may_search_its_scale_for_longer() -> None:
    guard = guards(max_bad_steps=2, max_overflows=42)
    found = [overflow(guard) for _ in range(42)]
    assert [verdict.decision for verdict in found[:41]] == [Decision.SKIP] * 41
    assert {verdict.cause for verdict in found} == {SkipCause.OVERFLOW}
    assert found[0].reason == "fp16 overflow at loss scale 256"
    assert found[0].sample_ids == []
    assert found[41].decision is Decision.ABORT
    error = guard.error(8, found[41], OVERFLOW)
    assert error.what == "fp16 gradients have overflowed in 42 steps in a row (train.max_overflows)"
    assert error.where == "step 9, loss scale 256, 42 overflows in a row"
    assert "use bf16 (ds_configs/zero2_bf16.json)" in error.fix
    assert error.fix.endswith("take a new run (--init with this one, another --output)")
    assert error.exit_code == 6


def test_fp16_gives_up_where_its_scale_cannot_come_down() -> None:
    guard = guards()
    assert overflow(guard).decision is Decision.SKIP
    end = replace(OVERFLOW, loss_scale=1.0, exhausted=True)
    verdict = overflow(guard, end)
    assert verdict.decision is Decision.ABORT
    error = guard.error(5, verdict, end)
    assert "the loss scale of fp16 cannot come down any further" in error.what
    assert error.where == "step 6, loss scale 1, 2 overflows in a row"
    # A sample is to blame, not the scale: an ordinary bad step.
    guard = guards()
    guard.loss_or_nan(BAD, last=True)
    assert guard.judge(5, end, [[7]]).decision is Decision.SKIP


class Scaler:
    """DeepSpeed's, as far as it is used."""

    def __init__(self, scale: float, hysteresis: int) -> None:
        self.dynamic = True
        self.cur_scale, self.min_scale = scale, 1.0
        self.delayed_shift, self.cur_hysteresis = 2, hysteresis
        self.last_overflow_iter = -1
        self.raise_error_at_min_scale = True

    def update_scale(self, overflow: bool) -> None:
        """Without a window."""
        self.cur_scale *= 0.5 if overflow else 2.0


def test_the_loss_scale_rises_behind_the_update_whose_gradient_has_the_old_one() -> None:
    """DeepSpeed divides the gradient after it has counted the step, by the scale that is there then."""
    scaler = Scaler(8.0, 1)
    scale, seen = LossScale(scaler), []
    for overflow in (False, True, False):
        scale.remember()
        scaler.update_scale(overflow)
        seen.append(scaler.cur_scale)
        scale.rise()
        seen.append(scaler.cur_scale)
    assert seen == [8.0, 16.0, 8.0, 8.0, 8.0, 16.0]
    scale.put_back()
    assert scaler.cur_scale == 8.0


def test_the_loss_scale_is_put_back_where_a_sample_was_to_blame() -> None:
    scaler = Scaler(64.0, 1)
    scale = LossScale(scaler)
    assert scaler.raise_error_at_min_scale is False
    assert scale.remember() is False
    scaler.cur_scale, scaler.last_overflow_iter = 32.0, 9
    scale.put_back()
    assert (scaler.cur_scale, scaler.last_overflow_iter) == (64.0, -1)
    assert LossScale(Scaler(1.0, 1)).remember() is True
    assert LossScale(Scaler(1.0, 2)).remember() is False
    for nothing in (None, object()):
        assert LossScale(nothing).remember() is False
        LossScale(nothing).rise()
        LossScale(nothing).put_back()


NOISE = [3.0 + 0.01 * (i % 7) for i in range(20)]
"""Median 3.03, deviation 0.0297 (under 1 % of the median): with factor 10, the limit is 3.333."""


def test_a_spike_is_measured_against_median_and_deviation() -> None:
    watch = SpikeDetector(TrainConfig(spike_window=20), list(NOISE))
    assert watch.limit() == pytest.approx(3.03 + 10 * 0.0303, rel=1e-6)
    # Odd steps in the window, few as they are, move it little.
    odd = SpikeDetector(TrainConfig(spike_window=20), [*NOISE[:17], 90.0, 80.0, 70.0])
    assert odd.limit() < 3.6
    wide = SpikeDetector(TrainConfig(spike_window=20), [3.0, 4.0] * 10)
    assert wide.limit() == pytest.approx(3.5 + 10 * 1.4826 * 0.5)
    assert SpikeDetector(TrainConfig(spike_window=21), list(NOISE)).limit() == math.inf
    assert SpikeDetector(TrainConfig(spike_window=20, spike_action="off"), list(NOISE)).limit() == math.inf


def test_the_window_moves_with_the_run_and_is_empty_after_a_ramp() -> None:
    losses = list(NOISE)
    watch = SpikeDetector(TrainConfig(spike_window=20), losses)
    watch.add(2.5)
    assert losses == [*NOISE[1:], 2.5]
    guard = guards(losses, spike_window=20)
    guard.reset_spikes_on_ramp({"nar": 0.5}, {"nar": 0.5})
    assert len(losses) == 20
    guard.reset_spikes_on_ramp({"nar": 0.75}, {"nar": 0.5})
    assert losses == []


def step(guard: StepGuard, loss: float, number: int = 0) -> Verdict:
    """Two micro-batches, the first with most of the loss."""
    guard.loss_or_nan(torch.tensor(0.75 * loss), last=False)
    vetoed = guard.loss_or_nan(torch.tensor(0.25 * loss), last=True)
    return guard.judge(number, LEFT_OUT if vetoed.isnan() else DONE, [[11, 12], [21, 22]])


def test_a_spike_is_only_told_or_skipped_or_the_end(caplog: pytest.LogCaptureFixture) -> None:
    losses = list(NOISE)
    guard = guards(losses, spike_window=20)
    verdict = step(guard, 3.4, 30)
    assert (verdict.decision, verdict.spike) == (Decision.PROCEED, True)
    assert (
        "step 31: the loss 3.4 is a spike: the median of the last 20 is 3.03, the limit 3.333" in caplog.text
    )
    assert losses[-1] == pytest.approx(3.4)
    assert not step(guard, 3.3).spike

    losses = list(NOISE)
    guard = guards(losses, spike_window=20, spike_action="skip")
    verdict = step(guard, 3.4, 30)
    assert (verdict.decision, verdict.cause) == (Decision.SKIP, SkipCause.SPIKE)
    assert verdict.reason.endswith("the limit 3.333; most of it comes from rank 0")
    assert verdict.sample_ids == [11, 12]
    assert losses == NOISE
    assert step(guard, 3.1).decision is Decision.PROCEED
    # What does not come down again is no spike: the run ends.
    assert [step(guard, 3.5).decision for _ in range(3)] == [Decision.SKIP, Decision.SKIP, Decision.ABORT]

    guard = guards(list(NOISE), spike_window=20, spike_action="stop")
    verdict = step(guard, 3.4, 30)
    assert verdict.decision is Decision.ABORT
    error = guard.error(30, verdict, LEFT_OUT)
    assert error.what.startswith("a step was skipped: the loss 3.4 is a spike")
    assert error.where == "step 31, samples [11, 12]"
    assert "train.spike_action=warn" in error.fix
    assert error.fix.endswith("optim.warmup_steps take a new run (--init with this one, another --output)")


@pytest.mark.usefixtures("handlers_put_back")
def test_signals_are_remembered_not_obeyed_at_once() -> None:
    signals = StopSignals()
    signals.install()
    guard = StepGuard(ALONE, TrainConfig(), signals, [])
    assert guard.before_step() is Decision.PROCEED
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert guard.before_step() is Decision.STOP_SAVE
    assert signals.name == "SIGUSR1"
