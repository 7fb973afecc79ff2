"""The three schedules at their corners."""

from __future__ import annotations

import pytest

from janus_ds.config.schema import OptimConfig
from janus_ds.train.trainer import learning_rate


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        # A linear rise to the peak at the end of the warm-up, then step -> rate of 1,100 steps.
        ("inverse_sqrt", 100, {400: 5e-4, 900: 1e-3 / 3}),
        ("polynomial", 100, {600: 5e-4, 1099: 1e-6, 1100: 0.0, 1200: 0.0}),
        ("constant", 100, {999: 1e-3}),
        ("inverse_sqrt", 0, {0: 1e-3}),
        ("polynomial", 0, {0: 1e-3}),
        ("constant", 0, {0: 1e-3}),
    ],
)
def test_rates(schedule: str, warmup: int, rates: dict[int, float]) -> None:
    optim = OptimConfig(schedule=schedule, lr=1e-3, warmup_steps=warmup, warmup_init_lr=1e-7)
    rise = {0: 1e-7, 50: (1e-7 + 1e-3) / 2, 100: 1e-3} if warmup else {}
    for step, rate in (rise | rates).items():
        assert learning_rate(optim, 1100, step) == pytest.approx(rate), step
