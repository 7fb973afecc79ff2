"""Losses and gradients that are not finite, put into chosen passes, and what came of each step."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from janus_ds.parallel.topology import Topology
from janus_ds.train.engine import TrainingStep, Update
from janus_ds.train.guards import StepGuard, Verdict


@contextmanager
def bad_passes(faults: dict[int, str], topology: Topology, rank: int | None) -> Iterator[None]:
    """Spoil training forwards, or what their backward gives, on one rank or (None) on all.

    Args:
        faults: forward, counted from 0 -> "nan" or "inf" (the loss), "stop" (SIGTERM to this process),
            "gradient" (all of a finite loss's gradient), "weight" (the gradient of one matrix alone),
            "replicated" (of one parameter that tensor-parallel ranks have alike) or "xN" (the loss is N
            times as large).
    """
    original, count, hooks = TrainingStep.forward, 0, []  # type: ignore[var-annotated]

    def forward(self: TrainingStep, *arguments: Any) -> Any:
        nonlocal count
        while hooks:
            hooks.pop().remove()
        total, terms = original(self, *arguments)
        if self.training and rank in (None, topology.rank):
            fault, count = faults.get(count), count + 1
            if fault in ("nan", "inf"):
                total = total + torch.tensor(float(fault))
            elif fault == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            elif fault == "gradient":
                total.register_hook(lambda gradient: gradient * math.inf)
            elif fault in ("weight", "replicated"):
                hooks.append(_encoder_weight(self, fault == "weight").register_hook(_spoiled))
            elif fault is not None:
                total = total * float(fault[1:])
        return total, terms

    TrainingStep.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        TrainingStep.forward = original  # type: ignore[method-assign]


def _encoder_weight(step: TrainingStep, sharded: bool) -> Tensor:
    """A parameter of the encoder that tensor-parallel ranks share, or have alike; any for one rank."""
    found = [weight for name, weight in step.named_parameters() if "encoder" in name]
    fitting = [weight for weight in found if getattr(weight, "tensor_model_parallel", False) == sharded]
    return (fitting or found)[0]


def _spoiled(gradient: Tensor) -> Tensor:
    spoiled = gradient.clone()
    spoiled.view(-1)[-1] = math.nan
    return spoiled


@dataclass
class Watched:
    """What this rank was told of each step, and the samples it trained on."""

    verdicts: dict[int, Verdict] = field(default_factory=dict)
    ids: dict[int, list[list[int]]] = field(default_factory=dict)


@contextmanager
def watched_steps() -> Iterator[Watched]:
    """Notes each step's verdict."""
    watched, original = Watched(), StepGuard.judge

    def judge(self: StepGuard, step: int, update: Update, sample_ids: Any) -> Verdict:
        verdict = original(self, step, update, sample_ids)
        watched.verdicts[step] = verdict
        watched.ids[step] = [list(ids) for ids in sample_ids]
        return verdict

    StepGuard.judge = judge  # type: ignore[method-assign]
    try:
        yield watched
    finally:
        StepGuard.judge = original  # type: ignore[method-assign]
