"""Gathers samples of one split and writes a shard whenever there are enough."""

from __future__ import annotations

from pathlib import Path

from janus_ds.data.index import SplitIndex
from janus_ds.data.prepare_journal import SplitState
from janus_ds.data.ragged import Ragged
from janus_ds.data.shards import Packing, shard_name, write_shard
from janus_ds.io import disk_faults

__all__ = ["SplitWriter"]


class SplitWriter:
    """Writes the shards of one split; what they hold depends on the order of samples alone.

    Args:
        directory: OUT/SPLIT.
        packing: token type and sizes.
        state: what an interrupted preparation left.
    """

    def __init__(self, directory: Path, packing: Packing, state: SplitState) -> None:
        self._dir = directory
        self._packing = packing
        self._shards = list(state.shards)
        self._parts = [state.pending] if state.pending else []
        self._waiting = sum(_samples(part) for part in self._parts)

    def add(self, samples: dict[str, Ragged]) -> bool:
        """Take samples in; True if a shard was written."""
        self._parts.append(samples)
        self._waiting += _samples(samples)
        full = self._packing.samples_per_shard
        wrote = self._waiting >= full
        while self._waiting >= full:
            self._write(full)
        return wrote

    @property
    def empty(self) -> bool:
        """No sample has come yet."""
        return not self._shards and not self._waiting

    def state(self) -> SplitState:
        """Shards on disk and the samples that are not in one."""
        return SplitState(list(self._shards), self._gather() if self._parts else {})

    def finish(self, streams: tuple[str, ...]) -> tuple[SplitIndex, str]:
        """Write what is left and the index; returns it with the SHA-256 of its file."""
        if self._waiting:
            self._write(self._waiting)
        index = SplitIndex(self._packing.stream_dtype, streams, tuple(self._shards))
        return index, index.save(self._dir)

    def _gather(self) -> dict[str, Ragged]:
        """All waiting samples as one part."""
        if len(self._parts) > 1:
            streams = self._parts[0]
            self._parts = [{name: Ragged.concatenate([p[name] for p in self._parts]) for name in streams}]
        return self._parts[0]

    def _write(self, count: int) -> None:
        waiting = self._gather()
        first = {name: rows.slice(0, count) for name, rows in waiting.items()}
        rest = {name: rows.slice(count, len(rows)) for name, rows in waiting.items()}
        with disk_faults(self._dir):
            self._dir.mkdir(exist_ok=True)
        path = self._dir / shard_name(len(self._shards))
        members = sum(len(shard.members) for shard in self._shards)
        self._shards.append(write_shard(path, first, self._packing, members))
        self._waiting -= count
        self._parts = [rest] if self._waiting else []


def _samples(part: dict[str, Ragged]) -> int:
    return len(next(iter(part.values())))
