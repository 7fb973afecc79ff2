"""Skipping, giving up and stopping, as one process sees them (several: tests/distributed)."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from janus_ds.errors import TrainingError
from janus_ds.parallel.topology import Topology
from janus_ds.train.guards import Decision, Guards
from janus_ds.train.signals import StopSignals

ALONE = Topology(torch.device("cpu"))
GOOD, BAD = torch.tensor(1.5), torch.tensor(float("inf"))


def guards(max_bad_steps: int = 3) -> Guards:
    return Guards(ALONE, max_bad_steps, StopSignals())


def test_a_good_step_passes_unchanged() -> None:
    guard = guards()
    assert guard.veto(GOOD, last=False).item() == 1.5
    assert guard.veto(GOOD, last=True).item() == 1.5
    assert guard.judge(0, True, [[1], [2]]).decision is Decision.PROCEED


def test_a_bad_micro_batch_spoils_the_last_one_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    guard = guards()
    assert guard.veto(BAD, last=False).isinf()
    assert guard.veto(GOOD, last=True).isnan()
    verdict = guard.judge(4, False, [[11, 12], [21, 22]])
    assert verdict.decision is Decision.SKIP
    assert verdict.sample_ids == [11, 12]
    assert "step 4 skipped on all ranks: the loss is not finite on rank 0; samples [11, 12]" in caplog.text
    assert guard.veto(GOOD, last=True).item() == 1.5


def test_a_streak_ends_the_run_and_a_good_step_ends_the_streak() -> None:
    guard = guards(max_bad_steps=2)
    decisions = []
    for loss in (BAD, GOOD, BAD, BAD):
        guard.veto(loss, last=True)
        verdict = guard.judge(0, bool(torch.isfinite(loss)), [[7]])
        decisions.append(verdict.decision)
    assert decisions == [Decision.SKIP, Decision.PROCEED, Decision.SKIP, Decision.ABORT]
    error = guard.error(9, verdict)
    assert isinstance(error, TrainingError)
    assert "2 steps in a row" in error.what
    assert "step 9, samples [7]" in error.where


def test_fp16_may_search_its_scale_for_longer() -> None:
    guard = guards(max_bad_steps=2)
    decisions = []
    for _ in range(42):
        guard.veto(GOOD, last=True)
        decisions.append(guard.judge(0, False, [[7]]).decision)
    assert decisions[:41] == [Decision.SKIP] * 41
    assert decisions[41] is Decision.ABORT


def test_signals_are_remembered_not_obeyed_at_once() -> None:
    signals = StopSignals()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        signals.install()
        guard = Guards(ALONE, 3, signals)
        assert guard.before_step() is Decision.PROCEED
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert guard.before_step() is Decision.STOP_SAVE
        assert signals.name == "SIGUSR1"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
