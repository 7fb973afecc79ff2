"""Samples by number: from the packed members of one or several splits, verified, with their origin kept.

A member carries one checksum for many samples, so it is the unit of damage. Each of its samples is replaced
by one of the next whole member: the number of samples stays, so that ranks need not speak about it.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from janus_ds.batch import Ragged
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.open_dataset import SplitPlace
from janus_ds.data.stream.shards import ShardReader
from janus_ds.errors import ConfigError, DamagedDataError, DataError

_NEWS_SECONDS = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    """A damaged member.

    Attributes:
        shard: path or address of its shard.
        first_sample: number of its first sample; the others follow.
    """

    shard: str
    member: str
    first_sample: int
    samples: int
    reason: str


Ints = NDArray[np.int64]

SOURCE_BITS = 40
"""A sample's number is SOURCE << 40 | its number in that source."""


class Source:
    """One split: its index, and a reader of its members.

    Args:
        place: of the split.
        cut_shards: read what is left of a shard of the wrong size, instead of refusing all of it.

    Raises:
        DataError: no index, or one that is damaged or of a newer version.
    """

    def __init__(self, place: SplitPlace, cut_shards: bool) -> None:
        self.name, self.weight = place.name, place.weight
        self.index = SplitIndex.load(place.folder)
        self.shards = place.shards
        """Where distant shards come from; None: they lie here."""
        self.reader = ShardReader(place.folder, self.index, store=place.shards, cut_shards=cut_shards)
        self.member_sizes: Ints = self.index.member_sizes()
        self.members_of_shard: Ints = np.array([len(s.members) for s in self.index.shards], dtype=np.int64)
        self._first_member = np.cumsum([0, *self.members_of_shard.tolist()])
        self._measured = 0

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return int(self.member_sizes.sum())

    def locate(self, member: int) -> tuple[int, int]:
        """Number of a member's shard, and the member's number in it."""
        shard = int(np.searchsorted(self._first_member, member, side="right")) - 1
        return shard, member - int(self._first_member[shard])

    def place(self, member: int) -> tuple[str, str]:
        """A member's shard, as messages name it, and its key."""
        shard, inside = self.locate(member)
        return self.reader.place(shard), self.index.shards[shard].members[inside].key

    def read_ahead(self, members: Iterable[int], further: int) -> None:
        """Fetch shards in the background: that of the first member, and the `further` ones that come next.

        Args:
            members: in the order in which they will be read; read as far as needed.
            further: shards.
        """
        if self.shards is None:
            return
        wanted: dict[int, None] = {}
        for member in members:
            wanted.setdefault(self.locate(member)[0])
            if len(wanted) > further:
                break
        self.shards.want([self.index.shards[shard] for shard in wanted])

    def check_cache(self, data: DataConfig, sources: int) -> None:
        """Refuse an order that would fetch each distant shard again and again.

        Raises:
            ConfigError: what is needed at about the same time does not fit into the cache.
        """
        if self.shards is None:
            return
        sizes = sorted((shard.size for shard in self.index.shards), reverse=True)
        # A window can lie in two groups, and another worker can be a group ahead.
        together = 2 * data.shuffle_shards + data.read_ahead if data.shuffle_shards else len(sizes)
        needed, room = sum(sizes[:together]), self.shards.cache.limit // sources
        if needed > room:
            instead = "lower data.shuffle_shards"
            if not data.shuffle_shards:
                instead = "set data.shuffle_shards above 0, which mixes over all shards"
            if data.batch == "tokens":
                instead = "copy the data to a disk: batches of tokens mix over all shards"
            raise ConfigError(
                f"{needed / 1e9:.3g} GB of shards are needed at about the same time, and the cache has "
                f"{room / 1e9:.3g} GB for them",
                f"data.cache_gb, {self.name}",
                f"raise data.cache_gb, or {instead}",
            )

    def arriving(self) -> object:
        """What changes while lengths are read, or bytes of distant shards come."""
        return self._measured, self.shards and self.shards.cache.arrived()

    def lengths(self) -> dict[str, Ints]:
        """Tokens of every sample by stream, without specials; reads the offsets alone.

        Distant shards come whole for it, which the log tells of.
        """
        parts, told = [], -math.inf if self.shards else time.monotonic()
        for member in range(len(self.member_sizes)):
            shard, inside = self.locate(member)
            if time.monotonic() - told > _NEWS_SECONDS:
                told, shards = time.monotonic(), len(self.index.shards)
                logger.info(
                    "reading the lengths of samples: shard %d of %d, %s", shard + 1, shards, self.name
                )
            parts.append(self.reader.read_lengths(shard, inside))
            self._measured = member
        nothing = [np.zeros(0, dtype=np.int64)]
        streams = self.index.streams
        return {stream: np.concatenate([part[stream] for part in parts] or nothing) for stream in streams}


class SampleSource:
    """Reads any samples of a split, or of several that are mixed.

    A sample's number is SOURCE << 40 | its number in that source. A member's checksum is verified when it is
    read; decoded members stay in memory, the least recently used go first. May be pickled and used after a
    fork.

    Args:
        split: DATA/train, for example; or opened places, whose weights say how they are mixed.
        cached_members: decoded members kept; at least as many as a batch touches.
        max_damage: share of damaged members that :meth:`replace_damaged` replaces; None: it is not used, and
            a shard of the wrong size is refused whole.

    Raises:
        DataError: no index, or one that is damaged or of a newer version; sources of different kinds.
    """

    def __init__(
        self, split: Path | Sequence[SplitPlace], cached_members: int = 64, max_damage: float | None = None
    ) -> None:
        places = [SplitPlace(split, str(split))] if isinstance(split, Path) else split
        self.parts = [Source(place, cut_shards=max_damage is not None) for place in places]
        first = self.parts[0]
        self.name = ", ".join(part.name for part in self.parts)
        """How messages call the split."""
        self.streams = first.index.streams
        """("target",) or ("source", "target")."""
        self._dtype = first.index.stream_dtype
        for part in self.parts:
            if part.index.streams != self.streams or part.index.stream_dtype != self._dtype:
                raise DataError(
                    "the sources hold different kinds of samples",
                    f"{first.name}, {part.name}",
                    "mix data that was prepared for one task with one tokenizer",
                )
        # Members of all sources in one row: where each one's numbers begin, its samples, and its source.
        sizes = [part.member_sizes for part in self.parts]
        self._size = np.concatenate(sizes)
        starts = [np.cumsum(own) - own + (n << SOURCE_BITS) for n, own in enumerate(sizes)]
        self._first: Ints = np.concatenate(starts)
        self._source = np.repeat(np.arange(len(sizes)), [len(own) for own in sizes])
        self._first_member = np.cumsum([0, *map(len, sizes)]).tolist()
        self._max_damage = max_damage or 0.0
        self._stand_ins: dict[int, int] = {}
        self._damaged: set[int] = set()
        self._new_damage: list[Damage] = []
        self._limit = cached_members
        self._cache: OrderedDict[int, dict[str, Ragged]] = OrderedDict()

    def arriving(self) -> object:
        """What changes while the sources give signs of progress."""
        return [part.arriving() for part in self.parts]

    @property
    def samples(self) -> int:
        """Samples of all sources."""
        return int(self._size.sum())

    def read(self, ids: ArrayLike) -> dict[str, Ragged]:
        """The samples with these numbers, in this order, by stream; values in the type on disk."""
        member, inside = self._locate(np.atleast_1d(np.asarray(ids, dtype=np.int64)))
        touched, first = np.unique(member, return_index=True)
        parts: dict[str, list[Ragged]] = {stream: [] for stream in self.streams}
        chosen = []
        for number in touched[np.argsort(first)].tolist():
            places = np.flatnonzero(member == number)
            chosen.append(places)
            for stream, rows in self._member(number).items():
                parts[stream].append(rows.take(inside[places]))
        if not chosen:
            nothing = Ragged(np.zeros(0, dtype=self._dtype), np.zeros(1, dtype=np.int64))
            return dict.fromkeys(self.streams, nothing)
        order = np.argsort(np.concatenate(chosen), kind="stable")
        return {
            stream: rows[0] if len(rows) == 1 else Ragged.concatenate(rows).take(order)
            for stream, rows in parts.items()
        }

    def replace_damaged(self, ids: ArrayLike) -> Ints:
        """These numbers, those in damaged members replaced by numbers in whole ones of the same source.

        The replacement depends on the number and the damage alone: every rank makes the same.
        """
        wanted = np.array(ids, dtype=np.int64)
        member, inside = self._locate(wanted)
        for number in np.unique(member).tolist():
            other = self._stand_in(number)
            if other != number:
                places = member == number
                wanted[places] = self._first[other] + inside[places] % self._size[other]
        return wanted

    def read_whole(self, ids: ArrayLike) -> tuple[Ints, dict[str, Ragged]]:
        """:meth:`replace_damaged`, and the samples; what was whole once may have become damaged since."""
        while True:
            whole = self.replace_damaged(ids)
            try:
                return whole, self.read(whole)
            except DamagedDataError:
                self._stand_ins.clear()

    def take_damage(self) -> list[Damage]:
        """Damage that :meth:`replace_damaged` met since the last call."""
        found, self._new_damage = self._new_damage, []
        return found

    def has(self, sample: int) -> bool:
        """Whether a sample has this number."""
        try:
            self._locate(np.array([sample]))
        except IndexError:
            return False
        return True

    def origin(self, sample: int) -> str:
        """Where a sample lies: "DIR/shard-000003.tar, member 000012, sample 7"."""
        member, inside = (int(x[0]) for x in self._locate(np.array([sample])))
        shard, key = self._place(member)
        return f"{shard}, member {key}, sample {inside}"

    def _locate(self, ids: Ints) -> tuple[Ints, Ints]:
        """Member of each sample, counted over all sources, and number within the member."""
        member = np.searchsorted(self._first, ids, side="right") - 1
        inside = ids - self._first[member] if len(self._first) else ids
        if len(ids) and (member.min() < 0 or (inside >= self._size[member]).any()):
            last = f"0 to {self.samples - 1}" if len(self.parts) == 1 else "SOURCE x 2^40 + 0 on"
            raise IndexError(f"sample numbers go from {last}")
        return member, inside

    def _own(self, member: int) -> tuple[Source, int]:
        """A member's source, and its number there."""
        source = int(self._source[member])
        return self.parts[source], member - self._first_member[source]

    def _place(self, member: int) -> tuple[str, str]:
        part, own = self._own(member)
        return part.place(own)

    def _stand_in(self, member: int) -> int:
        """The member itself if it is whole, or else the next whole one; at least one may be damaged."""
        if member in self._stand_ins:
            return self._stand_ins[member]
        part, own = self._own(member)
        for step in range(len(part.member_sizes)):
            other = member - own + (own + step) % len(part.member_sizes)
            if self._size[other] and other not in self._damaged and self._is_whole(other):
                self._stand_ins[member] = other
                return other
        raise DataError("no member of the data is whole", "all shards", "copy or prepare the data again")

    def _is_whole(self, member: int) -> bool:
        try:
            self._member(member)
        except DamagedDataError as error:
            self._damaged.add(member)
            samples = int(self._size[member])
            self._new_damage.append(
                Damage(*self._place(member), int(self._first[member]), samples, error.what)
            )
            members = len(self._own(member)[0].member_sizes)
            damaged = sum(self._source[other] == self._source[member] for other in self._damaged)
            allowed = max(1, int(self._max_damage * members))
            if damaged > allowed:
                raise DataError(
                    f"{damaged} of {members} members are damaged, data.max_damage "
                    f"allows {allowed}; the last: {error.what}",
                    error.where,
                    error.fix,
                ) from error
            return False
        return True

    def _member(self, number: int) -> dict[str, Ragged]:
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        part, own = self._own(number)
        rows = part.reader.read_member(*part.locate(own))
        if len(self._cache) >= self._limit:
            self._cache.popitem(last=False)
        self._cache[number] = rows
        return rows
