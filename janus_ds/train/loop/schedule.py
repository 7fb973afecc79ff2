"""The learning rate as a pure function of the step.

Nothing is counted or kept: a run that resumes at step s asks for the rate of step s and gets what
the unbroken run got, and a step that the guards skipped shifts nothing.
"""

from __future__ import annotations

import math

from janus_ds.config.schema import OptimConfig
from janus_ds.errors import ConfigError

__all__ = ["SCHEDULES", "learning_rate"]

SCHEDULES = ("inverse_sqrt", "polynomial", "constant")


def learning_rate(config: OptimConfig, max_steps: int, step: int) -> float:
    """The rate of update `step`, counted from 0.

    All schedules rise linearly from `warmup_init_lr` at step 0 to `lr` at `warmup_steps`. Then
    `inverse_sqrt` gives lr * sqrt(warmup / step), as the NMT runs of the paper have it, `polynomial`
    falls linearly to zero at `max_steps`, as its pretraining has it, and `constant` stays.

    Raises:
        ConfigError: the schedule has no such name.
    """
    if config.schedule not in SCHEDULES:
        raise ConfigError(
            f"there is no learning-rate schedule {config.schedule!r}",
            "optim.schedule",
            f"use one of {', '.join(SCHEDULES)}",
        )
    warmup = config.warmup_steps
    if step < warmup:
        return config.warmup_init_lr + (config.lr - config.warmup_init_lr) * step / warmup
    if config.schedule == "inverse_sqrt":
        return config.lr * math.sqrt(max(warmup, 1) / max(step, 1))
    if config.schedule == "polynomial":
        return config.lr * max(max_steps - step, 0) / max(max_steps - warmup, 1)
    return config.lr
