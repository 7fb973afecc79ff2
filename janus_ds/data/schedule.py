"""Which sample comes when: a pure function of (seed, epoch, member sizes), and who reads it.

An epoch is a permutation of all samples, made by block shuffle: packed members are permuted, cut into
windows of `window` members, and the samples of a window are mixed. So each sample comes once an epoch,
reads stay local, and the only state of the order is a position (the step). Where shards come from afar,
they can be permuted first, so that members mix only inside groups of shards. Nothing here knows ranks or
workers, except :func:`rank_positions`, which splits a global batch without changing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from janus_ds.data.counter_rng import Stream, keys, shuffled
from janus_ds.errors import ConfigError, DataError

__all__ = ["SampleSchedule", "ShardGroups", "rank_positions"]

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
        seed: the run's seed.
        member_sizes: samples of each packed member, in index order.
        window: members that are mixed with one another.
        global_batch: samples a step, over all ranks and micro-batches.
        groups: how members mix; None: over all shards.

    Raises:
        DataError: there is no sample.
        ConfigError: window or global batch below 1.
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
        for name, value in (("data.shuffle_window", window), ("train.global_batch", global_batch)):
            if value < 1:
                raise ConfigError(f"{name} is {value}", name, "give a number of at least 1")
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
        if step < 0:
            raise ValueError(f"step {step}")
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


def rank_positions(global_batch: int, dp_rank: int, dp_size: int, micro_batch: int) -> Ints:
    """Which positions of a global batch a data-parallel rank takes, micro-batch by micro-batch.

    Micro-batch k of all ranks together is the k-th run of micro_batch * dp_size positions.

    Returns:
        int64, shape (accumulation steps, micro_batch).

    Raises:
        ConfigError: global_batch is not a multiple of micro_batch * dp_size.
    """
    together = micro_batch * dp_size
    if min(global_batch, dp_size, micro_batch) < 1 or global_batch % together:
        raise ConfigError(
            f"a global batch of {global_batch} cannot be split into micro-batches of {micro_batch} "
            f"on {dp_size} data-parallel ranks",
            "train.global_batch, train_micro_batch_size_per_gpu",
            "make global_batch a multiple of micro-batch x data-parallel ranks",
        )
    positions = np.arange(global_batch, dtype=np.int64).reshape(-1, dp_size, micro_batch)
    return positions[:, dp_rank]
