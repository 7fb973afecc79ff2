"""Steps that did not count, one after the other: when a run gives up, and what it says then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum

from janus_ds.config.schema import TrainConfig
from janus_ds.errors import TrainingError

__all__ = ["Decision", "SkipCause", "Streaks", "Verdict", "names_of_ranks", "shown_samples"]

_SHOWN_SAMPLES = 16
_LOOK = "look at these samples (`python -m janus_ds inspect DATA --sample N`)"
_FROM_CHECKPOINT = "the same command goes on from the last checkpoint, which is whole"


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
    """The same in fp16: the loss scale was too high. No fault, as long as it comes down."""


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


class Streaks:
    """Counts steps without an update, in a row and by what caused them.

    Args:
        train: how many of each a run bears.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._faults = 0
        self._overflows = 0

    def end(self) -> None:
        """A step has counted."""
        self._faults = self._overflows = 0

    def add(self, cause: SkipCause, exhausted: bool, stop_at_spike: bool = False) -> Decision:
        """One more step without an update.

        Args:
            cause: why.
            exhausted: fp16's loss scale cannot come down any further.
            stop_at_spike: a single spike is enough.
        """
        if cause is SkipCause.OVERFLOW:
            self._overflows += 1
            give_up = exhausted or self._overflows >= self._train.max_overflows
        else:
            self._faults += 1
            give_up = self._faults >= self._train.max_bad_steps
            give_up = give_up or (cause is SkipCause.SPIKE and stop_at_spike)
        return Decision.ABORT if give_up else Decision.SKIP

    def error(self, step: int, verdict: Verdict, loss_scale: float) -> TrainingError:
        """The error that ends a run after too many of them; `loss_scale` is that of the last one."""
        if verdict.cause is SkipCause.OVERFLOW:
            return self._overflow_error(step, loss_scale)
        samples = f", samples {shown_samples(verdict.sample_ids)}" if verdict.sample_ids else ""
        steps = f"{self._faults} steps in a row were" if self._faults > 1 else "a step was"
        if verdict.cause is SkipCause.SPIKE:
            fix = (
                f"{_LOOK} and at the losses before them; lower optim.lr or raise optim.warmup_steps, or let "
                "such steps pass with train.spike_action=warn or a higher train.spike_factor; "
                f"{_FROM_CHECKPOINT}"
            )
        else:
            fix = (
                f"{_LOOK}, lower optim.lr or raise optim.warmup_steps; with fp16, use bf16 instead; "
                f"{_FROM_CHECKPOINT}"
            )
        return TrainingError(f"{steps} skipped: {verdict.reason}", f"step {step}{samples}", fix)

    def _overflow_error(self, step: int, loss_scale: float) -> TrainingError:
        if self._overflows < self._train.max_overflows:
            what = "the loss scale of fp16 cannot come down any further, and gradients still overflow"
            scale = "give a lower fp16.min_loss_scale"
        else:
            what = f"fp16 gradients have overflowed in {self._overflows} steps in a row (train.max_overflows)"
            scale = "let the scale find its place (fp16.loss_scale 0)"
        return TrainingError(
            what,
            f"step {step}, loss scale {loss_scale:g}, {self._overflows} overflows in a row",
            "use bf16 (ds_configs/zero2_bf16.json), which has the range of fp32 and needs no loss scale; or "
            f"lower optim.lr, raise optim.warmup_steps, or {scale}; {_FROM_CHECKPOINT}",
        )


def shown_samples(ids: Sequence[int]) -> str:
    """Not more of them than one can look at; metrics.jsonl has all."""
    more = f" and {len(ids) - _SHOWN_SAMPLES} more" if len(ids) > _SHOWN_SAMPLES else ""
    return f"{list(ids[:_SHOWN_SAMPLES])}{more}"


def names_of_ranks(found: Mapping[int, object]) -> str:
    """ "rank 1" or "ranks 0, 3"."""
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(map(str, sorted(found)))}"
