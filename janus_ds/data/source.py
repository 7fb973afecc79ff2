"""Samples by number: from the packed members of a split, verified, with their origin kept."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from janus_ds.data.index import SplitIndex
from janus_ds.data.ragged import Ragged
from janus_ds.data.shards import ShardReader

__all__ = ["SampleSource"]

Ints = NDArray[np.int64]


class SampleSource:
    """Reads any samples of a split.

    A member's checksum is verified when it is read; decoded members stay in memory, the least recently
    used go first. May be pickled and used after a fork.

    Args:
        split_dir: DATA/train, for example.
        cached_members: decoded members kept; at least as many as a batch touches.

    Raises:
        DataError: no index, or one that is damaged or of a newer version.
    """

    def __init__(self, split_dir: Path, cached_members: int = 64) -> None:
        self.split_dir = split_dir
        self.index = SplitIndex.load(split_dir)
        self.member_sizes: Ints = self.index.member_sizes()
        self._reader = ShardReader(split_dir, self.index)
        self._ends = np.cumsum(self.member_sizes)
        members_of_shard = [len(shard.members) for shard in self.index.shards]
        self._shard_of_member = np.repeat(np.arange(len(members_of_shard)), members_of_shard)
        self._first_member = np.cumsum([0, *members_of_shard])
        self._limit = cached_members
        self._cache: OrderedDict[int, dict[str, Ragged]] = OrderedDict()

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return int(self.member_sizes.sum())

    @property
    def streams(self) -> tuple[str, ...]:
        """("target",) or ("source", "target")."""
        return self.index.streams

    def read(self, ids: ArrayLike) -> dict[str, Ragged]:
        """The samples with these numbers, in this order, by stream; values in the type on disk.

        Raises:
            DataError: a shard is missing, cut, swapped or changed; names shard and member.
            IndexError: a number that no sample has.
        """
        wanted = np.atleast_1d(np.asarray(ids, dtype=np.int64))
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < self.samples):
            raise IndexError(f"sample numbers go from 0 to {self.samples - 1}")
        member, inside = self._locate(wanted)
        touched, first = np.unique(member, return_index=True)
        parts: dict[str, list[Ragged]] = {stream: [] for stream in self.streams}
        chosen = []
        for number in touched[np.argsort(first)].tolist():
            places = np.flatnonzero(member == number)
            chosen.append(places)
            for stream, rows in self._member(number).items():
                parts[stream].append(rows.take(inside[places]))
        if not chosen:
            nothing = Ragged(np.zeros(0, dtype=self.index.stream_dtype), np.zeros(1, dtype=np.int64))
            return dict.fromkeys(self.streams, nothing)
        order = np.argsort(np.concatenate(chosen), kind="stable")
        return {
            stream: rows[0] if len(rows) == 1 else Ragged.concatenate(rows).take(order)
            for stream, rows in parts.items()
        }

    def lengths(self) -> dict[str, Ints]:
        """Tokens of every sample by stream, without specials; reads the offsets alone.

        Raises:
            DataError: a shard is missing, cut, swapped or changed; names shard and member.
        """
        parts = [
            self._reader.read_lengths(number, member)
            for number, shard in enumerate(self.index.shards)
            for member in range(len(shard.members))
        ]
        nothing = [np.zeros(0, dtype=np.int64)]
        return {
            stream: np.concatenate([part[stream] for part in parts] or nothing) for stream in self.streams
        }

    def origin(self, sample: int) -> str:
        """Where a sample lies: "DIR/shard-000003.tar, member 000012, sample 7"."""
        member, inside = (int(x[0]) for x in self._locate(np.array([sample])))
        shard = int(self._shard_of_member[member])
        entry = self.index.shards[shard]
        key = entry.members[member - int(self._first_member[shard])].key
        return f"{self.split_dir / entry.name}, member {key}, sample {inside}"

    def _locate(self, ids: Ints) -> tuple[Ints, Ints]:
        """Member number and number within the member of each sample."""
        member = np.searchsorted(self._ends, ids, side="right")
        return member, ids - (self._ends - self.member_sizes)[member]

    def _member(self, number: int) -> dict[str, Ragged]:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        shard = int(self._shard_of_member[number])
        rows = self._reader.read_member(shard, number - int(self._first_member[shard]))
        if len(self._cache) >= self._limit:
            self._cache.popitem(last=False)
        self._cache[number] = rows
        return rows
