"""Packed shards: ordinary WebDataset tars whose members hold many samples each.

A member has one tar key of six or more digits and two files per stream: KEY.target.tokens (uint16 or
uint32, little endian, samples one after the other, no bos or eos) and KEY.target.offsets (uint32,
n + 1). Any tar or WebDataset tool reads them; the index says where each file's bytes lie, so that
the loader fetches a member with one positioned read.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np

from janus_ds.batch import Ragged
from janus_ds.data.stream.index import BlobEntry, MemberEntry, ShardEntry, SplitIndex
from janus_ds.errors import DamagedDataError, DataError
from janus_ds.io import atomic_file, disk_faults, open_regular

if TYPE_CHECKING:
    from janus_ds.data.stream.shard_cache import RemoteShards

TAR_BLOCK_BYTES = 512
_LOOK_FIRST_BYTES = 16 << 20
_OPEN_FILES = 16
_NO_DAMAGE = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)

_OFFSET_DTYPE = "<u4"

_Read = Callable[[BlobEntry], bytes]
_Ints = np.ndarray[Any, np.dtype[np.int64]]

_Result = TypeVar("_Result")
_Unpack = Callable[[MemberEntry, SplitIndex, _Read, str], _Result]

_VERIFY = "run `janus-ds verify` on the data directory; copy the shard again or prepare it again"


def token_dtype(vocab_size: int) -> str:
    """The smallest token type that holds the vocabulary: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def shard_name(number: int) -> str:
    """File name of a shard within its split."""
    return f"shard-{number:06d}.tar"


@dataclass(frozen=True)
class ShardFormat:
    """How samples lie in the shards of a split.

    Args:
        stream_dtype: "uint16" or "uint32".
        samples_per_member: samples under one tar key; the last member of a shard may have fewer.
        members_per_shard: members in one tar; the last shard may have fewer.
    """

    stream_dtype: str
    samples_per_member: int = 256
    members_per_shard: int = 128

    @property
    def samples_per_shard(self) -> int:
        """Samples of a full shard."""
        return self.samples_per_member * self.members_per_shard


class _HashingFile:
    """Keeps SHA-256 and size of what is written to a file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._file.write(data)


def write_shard(path: Path, samples: Mapping[str, Ragged], form: ShardFormat, first_key: int) -> ShardEntry:
    """Write one shard whole (under another name, then renamed) and describe it.

    The bytes are a function of the arguments: equal samples give equal files.

    Args:
        first_key: number of the first member, counted over the whole split.
    """
    from webdataset import TarWriter

    total = len(next(iter(samples.values())))
    members: list[MemberEntry] = []
    with disk_faults(path), atomic_file(path) as raw:
        file, offset = _HashingFile(raw), 0
        with TarWriter(file, encoder=False, mtime=0, user="janus_ds", group="janus_ds") as tar:
            for start in range(0, total, form.samples_per_member):
                part = {
                    name: rows.slice(start, min(start + form.samples_per_member, total))
                    for name, rows in samples.items()
                }
                key = f"{first_key + len(members):06d}"
                files = _member_files(part, form.stream_dtype)
                tar.write({"__key__": key, **files})
                member, offset = _describe(key, part, files, offset)
                members.append(member)
    tokens = sum(member.tokens for member in members)
    return ShardEntry(path.name, file.size, file.digest.hexdigest(), total, tokens, tuple(members))


def _member_files(part: Mapping[str, Ragged], stream_dtype: str) -> dict[str, bytes]:
    token_type = np.dtype(stream_dtype).newbyteorder("<")
    files = {}
    for name, rows in part.items():
        files[f"{name}.tokens"] = rows.values.astype(token_type).tobytes()
        files[f"{name}.offsets"] = rows.offsets.astype(_OFFSET_DTYPE).tobytes()
    return files


def _describe(
    key: str, part: Mapping[str, Ragged], files: dict[str, bytes], offset: int
) -> tuple[MemberEntry, int]:
    """The member's entry, and where the next tar header starts (files are written in sorted order)."""
    blobs = {}
    for name in sorted(files):
        offset += TAR_BLOCK_BYTES
        blobs[name] = BlobEntry(offset, len(files[name]), zlib.crc32(files[name]))
        offset += -(-len(files[name]) // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES
    tokens = sum(len(rows.values) for rows in part.values())
    return MemberEntry(key, len(next(iter(part.values()))), tokens, blobs), offset


def unpack_member(member: MemberEntry, index: SplitIndex, read: _Read, where: str) -> dict[str, Ragged]:
    """The samples of one member, every stream, checked against the index.

    Args:
        read: gives the bytes of a blob, fewer where the file ends before.
        where: names shard and member in errors.

    Raises:
        DamagedDataError: bytes are missing or differ from the index, or offsets and tokens do not agree.
    """
    rows = {}
    token_type = np.dtype(index.stream_dtype).newbyteorder("<")
    for stream in index.streams:
        tokens = _checked(member, f"{stream}.tokens", read, where)
        bounds = _bounds(member, stream, read, where)
        if len(tokens) != bounds[-1] * token_type.itemsize:
            raise DamagedDataError(f"the offsets of stream {stream!r} do not fit its tokens", where, _VERIFY)
        rows[stream] = Ragged(np.frombuffer(tokens, token_type), bounds)
    return rows


def _lengths(member: MemberEntry, index: SplitIndex, read: _Read, where: str) -> dict[str, _Ints]:
    return {stream: np.diff(_bounds(member, stream, read, where)) for stream in index.streams}


def _bounds(member: MemberEntry, stream: str, read: _Read, where: str) -> _Ints:
    """Where the samples of a stream begin and end."""
    offsets = _checked(member, f"{stream}.offsets", read, where)
    whole = len(offsets) == (member.samples + 1) * np.dtype(_OFFSET_DTYPE).itemsize
    bounds = np.frombuffer(offsets, _OFFSET_DTYPE).astype(np.int64) if whole else np.ones(1, np.int64)
    if bounds[0] != 0 or np.any(np.diff(bounds) < 0):
        raise DamagedDataError(f"the offsets of stream {stream!r} do not fit its samples", where, _VERIFY)
    return bounds


def _checked(member: MemberEntry, name: str, read: _Read, where: str) -> bytes:
    blob = member.blobs.get(name)
    if blob is None:
        raise DamagedDataError(f"the index knows no {name} of this member", where, _VERIFY)
    data = read(blob)
    if len(data) != blob.size:
        raise DamagedDataError(
            f"the shard is cut: {name} has {len(data)} of {blob.size} bytes", where, _VERIFY
        )
    if zlib.crc32(data) != blob.crc32:
        raise DamagedDataError(f"{name} was changed since it was written (checksum differs)", where, _VERIFY)
    return data


class ShardReader:
    """Reads packed members by number, by positioned reads; may be pickled and shared over forks.

    Args:
        store: brings the shards, where they do not lie in `split_dir`.
        cut_shards: read what is left of a shard of the wrong size, instead of refusing all of it.
    """

    def __init__(
        self,
        split_dir: Path,
        index: SplitIndex,
        store: RemoteShards | None = None,
        cut_shards: bool = False,
    ) -> None:
        self._dir = split_dir
        self._index = index
        self._store = store
        self._cut_shards = cut_shards
        self._files: OrderedDict[int, int] = OrderedDict()

    def read_member(self, shard: int, member: int) -> dict[str, Ragged]:
        """The samples of member number `member` within shard number `shard`, checksums verified."""
        return self._use(shard, member, unpack_member)

    def read_lengths(self, shard: int, member: int) -> dict[str, _Ints]:
        """Tokens of each sample of a member by stream, from its offsets alone."""
        return self._use(shard, member, _lengths)

    def place(self, shard: int) -> str:
        """Where a shard lies, for messages."""
        entry = self._index.shards[shard]
        return self._store.folder.place(entry.name) if self._store else str(self._dir / entry.name)

    def close(self) -> None:
        """Close all files; the reader may be used again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def _use(self, shard: int, member: int, unpack: _Unpack[_Result]) -> _Result:
        entry, store = self._index.shards[shard], self._store
        where = f"{self.place(shard)}, member {entry.members[member].key}"
        reason: str | None = None
        # Twice: a stale handle of a network file system is cured by opening the file again, and a copy in the
        # cache that became damaged by fetching it again.
        for attempt in range(2):
            # A fetched shard is let go after each member, or the cache could not remove it.
            descriptor = store.open(entry) if store else self._open(shard, where)
            try:
                read = partial(_read, descriptor)
                return unpack(entry.members[member], self._index, read, where)
            except OSError as error:
                reason = error.strerror
                if store:
                    store.renew(entry)
                elif shard in self._files:
                    os.close(self._files.pop(shard))
            except DamagedDataError:
                if attempt or store is None or not store.renew(entry):
                    raise
            finally:
                if store:
                    os.close(descriptor)
        raise DamagedDataError(f"the shard cannot be read ({reason})", where, _VERIFY)

    def _open(self, shard: int, where: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        entry = self._index.shards[shard]
        try:
            descriptor = open_regular(self._dir / entry.name)
        except FileNotFoundError:
            raise DamagedDataError("the shard is missing", where, _VERIFY) from None
        except OSError as error:
            kind = DataError if error.errno in _NO_DAMAGE else DamagedDataError
            raise kind(f"the shard cannot be opened ({error.strerror})", where, _VERIFY) from None
        size = os.fstat(descriptor).st_size
        if size != entry.size and not self._cut_shards:
            os.close(descriptor)
            what = f"the shard has {size} bytes, the index says {entry.size}: cut or swapped"
            raise DamagedDataError(what, where, _VERIFY)
        if len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = descriptor
        return descriptor


def _read(descriptor: int, blob: BlobEntry) -> bytes:
    """The bytes of a blob, fewer where the file ends before; memory is bounded by the file's size."""
    size = blob.size
    if size > _LOOK_FIRST_BYTES:
        size = max(0, min(size, os.fstat(descriptor).st_size - blob.offset))
    return os.pread(descriptor, size, blob.offset)
