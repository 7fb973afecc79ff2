"""Several sources as one: whose turn it is at each position, and samples by number.

The order of turns is a cycle of 10,000 positions in which each source has its share of places, spread as
evenly as can be: after any number of positions a source has had its share of them up to less than one
(Tijdeman, "The chairman assignment problem", 1980). Each source walks its own epochs, so the n-th turn of a
source is the n-th sample of its own order, whatever the others do, and the only state is the position.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from janus_ds.data.counter_rng import Stream, keys, shuffled
from janus_ds.data.quarantine import Damage
from janus_ds.data.ragged import Ragged
from janus_ds.data.schedule import SampleSchedule
from janus_ds.data.source import SampleSource
from janus_ds.errors import ConfigError, DataError

__all__ = ["CYCLE", "SOURCE_BITS", "MixedSchedule", "MixedSource", "Turns"]

Ints = NDArray[np.int64]

CYCLE = 10_000
"""Positions after which the order of turns begins anew; weights count to this accuracy."""

SOURCE_BITS = 40
"""A sample's number is SOURCE << 40 | its number in that source."""


class Turns:
    """Which source a position draws from, and its how-many-eth draw that is.

    Args:
        weights: of the sources, above 0.

    Raises:
        ConfigError: a source would have no place in the cycle.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.places = _apportioned(weights)
        if min(self.places) < 1:
            raise ConfigError(
                f"a source has less than one of {CYCLE:,} samples",
                f"weights {', '.join(map(str, weights))}",
                "raise its weight, or leave it out",
            )
        self.cycle: Ints = _assigned(self.places)
        self._before = np.zeros((len(weights), CYCLE + 1), dtype=np.int64)
        for source in range(len(weights)):
            self._before[source, 1:] = np.cumsum(self.cycle == source)

    def draws(self, source: int, position: int) -> int:
        """How many of the first `position` positions draw from a source."""
        cycles, inside = divmod(position, CYCLE)
        return cycles * self.places[source] + int(self._before[source, inside])

    def of(self, start: int, stop: int) -> Ints:
        """The source of each position of [start, stop)."""
        return self.cycle[np.arange(start, stop) % CYCLE]


def _apportioned(weights: Sequence[float]) -> list[int]:
    """Whole places of the cycle by weight: largest remainders."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * CYCLE
    # What is 2,999.9999999 by rounding of decimals is 3,000.
    places = np.floor(exact + 1e-6).astype(np.int64)
    left = CYCLE - int(places.sum())
    places[np.argsort(-(exact - places), kind="stable")[:left]] += 1
    return [int(count) for count in places]


def _assigned(places: Sequence[int]) -> Ints:
    """Tijdeman's order: of those that have waited long enough, the one whose turn ends soonest."""
    count = len(places)
    if count == 1:
        return np.zeros(CYCLE, dtype=np.int64)
    twice = 2 * count - 2
    had = [0] * count
    order = np.zeros(CYCLE, dtype=np.int64)
    for position in range(CYCLE):
        owed = [places[k] * (position + 1) - had[k] * CYCLE for k in range(count)]
        ready = [k for k in range(count) if twice * owed[k] >= CYCLE]
        chosen = min(ready, key=lambda k: ((CYCLE * (twice - 1) - twice * owed[k]) / places[k], k))
        had[chosen] += 1
        order[position] = chosen
    return order


class MixedSchedule:
    """The infinite stream of samples of several sources.

    Args:
        seed: the run's seed.
        orders: of each source by itself.
        turns: whose turn it is.
        global_batch: samples a step.
    """

    def __init__(self, seed: int, orders: Sequence[SampleSchedule], turns: Turns, global_batch: int) -> None:
        self._seed, self._orders, self._turns, self._batch = seed, orders, turns, global_batch

    def ids(self, step: int) -> tuple[Ints, Ints]:
        """The global batch of a step: (epochs of each one's source, sample numbers), (global_batch,)."""
        start, stop = step * self._batch, (step + 1) * self._batch
        sources = self._turns.of(start, stop)
        epochs, ids = np.zeros_like(sources), np.zeros_like(sources)
        for source, order in enumerate(self._orders):
            first, last = (self._turns.draws(source, position) for position in (start, stop))
            places = sources == source
            own_epochs, own_ids = order.between(first, last)
            epochs[places], ids[places] = own_epochs, own_ids + (source << SOURCE_BITS)
        # Mixed, or a rank could meet one source alone.
        order_in_batch = shuffled(keys(self._seed, 0, step, Stream.MIXED_ORDER), self._batch)
        return epochs[order_in_batch], ids[order_in_batch]

    def draws(self, step: int) -> list[int]:
        """Position of each source's own order at the start of a step."""
        return [self._turns.draws(source, step * self._batch) for source in range(len(self._orders))]

    @property
    def steps_per_epoch(self) -> float:
        """Updates until the source that lasts longest has been seen whole."""
        shares = [places / CYCLE for places in self._turns.places]
        return max(
            order.samples / (share * self._batch) for order, share in zip(self._orders, shares, strict=True)
        )


class MixedSource:
    """Reads samples of several sources; as :class:`~janus_ds.data.source.SampleSource`.

    Args:
        parts: the sources.
        weights: of the sources; decide the order of :meth:`first` alone.

    Raises:
        DataError: the sources have different streams.
    """

    def __init__(self, parts: Sequence[SampleSource], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.weights = tuple(weights)
        self.name = ", ".join(part.name for part in parts)
        self.streams = parts[0].streams
        for part in parts:
            if part.streams != self.streams or part.index.stream_dtype != parts[0].index.stream_dtype:
                raise DataError(
                    "the sources hold different kinds of samples",
                    f"{parts[0].name}, {part.name}",
                    "mix data that was prepared for one task with one tokenizer",
                )

    @cached_property
    def turns(self) -> Turns:
        """Whose turn it is at each position."""
        return Turns(self.weights)

    @property
    def samples(self) -> int:
        """Samples of all sources."""
        return sum(part.samples for part in self.parts)

    def read(self, ids: ArrayLike) -> dict[str, Ragged]:
        """The samples with these numbers, in this order, by stream.

        Raises:
            DataError: as from SampleSource; IndexError: a number that no sample has.
        """
        wanted = np.atleast_1d(np.asarray(ids, dtype=np.int64))
        chosen, found = [], []
        for source, places, own in self._by_source(wanted):
            chosen.append(places)
            found.append(self.parts[source].read(own))
        if not found:
            return self.parts[0].read(wanted)
        order = np.argsort(np.concatenate(chosen), kind="stable")
        return {
            stream: Ragged.concatenate([rows[stream] for rows in found]).take(order)
            for stream in self.streams
        }

    def sound(self, ids: ArrayLike) -> Ints:
        """As of SampleSource: damaged samples replaced within their own source."""
        wanted = np.array(ids, dtype=np.int64)
        for source, places, own in self._by_source(wanted):
            wanted[places] = self.parts[source].sound(own) + (source << SOURCE_BITS)
        return wanted

    def take_damage(self) -> list[Damage]:
        """Damage that :meth:`sound` met since the last call, with the numbers of the mixture."""
        return [
            damage.shifted(source << SOURCE_BITS)
            for source, part in enumerate(self.parts)
            for damage in part.take_damage()
        ]

    def first(self, samples: int) -> Ints:
        """Numbers of the first samples by turns, each once; sources that end early are passed over."""
        found: list[Ints] = []
        start, total = 0, min(samples, self.samples)
        had = np.zeros(len(self.parts), dtype=np.int64)
        sizes = np.array([part.samples for part in self.parts])
        while (had < sizes).any() and sum(map(len, found)) < total:
            for source in self.turns.of(start, start + CYCLE).tolist():
                if had[source] < sizes[source]:
                    found.append(np.array([(source << SOURCE_BITS) + had[source]]))
                    had[source] += 1
                if len(found) == total:
                    break
            start += CYCLE
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def has(self, sample: int) -> bool:
        """Whether a sample has this number."""
        source = sample >> SOURCE_BITS
        return 0 <= source < len(self.parts) and self.parts[source].has(sample & ((1 << SOURCE_BITS) - 1))

    def origin(self, sample: int) -> str:
        """Where a sample lies: its source's shard, member and number there."""
        return self.parts[sample >> SOURCE_BITS].origin(sample & ((1 << SOURCE_BITS) - 1))

    def _by_source(self, ids: Ints) -> list[tuple[int, Ints, Ints]]:
        """(source, places in `ids`, own numbers) of each source that occurs."""
        sources = ids >> SOURCE_BITS
        if len(ids) and not (sources.min() >= 0 and sources.max() < len(self.parts)):
            raise IndexError(f"there are {len(self.parts)} sources")
        own = ids & ((1 << SOURCE_BITS) - 1)
        found = []
        for source in np.unique(sources).tolist():
            places = np.flatnonzero(sources == source)
            found.append((source, places, own[places]))
        return found
