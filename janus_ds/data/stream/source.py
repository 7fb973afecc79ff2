"""Samples by number: from the packed members of a split, verified, with their origin kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.open_dataset import SplitPlace
from janus_ds.data.stream.quarantine import Damage
from janus_ds.data.stream.schedule import CYCLE, SOURCE_BITS, Turns
from janus_ds.data.stream.shard_cache import ReadAhead
from janus_ds.data.stream.shards import ShardReader
from janus_ds.errors import DamagedDataError, DataError

Ints = NDArray[np.int64]


class SampleSource:
    """Reads any samples of a split.

    A member's checksum is verified when it is read; decoded members stay in memory, the least recently
    used go first. May be pickled and used after a fork.

    Args:
        split: DATA/train, for example; or an opened place.
        cached_members: decoded members kept; at least as many as a batch touches.
        max_damage: share of damaged members that :meth:`sound` replaces; None: it is not used, and a shard
            of the wrong size is refused whole.

    Raises:
        DataError: no index, or one that is damaged or of a newer version.
    """

    def __init__(
        self, split: Path | SplitPlace, cached_members: int = 64, max_damage: float | None = None
    ) -> None:
        place = SplitPlace.of(split)
        self.name = place.name
        """How messages call the split."""
        self.index = SplitIndex.load(place.folder)
        self.member_sizes: Ints = self.index.member_sizes()
        self.shards = place.shards
        """Where distant shards come from; None: they lie here."""
        self._reader = ShardReader(
            place.folder, self.index, store=place.shards, cut_shards=max_damage is not None
        )
        self._read_ahead = ReadAhead(place.shards) if place.shards else None
        self._most_damaged = max(1, int((max_damage or 0.0) * len(self.member_sizes)))
        self._stand_ins: dict[int, int] = {}
        self._damaged: set[int] = set()
        self._new_damage: list[Damage] = []
        self._ends = np.cumsum(self.member_sizes)
        members_of_shard = [len(shard.members) for shard in self.index.shards]
        self.members_of_shard: Ints = np.array(members_of_shard, dtype=np.int64)
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

    def sound(self, ids: ArrayLike) -> Ints:
        """These numbers, those in damaged members replaced by numbers in whole ones.

        The replacement depends on the number and the damage alone: every rank makes the same.

        Raises:
            DataError: more damage than `max_damage`; or a shard cannot be fetched.
        """
        wanted = np.array(ids, dtype=np.int64)
        member, inside = self._locate(wanted)
        for number in np.unique(member).tolist():
            other = self._stand_in(number)
            if other != number:
                first = int(self._ends[other] - self.member_sizes[other])
                places = member == number
                wanted[places] = first + inside[places] % self.member_sizes[other]
        return wanted

    def take_damage(self) -> list[Damage]:
        """Damage that :meth:`sound` met since the last call."""
        found, self._new_damage = self._new_damage, []
        return found

    def read_ahead(self, members: Iterable[int], further: int) -> None:
        """Fetch shards in the background: those of the first window of members, and `further` ones more.

        Args:
            members: in the order in which they will be read; read as far as needed.
            further: shards.
        """
        if self._read_ahead is None:
            return
        wanted: dict[int, None] = {}
        for member in members:
            wanted.setdefault(int(self._shard_of_member[member]))
            if len(wanted) > further:
                break
        self._read_ahead.want([self.index.shards[shard] for shard in wanted])

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
        return f"{self._reader.place(shard)}, member {key}, sample {inside}"

    def _locate(self, ids: Ints) -> tuple[Ints, Ints]:
        """Member number and number within the member of each sample."""
        member = np.searchsorted(self._ends, ids, side="right")
        return member, ids - (self._ends - self.member_sizes)[member]

    def _stand_in(self, member: int) -> int:
        """The member itself if it is whole, or else the next whole one; at least one may be damaged."""
        if member in self._stand_ins:
            return self._stand_ins[member]
        for step in range(len(self.member_sizes)):
            other = (member + step) % len(self.member_sizes)
            if other not in self._damaged and self._is_whole(other):
                self._stand_ins[member] = other
                return other
        raise DataError("no member of the data is whole", "all shards", "copy or prepare the data again")

    def _is_whole(self, member: int) -> bool:
        try:
            self._member(member)
        except DamagedDataError as error:
            self._damaged.add(member)
            self._new_damage.append(self._damage(member, error.what))
            if len(self._damaged) > self._most_damaged:
                raise DataError(
                    f"{len(self._damaged)} of {len(self.member_sizes)} members are damaged, data.max_damage "
                    f"allows {self._most_damaged}; the last: {error.what}",
                    error.where,
                    error.fix,
                ) from error
            return False
        return True

    def _damage(self, number: int, reason: str) -> Damage:
        shard = int(self._shard_of_member[number])
        samples = int(self.member_sizes[number])
        key = self.index.shards[shard].members[number - int(self._first_member[shard])].key
        return Damage(self._reader.place(shard), key, int(self._ends[number]) - samples, samples, reason)

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


class MixedSource:
    """Reads samples of one or several sources; as :class:`SampleSource`.

    Args:
        parts: the sources; the first one's samples keep their numbers.
        weights: of the sources.

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
        if len(self.parts) == 1:
            return self.parts[0].read(wanted)
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
        own = sample & ((1 << SOURCE_BITS) - 1)
        return 0 <= source < len(self.parts) and own < self.parts[source].samples

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
