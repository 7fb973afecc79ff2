"""Which sample comes when: a pure function of (seed, epoch, member sizes).

An epoch is a permutation of all samples, made by block shuffle: packed members are permuted, cut into
windows of `window` members, and the samples of a window are mixed. So each sample comes once an epoch,
reads stay local, and the only state of the order is a position (the step). Where shards come from afar,
they can be permuted first, so that members mix only inside groups of shards. Nothing here knows ranks or
workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from janus_ds.data.masking.counter_rng import Stream, keys, shuffled
from janus_ds.errors import ConfigError, DataError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ShardGroups:
    """Members that mix with one another only inside groups of shards.

    Attributes:
        members_of_shard: int64: members of each shard, in index order.
        together: shards of a group.
    """

    members_of_shard: Ints
    together: int


@dataclass(frozen=True)
class _Epoch:
    """One epoch's order of members."""

    number: int
    member_order: Ints
    window_start: Ints
    """int64, shape (windows + 1,): first position of each window within the epoch, and the end."""


class SampleSchedule:
    """The infinite stream of samples; epoch e holds the positions [e n, (e + 1) n).

    Args:
        member_sizes: samples of each packed member, in index order.
        window: members that are mixed with one another.
        groups: how members mix; None: over all shards.

    Raises:
        DataError: there is no sample.
    """

    def __init__(
        self,
        seed: int,
        member_sizes: ArrayLike,
        window: int,
        global_batch: int,
        groups: ShardGroups | None = None,
    ) -> None:
        sizes = np.asarray(member_sizes, dtype=np.int64)
        if sizes.sum() == 0:
            raise DataError(
                "the data holds no sample", "the index of the split", "prepare the data again from more text"
            )
        self._seed, self._window, self._batch = seed, window, global_batch
        self._sizes = sizes
        self._first = np.cumsum(sizes) - sizes
        self._groups = groups
        self._epochs: dict[int, _Epoch] = {}
        self._mixed: tuple[int, int, Ints] | None = None

    @property
    def samples(self) -> int:
        """Samples an epoch."""
        return int(self._sizes.sum())

    def ids(self, step: int) -> tuple[Ints, Ints]:
        """The global batch of a step.

        Returns:
            (epochs, sample ids), int64, both of shape (global_batch,).
        """
        return self.between(step * self._batch, (step + 1) * self._batch)

    def between(self, position: int, end: int) -> tuple[Ints, Ints]:
        """(epochs, sample ids) of the positions [position, end)."""
        nothing = np.zeros(0, dtype=np.int64)
        epochs, ids = [nothing], [nothing]
        while position < end:
            number, inside = divmod(position, self.samples)
            epoch = self._epoch_order(number)
            window = int(np.searchsorted(epoch.window_start, inside, side="right")) - 1
            start = int(epoch.window_start[window])
            taken = self._window_order(epoch, window)[inside - start : inside - start + end - position]
            epochs.append(np.full(len(taken), number, dtype=np.int64))
            ids.append(taken)
            position += len(taken)
        return np.concatenate(epochs), np.concatenate(ids)

    def members_from(self, position: int) -> Iterator[int]:
        """Members in the order in which they are read, from a position on to the end of the next epoch."""
        number, inside = divmod(position, self.samples)
        epoch = self._epoch_order(number)
        window = int(np.searchsorted(epoch.window_start, inside, side="right")) - 1
        yield from epoch.member_order[window * self._window :].tolist()
        yield from self._epoch_order(number + 1).member_order.tolist()

    def _epoch_order(self, number: int) -> _Epoch:
        if number not in self._epochs:
            order = self._member_order(number)
            ends = np.cumsum(self._sizes[order])
            last_members = np.minimum(
                np.arange(self._window, len(ends) + self._window, self._window), len(ends)
            )
            # Two: the one that ends and the one that begins.
            self._epochs = {n: epoch for n, epoch in self._epochs.items() if abs(n - number) == 1}
            self._epochs[number] = _Epoch(number, order, np.append(0, ends[last_members - 1]))
        return self._epochs[number]

    def _member_order(self, number: int) -> Ints:
        if self._groups is None:
            return shuffled(keys(self._seed, number, 0, Stream.MEMBER_ORDER), len(self._sizes))
        counts, together = self._groups.members_of_shard, self._groups.together
        first = np.cumsum(counts) - counts
        shards = shuffled(keys(self._seed, number, 0, Stream.SHARD_ORDER), len(counts))
        parts = []
        for group, start in enumerate(range(0, len(shards), together)):
            chosen = shards[start : start + together]
            members = np.concatenate([np.arange(first[s], first[s] + counts[s]) for s in chosen])
            order = shuffled(keys(self._seed, number, group, Stream.MEMBER_ORDER), len(members))
            parts.append(members[order])
        return np.concatenate(parts)

    def _window_order(self, epoch: _Epoch, window: int) -> Ints:
        """The sample numbers of a window in their mixed order."""
        if self._mixed is None or self._mixed[:2] != (epoch.number, window):
            members = epoch.member_order[window * self._window : (window + 1) * self._window]
            ranges = [np.arange(self._first[m], self._first[m] + self._sizes[m]) for m in members]
            ids = np.concatenate(ranges)
            order = shuffled(keys(self._seed, epoch.number, window, Stream.WINDOW_ORDER), len(ids))
            self._mixed = (epoch.number, window, ids[order])
        return self._mixed[2]


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
