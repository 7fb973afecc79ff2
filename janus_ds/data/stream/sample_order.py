"""Which sample comes when: a pure function of (seed, epoch, member sizes).

An epoch is a permutation of all samples, made by block shuffle: packed members are permuted, cut into
windows of `window` members, and the samples of a window are mixed. So each sample comes once an epoch,
reads stay local, and the only state of the order is a position (the step). Where shards come from afar,
they can be permuted first, so that members mix only inside groups of shards. Several sources take turns.
Only :class:`SamplePlan` knows ranks: it gives each its part of the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from janus_ds.config.schema import RunConfig
from janus_ds.data.masking.counter_rng import Stream, keys, shuffled
from janus_ds.data.stream.source import SOURCE_BITS, SampleSource, Source
from janus_ds.errors import ConfigError, DataError

Ints = NDArray[np.int64]
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


class SampleSchedule:
    """The infinite stream of samples; epoch e holds the positions [e n, (e + 1) n).

    Args:
        member_sizes: samples of each packed member, in index order.
        window: members that are mixed with one another.
        members_of_shard: int64: members of each shard, in index order; where `together` is not 0.
        together: members mix only inside groups of so many shards; 0: over all.

    Raises:
        DataError: there is no sample.
    """

    def __init__(
        self,
        seed: int,
        member_sizes: ArrayLike,
        window: int,
        members_of_shard: Ints | None = None,
        together: int = 0,
    ) -> None:
        sizes = np.asarray(member_sizes, dtype=np.int64)
        if sizes.sum() == 0:
            raise DataError(
                "the data holds no sample", "the index of the split", "prepare the data again from more text"
            )
        self._seed, self._window, self._sizes = seed, window, sizes
        self._first = np.cumsum(sizes) - sizes
        self._of_shard, self._together = members_of_shard, together
        self._epochs: dict[int, tuple[Ints, Ints]] = {}
        self._mixed: tuple[int, int, Ints] | None = None

    @property
    def samples(self) -> int:
        """Samples an epoch."""
        return int(self._sizes.sum())

    def between(self, position: int, end: int) -> tuple[Ints, Ints]:
        """(epochs, sample ids) of the positions [position, end), int64."""
        nothing = np.zeros(0, dtype=np.int64)
        epochs, ids = [nothing], [nothing]
        while position < end:
            epoch, inside = divmod(position, self.samples)
            _, starts = self.member_order(epoch)
            window = int(np.searchsorted(starts, inside, side="right")) - 1
            skip = inside - int(starts[window])
            taken = self._window_order(epoch, window)[skip : skip + end - position]
            epochs.append(np.full(len(taken), epoch, dtype=np.int64))
            ids.append(taken)
            position += len(taken)
        return np.concatenate(epochs), np.concatenate(ids)

    def members_from(self, position: int) -> Iterator[int]:
        """Members in the order in which they are read, from a position on to the end of the next epoch."""
        epoch, inside = divmod(position, self.samples)
        members, starts = self.member_order(epoch)
        window = int(np.searchsorted(starts, inside, side="right")) - 1
        yield from members[window * self._window :].tolist()
        yield from self.member_order(epoch + 1)[0].tolist()

    def member_order(self, epoch: int) -> tuple[Ints, Ints]:
        """Members in their order of an epoch; the first position of each window within it, and the end."""
        if epoch not in self._epochs:
            order = self._shuffled_members(epoch)
            ends = np.cumsum(self._sizes[order])
            last = np.minimum(np.arange(self._window, len(ends) + self._window, self._window), len(ends))
            # Two: the one that ends and the one that begins.
            self._epochs = {n: found for n, found in self._epochs.items() if abs(n - epoch) == 1}
            self._epochs[epoch] = order, np.append(0, ends[last - 1])
        return self._epochs[epoch]

    def _shuffled_members(self, epoch: int) -> Ints:
        if not self._together or self._of_shard is None:
            return shuffled(keys(self._seed, epoch, 0, Stream.MEMBER_ORDER), len(self._sizes))
        of_shard = np.split(np.arange(len(self._sizes)), np.cumsum(self._of_shard)[:-1])
        shards = shuffled(keys(self._seed, epoch, 0, Stream.SHARD_ORDER), len(of_shard))
        parts = []
        for group, start in enumerate(range(0, len(shards), self._together)):
            members = np.concatenate([of_shard[s] for s in shards[start : start + self._together]])
            parts.append(members[shuffled(keys(self._seed, epoch, group, Stream.MEMBER_ORDER), len(members))])
        return np.concatenate(parts)

    def _window_order(self, epoch: int, window: int) -> Ints:
        """The sample numbers of a window in their mixed order."""
        if self._mixed is None or self._mixed[:2] != (epoch, window):
            members = self.member_order(epoch)[0][window * self._window : (window + 1) * self._window]
            ids = np.concatenate(
                [np.arange(self._first[m], self._first[m] + self._sizes[m]) for m in members]
            )
            order = shuffled(keys(self._seed, epoch, window, Stream.WINDOW_ORDER), len(ids))
            self._mixed = (epoch, window, ids[order])
        return self._mixed[2]


CYCLE = 10_000
"""Positions after which the order of turns begins anew; weights count to this accuracy."""


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
        taken = self.cycle == np.arange(len(weights))[:, None]
        self._before = np.cumsum(np.pad(taken, ((0, 0), (1, 0))), axis=1)

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


def first_samples(sources: Sequence[Source], count: int) -> Ints:
    """Numbers of the first samples by turns, each once; sources that end early are passed over."""
    cycle = Turns([source.weight for source in sources]).cycle
    positions, numbers = [], []
    for source, part in enumerate(sources):
        own, rank = np.flatnonzero(cycle == source), np.arange(min(part.samples, count))
        positions.append(own[rank % len(own)] + rank // len(own) * CYCLE)
        numbers.append((source << SOURCE_BITS) + rank)
    return np.concatenate(numbers)[np.argsort(np.concatenate(positions))[:count]]


class SamplePlan:
    """Equally many samples a step, of one or several sources; a pure function of the step's number.

    Args:
        source: of the training split.

    Raises:
        ConfigError: what is needed at about the same time does not fit into the cache of distant shards.
    """

    def __init__(self, source: SampleSource, config: RunConfig, share: RankShare) -> None:
        data, self._batch = config.data, config.train.global_batch
        self._sources, self._ahead = source.parts, data.read_ahead
        self._turns = Turns([part.weight for part in self._sources])
        self._seed, self._orders = config.train.seed, list[SampleSchedule]()
        for number, part in enumerate(self._sources):
            part.check_cache(data, len(self._sources))
            # Equal sources of a mixture get different orders.
            seed, sizes = self._seed + number * _SEED_STEP, (part.member_sizes, data.shuffle_window)
            self._orders.append(SampleSchedule(seed, *sizes, part.members_of_shard, data.shuffle_shards))
        # Micro-batch k of all ranks together is the k-th run of micro_batch * size places of the batch.
        places = np.arange(self._batch).reshape(-1, share.size, share.micro_batch)
        self._positions = places[:, share.rank]

    def parts(self, step: int) -> list[tuple[Ints, Ints]]:
        """This rank's micro-batches: (epochs, sample ids) of each, int64."""
        epochs, ids = self._global_batch(step * self._batch, (step + 1) * self._batch)
        return [(epochs[positions], ids[positions]) for positions in self._positions]

    def read_ahead(self, step: int) -> None:
        """Let distant shards that the step and the next ones need come."""
        for number, (source, order) in enumerate(zip(self._sources, self._orders, strict=True)):
            position = self._turns.draws(number, step * self._batch)
            source.read_ahead(order.members_from(position), self._ahead)

    def _global_batch(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """(epochs of each one's source, sample numbers) of all ranks."""
        if len(self._orders) == 1:
            return self._orders[0].between(start, stop)
        sources = self._turns.of(start, stop)
        epochs, ids = np.zeros_like(sources), np.zeros_like(sources)
        for source, order in enumerate(self._orders):
            first, last = (self._turns.draws(source, position) for position in (start, stop))
            places = sources == source
            epochs[places], own_ids = order.between(first, last)
            ids[places] = own_ids + (source << SOURCE_BITS)
        # Mixed, or a rank could meet one source alone.
        mixed = shuffled(keys(self._seed, 0, start // self._batch, Stream.MIXED_ORDER), self._batch)
        return epochs[mixed], ids[mixed]
