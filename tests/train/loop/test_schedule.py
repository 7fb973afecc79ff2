"""The three schedules at their corners."""

from __future__ import annotations

import pytest

from janus_ds.config.schema import OptimConfig
from janus_ds.train.loop.trainer import learning_rate

SCHEDULES = ("inverse_sqrt", "polynomial", "constant")


def config(schedule: str, **changes: float) -> OptimConfig:
    values = {"lr": 1e-3, "warmup_steps": 100, "warmup_init_lr": 1e-7, **changes}
    return OptimConfig(schedule=schedule, **values)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_from_the_first_rate_to_the_peak(schedule: str) -> None:
    optim = config(schedule)
    assert learning_rate(optim, 1000, 0) == 1e-7
    assert learning_rate(optim, 1000, 50) == pytest.approx((1e-7 + 1e-3) / 2)
    assert learning_rate(optim, 1000, 100) == pytest.approx(1e-3)


def test_inverse_sqrt_halves_when_the_step_is_four_times_the_warm_up() -> None:
    assert learning_rate(config("inverse_sqrt"), 1000, 400) == pytest.approx(5e-4)
    assert learning_rate(config("inverse_sqrt"), 10, 900) == pytest.approx(1e-3 / 3)


def test_polynomial_reaches_zero_at_the_last_step_and_stays() -> None:
    optim = config("polynomial")
    assert learning_rate(optim, 1100, 600) == pytest.approx(5e-4)
    assert learning_rate(optim, 1100, 1099) == pytest.approx(1e-6)
    assert learning_rate(optim, 1100, 1100) == 0.0
    assert learning_rate(optim, 1100, 1200) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_warm_up_starts_at_the_peak(schedule: str) -> None:
    assert learning_rate(config(schedule, warmup_steps=0), 100, 0) == pytest.approx(1e-3)


def test_constant_stays() -> None:
    assert learning_rate(config("constant"), 1000, 999) == 1e-3
