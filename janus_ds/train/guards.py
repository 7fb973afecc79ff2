"""What stops or skips a step, decided by all ranks together.

A rank that decides alone leaves the others waiting in a collective for ever. So a loss that is not
finite on one rank makes every rank drop the step's gradients, and a signal that reached one rank
makes all of them save and leave at the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from janus_ds.errors import JanusError, TrainingError
from janus_ds.parallel.topology import Topology
from janus_ds.train.signals import StopSignals

__all__ = ["Decision", "Guards", "Verdict", "together"]

_SCALE_SEARCH_STEPS = 40
"""Steps in a row that fp16 may skip while its dynamic loss scale comes down from at most 2^32."""

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class Decision(IntEnum):
    """What all ranks do with a step; the largest of the ranks' wishes holds."""

    PROCEED = 0
    SKIP = 1
    STOP_SAVE = 2
    ABORT = 3


@dataclass(frozen=True)
class Verdict:
    """What became of a step's update."""

    decision: Decision
    reason: str = ""
    sample_ids: list[int] = field(default_factory=list)
    """Samples whose loss was not finite, over all ranks; empty where only gradients overflowed."""


class Guards:
    """Watches the losses of a step's micro-batches and the update that comes of them.

    Args:
        topology: the ranks that agree.
        max_bad_steps: bad steps in a row before the run gives up.
        signals: whether this process was asked to stop.
    """

    def __init__(self, topology: Topology, max_bad_steps: int, signals: StopSignals) -> None:
        self._topology = topology
        self._max_bad_steps = max_bad_steps
        self._signals = signals
        self._bad: list[Tensor] = []
        self._bad_steps = 0
        self._overflows = 0

    def before_step(self, fault: JanusError | None = None) -> Decision:
        """STOP_SAVE if any rank was asked to stop.

        Args:
            fault: what this rank's data ended with instead of a batch.

        Raises:
            JanusError: on all ranks, the fault of the first rank that has one.
        """
        wish = Decision.STOP_SAVE if self._signals.name else Decision.PROCEED
        decision = Decision(self._topology.agree(Decision.ABORT if fault else wish))
        if decision is Decision.ABORT:
            raise next(found for found in self._topology.gather_objects(fault) if found)
        return decision

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop. Collective: for the middle of long work, such as validation."""
        return bool(self._topology.agree(int(self._signals.name is not None)))

    def veto(self, loss: Tensor, *, last: bool) -> Tensor:
        """The loss to go backward from: itself, or NaN where the step must not count.

        With the last micro-batch, all ranks agree whether any of them saw a loss that is not
        finite. If so, this micro-batch's gradients become NaN, DeepSpeed finds the norm of the
        step not finite on all ranks, and drops what has been accumulated in any ZeRO stage and
        precision. The agreement stays on the device: no step waits for the host.
        """
        self._bad.append(~torch.isfinite(loss.detach()))
        if not last:
            return loss
        bad = torch.stack(self._bad).any().to(torch.int32)
        if self._topology.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        return loss * torch.where(bad > 0, torch.nan, 1.0)

    def judge(self, step: int, applied: bool, sample_ids: Sequence[Sequence[int]]) -> Verdict:
        """After the update: whether the step counted, was skipped, or was one too many.

        Args:
            step: number of the step, from 0.
            applied: whether the weights changed; the same on all ranks.
            sample_ids: samples of this rank's micro-batches.
        """
        bad, self._bad = self._bad, []
        if applied:
            self._bad_steps = self._overflows = 0
            return Verdict(Decision.PROCEED)
        own = [(i, int(id)) for i, ids in enumerate(sample_ids) for id in ids if bool(bad[i])]
        gathered = self._topology.gather_objects([id for _, id in own])
        ranks = [rank for rank, ids in enumerate(gathered) if ids]
        ids = sorted({id for found in gathered for id in found})
        if ids:
            self._bad_steps += 1
            reason = f"the loss is not finite on rank {', '.join(map(str, ranks))}"
        else:
            self._overflows += 1
            reason = "the gradient is not finite"
        logger.warning("step %d skipped on all ranks: %s; samples %s", step, reason, ids or "not known")
        give_up = self._bad_steps >= self._max_bad_steps or self._overflows >= self._overflow_limit
        return Verdict(Decision.ABORT if give_up else Decision.SKIP, reason, ids)

    def error(self, step: int, verdict: Verdict) -> TrainingError:
        """The error that ends a run after too many bad steps."""
        count = max(self._bad_steps, self._overflows)
        samples = f", samples {verdict.sample_ids[:16]}" if verdict.sample_ids else ""
        return TrainingError(
            f"{count} steps in a row were skipped: {verdict.reason}",
            f"step {step}{samples}",
            "look at these samples (`python -m janus_ds inspect`), lower optim.lr or raise "
            "optim.warmup_steps; with fp16, use bf16 instead. The last checkpoint is whole",
        )

    @property
    def _overflow_limit(self) -> int:
        return self._max_bad_steps + _SCALE_SEARCH_STEPS


def together(topology: Topology, action: Callable[[], Result]) -> Result:
    """The result of `action`, which holds no collective, or one rank's user fault on all ranks.

    Raises:
        JanusError: what the first rank with a fault raised.
    """
    result, fault = None, None
    try:
        result = action()
    except JanusError as error:
        fault = error
    if topology.agree(int(fault is not None)):
        raise next(found for found in topology.gather_objects(fault) if found)
    return result  # type: ignore[return-value]
