"""Which samples one data-parallel rank reads in which step, for both ways of counting a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_ds.config.schema import DataConfig, RunConfig
from janus_ds.data.masking.counter_rng import Stream, keys, shuffled
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import CYCLE, SOURCE_BITS, SampleSchedule, ShardGroups
from janus_ds.data.stream.source import Source
from janus_ds.data.stream.token_schedule import SampleCosts, TokenSchedule, expected_rows, share_out
from janus_ds.errors import ConfigError

Ints = NDArray[Any]

_SEED_STEP = 1_000_003


@dataclass(frozen=True)
class RankShare:
    """Which part of each global batch a data-parallel rank takes."""

    rank: int
    size: int
    micro_batch: int
    """Samples of one micro-batch on one rank; with batches of tokens, of a validation batch."""
    accumulation: int = 1
    """Micro-batches of a step on one rank; used with batches of tokens only."""


def make_step_plan(maker: BatchMaker, share: RankShare) -> _SamplePlan | _TokenPlan:
    """A pure function of the step number, as the run's `data.batch` asks for."""
    return _TokenPlan(maker, share) if maker.config.data.batch == "tokens" else _SamplePlan(maker, share)


def sample_costs(maker: BatchMaker) -> SampleCosts:
    """Lengths of all samples, from the offsets on disk, and what they cost under the run's objective."""
    # Several sources are refused with batches of tokens (`config.rules`).
    lengths = maker.source.parts[0].lengths()
    inner_N = lengths["target"]
    source_N = lengths.get("source", inner_N) + 2
    kinds, config = maker.kinds, maker.config
    rows_N = expected_rows(inner_N, kinds.ar + kinds.ar_query, kinds.nar, kinds.aux, config.masking)
    rows_N *= config.objective.dropout_draws
    width_N = np.maximum(source_N, inner_N + 2)
    multiple = config.data.pad_multiple
    return SampleCosts(inner_N + 2, source_N, width_N.astype(np.float64), rows_N + source_N, multiple)


class _SamplePlan:
    """Equally many samples a step, of one or several sources."""

    def __init__(self, maker: BatchMaker, share: RankShare) -> None:
        config, self._sources = maker.config, maker.source.parts
        self._seed, self._batch = config.train.seed, config.train.global_batch
        self._ahead = config.data.read_ahead
        for part in self._sources:
            _check_cache(part, config.data, len(self._sources))
        self._orders = [_order(part, config, n) for n, part in enumerate(self._sources)]
        self._turns = maker.source.turns
        # Micro-batch k of all ranks together is the k-th run of micro_batch * size places of the batch.
        places = np.arange(self._batch).reshape(-1, share.size, share.micro_batch)
        self._positions = places[:, share.rank]

    @property
    def steps_per_epoch(self) -> float:
        """Updates until the source that lasts longest has been seen whole."""
        shares = [places / CYCLE for places in self._turns.places]
        return max(o.samples / (s * self._batch) for o, s in zip(self._orders, shares, strict=True))

    def parts(self, step: int) -> list[tuple[Ints, Ints]]:
        """This rank's micro-batches: (epochs, sample ids) of each, int64."""
        epochs, ids = self._global_batch(step)
        return [(epochs[positions], ids[positions]) for positions in self._positions]

    def read_ahead(self, step: int) -> None:
        """Let distant shards that the step and the next ones need come."""
        for number, (source, order) in enumerate(zip(self._sources, self._orders, strict=True)):
            position = self._turns.draws(number, step * self._batch)
            source.read_ahead(order.members_from(position), self._ahead)

    def _global_batch(self, step: int) -> tuple[Ints, Ints]:
        """(epochs of each one's source, sample numbers) of all ranks."""
        if len(self._orders) == 1:
            return self._orders[0].ids(step)
        start, stop = step * self._batch, (step + 1) * self._batch
        sources = self._turns.of(start, stop)
        epochs, ids = np.zeros_like(sources), np.zeros_like(sources)
        for source, order in enumerate(self._orders):
            first, last = (self._turns.draws(source, position) for position in (start, stop))
            places = sources == source
            own_epochs, own_ids = order.between(first, last)
            epochs[places], ids[places] = own_epochs, own_ids + (source << SOURCE_BITS)
        # Mixed, or a rank could meet one source alone.
        mixed = shuffled(keys(self._seed, 0, step, Stream.MIXED_ORDER), self._batch)
        return epochs[mixed], ids[mixed]


def _order(source: Source, config: RunConfig, number: int) -> SampleSchedule:
    """The order of one source; equal sources of a mixture get different ones."""
    together = config.data.shuffle_shards
    return SampleSchedule(
        config.train.seed + number * _SEED_STEP,
        source.member_sizes,
        config.data.shuffle_window,
        config.train.global_batch,
        ShardGroups(source.members_of_shard, together) if together else None,
    )


def _check_cache(source: Source, data: DataConfig, sources: int) -> None:
    """Refuse an order that would fetch each shard again and again.

    Raises:
        ConfigError: what is needed at about the same time does not fit into the cache.
    """
    if source.shards is None:
        return
    sizes = sorted((shard.size for shard in source.index.shards), reverse=True)
    # A window can lie in two groups, and another worker can be a group ahead.
    together = 2 * data.shuffle_shards + data.read_ahead if data.shuffle_shards else len(sizes)
    needed, room = sum(sizes[:together]), source.shards.cache.limit // sources
    if needed > room:
        raise ConfigError(
            f"{needed / 1e9:.3g} GB of shards are needed at about the same time, and the cache has "
            f"{room / 1e9:.3g} GB for them",
            f"data.cache_gb, {source.name}",
            "raise data.cache_gb, or lower data.shuffle_shards (0 mixes over all shards)",
        )


class _TokenPlan:
    """About equally many tokens a step."""

    def __init__(self, maker: BatchMaker, share: RankShare) -> None:
        config = maker.config
        train = config.train
        source = maker.source.parts[0]
        _check_cache(source, config.data, 1)
        self._costs = sample_costs(maker)
        self._schedule = TokenSchedule(
            train.seed,
            source.member_sizes,
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
        """This rank's micro-batches: (epochs, sample ids) of each, int64."""
        parts = share_out(self._schedule.groups(step), self._costs, self._parts)
        return parts[self._share.rank :: self._share.size]

    def read_ahead(self, step: int) -> None:
        """Nothing: the lengths have brought all shards."""
