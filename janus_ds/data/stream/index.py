"""What lies on disk: the manifest of a data directory and the index of each split.

`OUT/manifest.json` says what the data is (task, tokenizer, settings, totals); `OUT/SPLIT/index.json`
lists every shard with size, SHA-256 and, for each packed member, where its bytes are and their
CRC-32. Both files carry a checksum of themselves, so that a change in them is found as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from janus_ds.config.locations import checked_name
from janus_ds.errors import DataError
from janus_ds.io import fingerprint_of, read_bounded, write_atomic

FORMAT_VERSION = 1
"""Version of the layout on disk; higher ones are refused."""

INDEX_NAME = "index.json"

MANIFEST_NAME = "manifest.json"

MOST_BYTES = {MANIFEST_NAME: 64 << 20, INDEX_NAME: 256 << 20}
"""Largest manifest and index that are read, here or from afar; an index needs about 300 bytes a member."""

_STREAMS = (("target",), ("source", "target"))
_MOST_SAMPLES, _MOST_BLOB_BYTES, _MOST_SHARD_BYTES = 1 << 40, (1 << 31) - 1, 1 << 40
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PREPARE_AGAIN = "prepare the data again with launch/prepare_data.py, or copy the whole directory again"


@dataclass(frozen=True)
class BlobEntry:
    """One file of a member: its bytes lie at `offset` in the shard's tar."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class MemberEntry:
    """One packed member: many samples under one tar key.

    `blobs` is keyed by the part of the file name after the key: "target.tokens",
    "target.offsets" and, for pairs, the same for "source". `tokens` counts all streams.
    """

    key: str
    samples: int
    tokens: int
    blobs: dict[str, BlobEntry]


@dataclass(frozen=True)
class ShardEntry:
    """One tar file with its size in bytes, SHA-256 and members in order."""

    name: str
    size: int
    sha256: str
    samples: int
    tokens: int
    members: tuple[MemberEntry, ...]


@dataclass(frozen=True)
class SplitIndex:
    """All shards of one split, in the order that numbers its samples.

    Args:
        stream_dtype: "uint16" or "uint32", the type of the token files (little endian).
        streams: ("target",) for blocks of text, ("source", "target") for pairs.
    """

    stream_dtype: str
    streams: tuple[str, ...]
    shards: tuple[ShardEntry, ...]

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return sum(shard.samples for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of the split over all streams, without specials."""
        return sum(shard.tokens for shard in self.shards)

    def members(self) -> Iterator[tuple[ShardEntry, MemberEntry]]:
        """Every member with its shard, in order."""
        for shard in self.shards:
            for member in shard.members:
                yield shard, member

    def member_sizes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64: samples of each member over all shards, in order."""
        return np.array([member.samples for _, member in self.members()], dtype=np.int64)

    def save(self, split_dir: Path) -> str:
        """Write `split_dir/index.json` whole; returns its SHA-256."""
        return _save(split_dir / INDEX_NAME, asdict(self))

    @classmethod
    def load(cls, split_dir: Path) -> SplitIndex:
        """Read `split_dir/index.json`.

        Raises:
            DataError: the file is missing, cut, changed, or of a newer format version.
        """
        path = split_dir / INDEX_NAME
        body = _load(path)
        with _Garbled(path):
            return cls(
                stream_dtype=_one_of(body["stream_dtype"], ("uint16", "uint32")),
                streams=_streams(body["streams"]),
                shards=tuple(shard_entry(shard) for shard in body["shards"]),
            )


@dataclass(frozen=True)
class SplitTotals:
    """Counts of one split as the manifest tells them, and the SHA-256 of its index."""

    shards: int
    samples: int
    tokens: int
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a data directory is.

    Args:
        task: "denoise" (blocks of text) or "pair" (source and target).
        tokenizer_fingerprint: `Tokenizer.fingerprint` of OUT/tokenizer.
        vocab_size: number of symbols of the tokenizer.
        settings: the settings that the data was prepared with, and counts for information.
        splits: totals by split name.
    """

    task: str
    tokenizer_fingerprint: str
    vocab_size: int
    settings: dict[str, Any]
    splits: dict[str, SplitTotals]

    def save(self, directory: Path) -> None:
        """Write `directory/manifest.json` whole: the last file that a preparation writes."""
        _save(directory / MANIFEST_NAME, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `directory/manifest.json`.

        Raises:
            DataError: the directory or the file is missing, cut, changed, or of a newer version.
        """
        path = directory / MANIFEST_NAME
        body = _load(path)
        with _Garbled(path):
            return cls(
                task=_one_of(body["task"], ("denoise", "pair")),
                tokenizer_fingerprint=_sha256(body["tokenizer_fingerprint"]),
                vocab_size=whole_number(body["vocab_size"], 1, 1 << 31),
                settings=dict(body["settings"]),
                splits={checked_name(name): _totals(totals) for name, totals in body["splits"].items()},
            )


class _Garbled:
    """Context that turns a missing or odd field into a DataError about `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, AttributeError, RecursionError)):
            raise DataError(
                f"a field is missing or odd ({error!r})", str(self._path), _PREPARE_AGAIN
            ) from error


def _one_of(value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value


def _streams(value: object) -> tuple[str, ...]:
    streams = tuple(value) if isinstance(value, list) else ()
    if streams not in _STREAMS:
        raise ValueError(f"{str(value)[:60]!r} are no streams")
    return streams


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{str(value)[:80]!r} is no SHA-256")
    return value


def whole_number(value: object, least: int, most: int) -> int:
    """A whole number from a file, within a range; no text, no truth value, no fraction.

    Raises:
        ValueError: anything else.
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{str(value)[:60]!r} is no whole number from {least} to {most}")
    return value


def _totals(value: dict[str, Any]) -> SplitTotals:
    return SplitTotals(
        shards=whole_number(value["shards"], 0, _MOST_SAMPLES),
        samples=whole_number(value["samples"], 0, _MOST_SAMPLES),
        tokens=whole_number(value["tokens"], 0, 1 << 62),
        index_sha256=_sha256(value["index_sha256"]),
    )


def shard_entry(shard: dict[str, Any]) -> ShardEntry:
    """The entry that `dataclasses.asdict` and JSON have made a dict of, every name and number checked.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: something is missing, of another kind, or out of
            range; bytes outside of the shard; sums that do not agree.
    """
    size = whole_number(shard["size"], 0, _MOST_SHARD_BYTES)
    members = tuple(_member_entry(member, size) for member in shard["members"])
    entry = ShardEntry(
        name=checked_name(shard["name"]),
        size=size,
        sha256=_sha256(shard["sha256"]),
        samples=whole_number(shard["samples"], 0, _MOST_SAMPLES),
        tokens=whole_number(shard["tokens"], 0, _MOST_SAMPLES),
        members=members,
    )
    for name in ("samples", "tokens"):
        if getattr(entry, name) != sum(getattr(member, name) for member in members):
            raise ValueError(f"the {name} of {entry.name} are not the sum over its members")
    return entry


def _member_entry(member: dict[str, Any], shard_size: int) -> MemberEntry:
    blobs = {}
    for name, blob in member["blobs"].items():
        entry = BlobEntry(
            offset=whole_number(blob["offset"], 0, shard_size),
            size=whole_number(blob["size"], 0, min(shard_size, _MOST_BLOB_BYTES)),
            crc32=whole_number(blob["crc32"], 0, (1 << 32) - 1),
        )
        if entry.offset + entry.size > shard_size:
            raise ValueError(f"{str(name)[:60]!r} ends behind the end of its shard")
        blobs[checked_name(name)] = entry
    # An offset is four bytes, a token two or more, so a member can claim no more than its shard holds.
    samples = whole_number(member["samples"], 0, shard_size // 4)
    return MemberEntry(
        checked_name(member["key"]), samples, whole_number(member["tokens"], 0, shard_size), blobs
    )


def _checksum(body: dict[str, Any]) -> str:
    return fingerprint_of(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _save(path: Path, fields: dict[str, Any]) -> str:
    body = {"format_version": FORMAT_VERSION, **fields}
    data = (json.dumps({**body, "checksum": _checksum(body)}, sort_keys=True) + "\n").encode()
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def _load(path: Path) -> dict[str, Any]:
    """The checked body of a JSON file that :func:`_save` wrote."""
    if not path.parent.is_dir():
        raise DataError(
            "the data directory does not exist", str(path.parent), "give the right --data directory"
        )
    try:
        body: dict[str, Any] = json.loads(read_bounded(path, MOST_BYTES[path.name]))
    except FileNotFoundError:
        raise DataError(
            f"the data directory holds no {path.name}",
            str(path.parent),
            "if its preparation was interrupted, start the same launch/prepare_data.py again; "
            "else give a directory that it has made",
        ) from None
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", str(path), _PREPARE_AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"the file is cut or is not JSON ({error})", str(path), _PREPARE_AGAIN) from None
    version = body.get("format_version") if isinstance(body, dict) else None
    if type(version) is not int or version < 1:
        raise DataError("the file has no format_version", str(path), _PREPARE_AGAIN)
    if version > FORMAT_VERSION:
        raise DataError(
            f"the data has format version {version}; this janus_ds reads up to {FORMAT_VERSION}",
            str(path),
            "update janus_ds, or prepare the data again with this version",
        )
    if body.pop("checksum", None) != _checksum(body):
        raise DataError("the file was changed since it was written", str(path), _PREPARE_AGAIN)
    return body
