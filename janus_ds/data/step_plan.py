"""Which samples one data-parallel rank reads in which step, for both ways of counting a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from janus_ds.data.batch_maker import BatchMaker
from janus_ds.data.schedule import SampleSchedule, rank_positions
from janus_ds.data.token_schedule import SampleCosts, TokenSchedule, expected_rows, share_out
from janus_ds.errors import ConfigError

__all__ = ["RankShare", "StepPlan", "make_step_plan", "sample_costs"]

Ints = NDArray[Any]


@dataclass(frozen=True)
class RankShare:
    """Which part of each global batch a data-parallel rank takes."""

    rank: int
    size: int
    micro_batch: int
    """Samples of one micro-batch on one rank; with batches of tokens, of a validation batch."""
    accumulation: int = 1
    """Micro-batches of a step on one rank; used with batches of tokens only."""


class StepPlan(Protocol):
    """A pure function of the step number."""

    def parts(self, step: int) -> list[tuple[Ints, Ints]]:
        """This rank's micro-batches: (epochs, sample ids) of each, int64."""

    @property
    def steps_per_epoch(self) -> float:
        """Updates an epoch."""


def make_step_plan(maker: BatchMaker, share: RankShare) -> StepPlan:
    """The plan that the run's `data.batch` asks for.

    Raises:
        ConfigError: batch sizes that contradict each other; DataError: a split without samples.
    """
    return _TokenPlan(maker, share) if maker.config.data.batch == "tokens" else _SamplePlan(maker, share)


def sample_costs(maker: BatchMaker) -> SampleCosts:
    """Lengths of all samples, from the offsets on disk, and what they cost under the run's objective.

    Raises:
        DataError: damaged data.
    """
    lengths = maker.source.lengths()
    inner_N = lengths["target"]
    source_N = lengths.get("source", inner_N) + 2
    kinds, config = maker.kinds, maker.config
    rows_N = expected_rows(inner_N, kinds.ar + kinds.ar_query, kinds.nar, kinds.aux, config.masking)
    width_N = np.maximum(source_N, inner_N + 2) if config.train.batch_cost == "tokens" else rows_N
    multiple = config.data.pad_multiple
    return SampleCosts(inner_N + 2, source_N, width_N.astype(np.float64), rows_N + source_N, multiple)


class _SamplePlan:
    """Equally many samples a step."""

    def __init__(self, maker: BatchMaker, share: RankShare) -> None:
        config = maker.config
        batch = config.train.global_batch
        self._schedule = SampleSchedule(
            config.train.seed, maker.source.member_sizes, config.data.shuffle_window, batch
        )
        self._positions = rank_positions(batch, share.rank, share.size, share.micro_batch)
        self.steps_per_epoch = maker.source.samples / batch

    def parts(self, step: int) -> list[tuple[Ints, Ints]]:
        epochs, ids = self._schedule.ids(step)
        return [(epochs[positions], ids[positions]) for positions in self._positions]


class _TokenPlan:
    """About equally many tokens a step."""

    def __init__(self, maker: BatchMaker, share: RankShare) -> None:
        config = maker.config
        train = config.train
        self._costs = sample_costs(maker)
        self._schedule = TokenSchedule(
            train.seed,
            maker.source.member_sizes,
            self._costs,
            config.data.shuffle_window,
            train.batch_tokens / train.batch_groups,
            train.batch_groups,
        )
        self._share = share
        self._parts = share.size * share.accumulation
        self.steps_per_epoch = self._schedule.steps_per_epoch
        if self._schedule.smallest_step < self._parts:
            raise ConfigError(
                f"the smallest batch has {self._schedule.smallest_step} samples, for {share.size} ranks x "
                f"{share.accumulation} micro-batches",
                f"train.batch_tokens = {train.batch_tokens}, gradient_accumulation_steps",
                "raise train.batch_tokens, or use fewer ranks or micro-batches",
            )

    def parts(self, step: int) -> list[tuple[Ints, Ints]]:
        parts = share_out(self._schedule.groups(step), self._costs, self._parts)
        return parts[self._share.rank :: self._share.size]
