"""What lies on disk: the manifest of a data directory and the index of each split.

`OUT/manifest.json` says what the data is (task, tokenizer, settings, totals); `OUT/SPLIT/index.json`
lists every shard with size, SHA-256 and, for each packed member, where its bytes are and their
CRC-32. Both files carry a checksum of themselves, so that a change in them is found as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from janus_ds.config.locations import checked_name
from janus_ds.errors import DataError
from janus_ds.io import fingerprint_of, write_atomic

__all__ = [
    "FORMAT_VERSION",
    "INDEX_NAME",
    "MANIFEST_NAME",
    "BlobEntry",
    "Manifest",
    "MemberEntry",
    "ShardEntry",
    "SplitIndex",
    "SplitTotals",
    "shard_entry",
]

FORMAT_VERSION = 1
"""Version of the layout on disk; higher ones are refused."""

INDEX_NAME = "index.json"

MANIFEST_NAME = "manifest.json"

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
                streams=tuple(body["streams"]),
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
                tokenizer_fingerprint=str(body["tokenizer_fingerprint"]),
                vocab_size=int(body["vocab_size"]),
                settings=dict(body["settings"]),
                splits={checked_name(name): SplitTotals(**totals) for name, totals in body["splits"].items()},
            )


class _Garbled:
    """Context that turns a missing or odd field into a DataError about `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, AttributeError)):
            raise DataError(
                f"a field is missing or odd ({error!r})", str(self._path), _PREPARE_AGAIN
            ) from error


def _one_of(value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{value!r} is none of {', '.join(allowed)}")
    return value


def shard_entry(shard: dict[str, Any]) -> ShardEntry:
    """The entry that `dataclasses.asdict` and JSON have made a dict of."""
    members = tuple(
        MemberEntry(
            key=str(member["key"]),
            samples=int(member["samples"]),
            tokens=int(member["tokens"]),
            blobs={name: BlobEntry(**blob) for name, blob in member["blobs"].items()},
        )
        for member in shard["members"]
    )
    return ShardEntry(
        name=checked_name(shard["name"]),
        size=int(shard["size"]),
        sha256=str(shard["sha256"]),
        samples=int(shard["samples"]),
        tokens=int(shard["tokens"]),
        members=members,
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
        body: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"the data directory holds no {path.name}",
            str(path.parent),
            "if its preparation was interrupted, start the same launch/prepare_data.py again; "
            "else give a directory that it has made",
        ) from None
    except ValueError as error:
        raise DataError(f"the file is cut or is not JSON ({error})", str(path), _PREPARE_AGAIN) from None
    version = body.get("format_version") if isinstance(body, dict) else None
    if not isinstance(version, int):
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
