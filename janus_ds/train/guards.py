"""Collective decision to apply, skip or abort an update: where it is decided that a step does not count.

All ranks decide together, since a rank that decides alone leaves the others waiting in a collective.
The guard works in three phases:

- observe: the losses and gradients of this rank's micro-batches (`loss_or_nan`, `after_backward`). If any
  rank saw a loss that is not finite, `loss_or_nan` turns the last micro-batch's loss into NaN on all ranks,
  so that the accumulated gradient is dropped: by DeepSpeed under ZeRO, else by the engine;
- decide: whether the step counted, was skipped, or was one skip too many (`judge`);
- explain: the cause, the samples to blame, and the error that ends a run (`error`).
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum

import torch
import torch.distributed as dist
from torch import Tensor

from janus_ds.config.schema import TrainConfig
from janus_ds.errors import JanusError, TrainingError
from janus_ds.parallel.topology import Topology
from janus_ds.train.engine import Update
from janus_ds.train.signals import StopSignals

_SHOWN_SAMPLES = 16
_LOOK = "look at these samples (`janus-ds inspect DATA --sample N`)"
_AFTERWARDS = (
    "the same command goes on from the last checkpoint, which is whole; a lower optim.lr or more "
    "optim.warmup_steps take a new run (--init with this one, another --output)"
)
_NORMAL = 1.4826
"""Median absolute deviation -> standard deviation, for normal noise."""
_LEAST_SHARE = 0.01
"""Least deviation that spikes are measured by, as a share of the median."""

logger = logging.getLogger(__name__)


class Decision(IntEnum):
    """What all ranks do with a step; the largest of the ranks' wishes holds."""

    PROCEED = 0
    SKIP = 1
    STOP_SAVE = 2
    ABORT = 3


class SkipCause(Enum):
    """Why the update of a step was left out."""

    LOSS = "loss"
    """A loss is not finite."""
    SPIKE = "spike"
    """The loss is finite and far above those before it."""
    GRADIENT = "gradient"
    """Losses are finite and the gradient is not, without a loss scale that could explain it."""
    OVERFLOW = "overflow"
    """The same in fp16: the loss scale was too high. No fault, as long as the scale can come down."""


@dataclass(frozen=True)
class Verdict:
    """What became of a step's update."""

    decision: Decision
    reason: str = ""
    sample_ids: list[int] = field(default_factory=list)
    """Samples of the micro-batches that are to blame, over all ranks; empty for an overflow of fp16."""
    cause: SkipCause | None = None
    spike: bool = False
    """The loss was far above those before it; the update may have been made nevertheless."""

    @property
    def keeps_loss_scale(self) -> bool:
        """The loss was made NaN, so that fp16's loss scale must not come down because of it."""
        return self.cause in (SkipCause.LOSS, SkipCause.SPIKE)


class SpikeDetector:
    """Knows from which loss on a step is a spike, from the losses of the run alone.

    A spike is a loss above `median + train.spike_factor x deviation` of the last `train.spike_window`
    losses that counted. The deviation is 1.4826 times the median absolute deviation, which for normal
    noise is its standard deviation and which a few odd steps cannot move, and at least 1 % of the median.

    Args:
        recent: losses that counted, oldest first; updated here, and part of the checkpoint, so that a
            resumed run judges as the unbroken one.
    """

    def __init__(self, train: TrainConfig, recent: list[float]) -> None:
        self.action = train.spike_action
        self._factor = train.spike_factor
        self._window = train.spike_window
        self.recent = recent

    def limit(self) -> float:
        """The largest loss that is no spike; infinite while the window is not full."""
        if self.action == "off" or len(self.recent) < self._window:
            return math.inf
        middle = statistics.median(self.recent)
        spread = _NORMAL * statistics.median(abs(loss - middle) for loss in self.recent)
        return middle + self._factor * max(spread, _LEAST_SHARE * abs(middle))

    def add(self, loss: float) -> None:
        """Take in the loss of a step that counted."""
        if self.action != "off":
            self.recent.append(loss)
            del self.recent[: -self._window]

    def describe(self, loss: float) -> str:
        """A spike in words."""
        return (
            f"the loss {loss:.4g} is a spike: the median of the last {len(self.recent)} is "
            f"{statistics.median(self.recent):.4g}, the limit {self.limit():.4g}"
        )


@dataclass
class _Seen:
    """What one rank observes of a step, as tensors on the device that nobody waits for unless it fails."""

    losses: list[Tensor] = field(default_factory=list)
    """This rank's parts of the step's loss, one a micro-batch."""
    gradients: list[Tensor | None] = field(default_factory=list)
    """The largest number in the table's gradient, one a micro-batch."""
    total: Tensor | None = None
    """The loss of the step, over all ranks."""
    spike: Tensor | None = None


@dataclass(frozen=True)
class _Micro:
    """What a rank tells the others of a micro-batch, if the step did not count."""

    rank: int
    loss: float
    gradient: float | None
    """The largest number in the table's gradient, if there is one."""
    ids: list[int]


class StepGuard:
    """Observes the micro-batches of a step, decides whether its update counts, and explains why not.

    Args:
        train: maximum consecutive skips allowed, by cause, and what to do about spikes.
        recent_losses: see :class:`SpikeDetector`.
    """

    def __init__(
        self, topology: Topology, train: TrainConfig, signals: StopSignals, recent_losses: list[float]
    ) -> None:
        self._topology = topology
        self._train = train
        self._signals = signals
        self._spikes = SpikeDetector(train, recent_losses)
        self._seen = _Seen()
        self._skipped = 0
        self._overflows = 0

    def before_step(self, fault: JanusError | None = None) -> Decision:
        """STOP_SAVE if any rank was asked to stop. Collective.

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

    def reset_spikes_on_ramp(self, now: Mapping[str, float], before: Mapping[str, float]) -> None:
        """Forget what losses were like if the factors of their terms change with this step, as in a ramp."""
        if now != before:
            self._spikes.recent.clear()

    def loss_or_nan(self, loss: Tensor, *, last: bool) -> Tensor:
        """The loss to go backward from, 0-dim: itself, or NaN where the step must not count. Collective.

        With the last micro-batch, all ranks agree whether any of them saw a loss that is not finite,
        and whether the step's loss is a spike that is not to count. The agreement stays on the device:
        no step waits for the host.
        """
        seen = self._seen
        seen.losses.append(loss.detach())
        if not last:
            return loss
        losses = torch.stack(seen.losses).to(torch.float64)
        found = torch.stack([(~torch.isfinite(losses)).sum(), losses.sum()])
        if self._topology.world_size > 1:
            dist.all_reduce(found)
        seen.total = found[1] / self._topology.tensor_size
        refused = found[0] > 0
        limit = self._spikes.limit()
        if math.isfinite(limit):
            seen.spike = seen.total > limit
            if self._spikes.action in ("skip", "stop"):
                refused = refused | seen.spike
        return loss * torch.where(refused, torch.nan, 1.0)

    def after_backward(self, largest: Tensor | None) -> None:
        """Note the largest absolute value in a part of this micro-batch's gradient; None: there is none."""
        self._seen.gradients.append(largest)

    def judge(self, step: int, update: Update, sample_ids: Sequence[Sequence[int]]) -> Verdict:
        """After the update: whether the step counted, was skipped, or was one skip too many. Collective.

        Args:
            update: what the engine did; the same on all ranks.
        """
        seen, self._seen = self._seen, _Seen()
        spike = seen.spike is not None and bool(seen.spike)
        if update.applied:
            self._skipped = self._overflows = 0
            return self._counted(step, seen, spike)
        # Waits for the device.
        own = [
            _Micro(self._topology.rank, float(loss), None if largest is None else float(largest), list(ids))
            for loss, largest, ids in itertools.zip_longest(seen.losses, seen.gradients, sample_ids)
        ]
        micros = [micro for found in self._topology.gather_objects(own) for micro in found]
        cause, reason, ids = self._explain(seen, spike, micros, update)
        if self._topology.is_main:
            samples = f"; samples {_shown(ids)}" if ids else ""
            logger.warning("step %d skipped on all ranks: %s%s", step + 1, reason, samples)
        gives_up = self._count_skip(cause, update)
        return Verdict(Decision.ABORT if gives_up else Decision.SKIP, reason, ids, cause, spike)

    def error(self, step: int, verdict: Verdict, update: Update) -> TrainingError:
        """The error that ends a run after too many skips; `step` from 0, in words from 1 as elsewhere."""
        if verdict.cause is SkipCause.OVERFLOW:
            return self._overflow_error(step, update.loss_scale)
        samples = f", samples {_shown(verdict.sample_ids)}" if verdict.sample_ids else ""
        steps = f"{self._skipped} steps in a row were" if self._skipped > 1 else "a step was"
        if verdict.cause is SkipCause.SPIKE:
            fix = (
                f"{_LOOK} and at the losses before them, or let such steps pass with "
                "train.spike_action=warn or a higher train.spike_factor"
            )
        else:
            fix = f"{_LOOK}; with fp16, use bf16 instead"
        return TrainingError(
            f"{steps} skipped: {verdict.reason}", f"step {step + 1}{samples}", f"{fix}; {_AFTERWARDS}"
        )

    def _counted(self, step: int, seen: _Seen, spike: bool) -> Verdict:
        if self._spikes.action == "off" or seen.total is None:
            return Verdict(Decision.PROCEED)
        # The update has waited for the device already.
        loss = float(seen.total)
        reason = self._spikes.describe(loss) if spike else ""
        if spike and self._topology.is_main:
            logger.warning("step %d: %s; the step counts (train.spike_action)", step + 1, reason)
        self._spikes.add(loss)
        return Verdict(Decision.PROCEED, reason, spike=spike)

    def _count_skip(self, cause: SkipCause, update: Update) -> bool:
        """One more step without an update; whether it is the one too many."""
        if cause is SkipCause.OVERFLOW:
            self._overflows += 1
            return update.exhausted or self._overflows >= self._train.max_overflows
        self._skipped += 1
        stops = cause is SkipCause.SPIKE and self._spikes.action == "stop"
        return stops or self._skipped >= self._train.max_bad_steps

    def _explain(
        self, seen: _Seen, spike: bool, micros: Sequence[_Micro], update: Update
    ) -> tuple[SkipCause, str, list[int]]:
        """Why the step did not count, in words, and which samples are to blame."""
        losses = [micro for micro in micros if not math.isfinite(micro.loss)]
        if losses:
            return SkipCause.LOSS, f"the loss is not finite on {_names_of_ranks(losses)}", _samples(losses)
        if spike and self._spikes.action != "warn" and seen.total is not None:
            worst = max(micros, key=lambda micro: micro.loss)
            reason = f"{self._spikes.describe(float(seen.total))}; most of it comes from rank {worst.rank}"
            return SkipCause.SPIKE, reason, _samples([worst])
        if update.scaled:
            return SkipCause.OVERFLOW, f"fp16 overflow at loss scale {update.loss_scale:g}", []
        gradients = [m for m in micros if m.gradient is not None and not math.isfinite(m.gradient)]
        if gradients:
            reason = f"the gradient is not finite on {_names_of_ranks(gradients)}"
            return SkipCause.GRADIENT, reason, _samples(gradients)
        reason = "the gradient is not finite, and which micro-batch it comes from is not known"
        return SkipCause.GRADIENT, reason, _samples(micros)

    def _overflow_error(self, step: int, loss_scale: float) -> TrainingError:
        if self._overflows < self._train.max_overflows:
            what = "the loss scale of fp16 cannot come down any further, and gradients still overflow"
            scale = "give a lower fp16.min_loss_scale"
        else:
            what = f"fp16 gradients have overflowed in {self._overflows} steps in a row (train.max_overflows)"
            scale = "let the scale find its place (fp16.loss_scale 0)"
        return TrainingError(
            what,
            f"step {step + 1}, loss scale {loss_scale:g}, {self._overflows} overflows in a row",
            "use bf16 (ds_configs/zero2_bf16.json), which has the range of fp32 and needs no loss scale, or "
            f"{scale}; {_AFTERWARDS}",
        )


def _samples(micros: Iterable[_Micro]) -> list[int]:
    return sorted({id for micro in micros for id in micro.ids})


def _shown(ids: Sequence[int]) -> str:
    """Not more of them than one can look at; metrics.jsonl has all."""
    more = f" and {len(ids) - _SHOWN_SAMPLES} more" if len(ids) > _SHOWN_SAMPLES else ""
    return f"{list(ids[:_SHOWN_SAMPLES])}{more}"


def _names_of_ranks(micros: Iterable[_Micro]) -> str:
    """ "rank 1" or "ranks 0, 3"."""
    ranks = sorted({micro.rank for micro in micros})
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
