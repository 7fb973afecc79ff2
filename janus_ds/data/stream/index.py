"""What lies on disk: the manifest of a data directory and the index of each split.

`OUT/manifest.json` says what the data is (task, tokenizer, settings, totals); `OUT/SPLIT/index.json`
lists every shard with size, SHA-256 and, for each packed member, where its bytes are and their
CRC-32. Both files carry a checksum of themselves, so that a change in them is found as well.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from janus_ds.config.fields import OneOf
from janus_ds.config.locations import checked_name
from janus_ds.errors import DataError
from janus_ds.io import fingerprint_of, read_json, write_atomic

FORMAT_VERSION = 1
"""Version of the layout on disk; higher ones are refused."""

INDEX_NAME = "index.json"

MANIFEST_NAME = "manifest.json"

MOST_BYTES = {MANIFEST_NAME: 64 << 20, INDEX_NAME: 256 << 20}
"""Largest manifest and index that are read, here or from afar; an index needs about 300 bytes a member."""

STRICT = ConfigDict(strict=True)
"""Of all that is read: no text, truth value or fraction where a whole number should be."""

Name = Annotated[str, AfterValidator(checked_name)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
Sum = Annotated[int, Field(ge=0, le=1 << 62)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_T = TypeVar("_T")
_PREPARE_AGAIN = "prepare the data again with `janus-ds prepare`, or copy the whole directory again"


@dataclass(frozen=True, config=STRICT)
class BlobEntry:
    """One file of a member: its bytes lie at `offset` in the shard's tar."""

    offset: Count
    size: Annotated[int, Field(ge=0, lt=1 << 31)]
    crc32: Annotated[int, Field(ge=0, lt=1 << 32)]


@dataclass(frozen=True, config=STRICT)
class MemberEntry:
    """One packed member: many samples under one tar key.

    `blobs` is keyed by the part of the file name after the key: "target.tokens",
    "target.offsets" and, for pairs, the same for "source". `tokens` counts all streams.
    """

    key: Name
    samples: Count
    tokens: Count
    blobs: dict[Name, BlobEntry]


@dataclass(frozen=True, config=STRICT)
class ShardEntry:
    """One tar file with its size in bytes, SHA-256 and members in order."""

    name: Name
    size: Count
    sha256: _Sha256
    samples: Count
    tokens: Count
    members: tuple[MemberEntry, ...]


def _sound(shard: ShardEntry) -> ShardEntry:
    """The entry; a ValueError where bytes lie outside of the shard, or sums do not agree."""
    for name in ("samples", "tokens"):
        if getattr(shard, name) != sum(getattr(member, name) for member in shard.members):
            raise ValueError(f"the {name} of {shard.name} are not the sum over its members")
    for member in shard.members:
        # An offset is four bytes, a token two or more, so a member can claim no more than its shard holds.
        if member.samples > shard.size // 4 or member.tokens > shard.size:
            raise ValueError(f"member {member.key} has more samples or tokens than {shard.name} can hold")
        for name, blob in member.blobs.items():
            if blob.offset + blob.size > shard.size:
                raise ValueError(f"{name} ends behind the end of {shard.name}")
    return shard


SoundShard = Annotated[ShardEntry, AfterValidator(_sound)]
"""An entry from a file, whose numbers fit together."""


def _known_streams(streams: tuple[str, ...]) -> tuple[str, ...]:
    if streams not in (("target",), ("source", "target")):
        raise ValueError("these are no streams")
    return streams


@dataclass(frozen=True, config=STRICT)
class SplitIndex:
    """All shards of one split, in the order that numbers its samples.

    Args:
        stream_dtype: "uint16" or "uint32", the type of the token files (little endian).
        streams: ("target",) for blocks of text, ("source", "target") for pairs.
    """

    stream_dtype: Annotated[str, OneOf("uint16", "uint32")]
    streams: Annotated[tuple[str, ...], AfterValidator(_known_streams)]
    shards: tuple[SoundShard, ...]

    @property
    def samples(self) -> int:
        """Samples of the split."""
        return sum(shard.samples for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Tokens of the split over all streams, without specials."""
        return sum(shard.tokens for shard in self.shards)

    def member_sizes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """int64: samples of each member over all shards, in order."""
        return np.array([member.samples for shard in self.shards for member in shard.members], dtype=np.int64)

    def save(self, split_dir: Path) -> str:
        """Write `split_dir/index.json` whole; returns its SHA-256."""
        return _save(split_dir / INDEX_NAME, asdict(self))

    @classmethod
    def load(cls, split_dir: Path) -> SplitIndex:
        """Read `split_dir/index.json`."""
        return _load(split_dir / INDEX_NAME, cls)


@dataclass(frozen=True, config=STRICT)
class SplitTotals:
    """Counts of one split as the manifest tells them, and the SHA-256 of its index."""

    shards: Count
    samples: Count
    tokens: Sum
    index_sha256: _Sha256


@dataclass(frozen=True, config=STRICT)
class Manifest:
    """What a data directory is.

    Args:
        task: "denoise" (blocks of text) or "pair" (source and target).
        tokenizer_fingerprint: `Tokenizer.fingerprint` of OUT/tokenizer.
        vocab_size: number of symbols of the tokenizer.
        settings: the settings that the data was prepared with, and counts for information.
        splits: totals by split name.
    """

    task: Annotated[str, OneOf("denoise", "pair")]
    tokenizer_fingerprint: _Sha256
    vocab_size: Annotated[int, Field(ge=1, le=1 << 31)]
    settings: dict[str, Any]
    splits: dict[Name, SplitTotals]

    def save(self, directory: Path) -> None:
        """Write `directory/manifest.json` whole: the last file that a preparation writes."""
        _save(directory / MANIFEST_NAME, asdict(self))

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read `directory/manifest.json`."""
        return _load(directory / MANIFEST_NAME, cls)


def is_lower_cased(directory: str | Path | None) -> bool:
    """Whether a data directory's text was lower-cased; False where no manifest is at hand to tell."""
    with suppress(DataError):
        return bool(directory and Manifest.load(Path(directory)).settings.get("lowercase"))
    return False


def _checksum(body: dict[str, Any]) -> str:
    return fingerprint_of(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _save(path: Path, fields: dict[str, Any]) -> str:
    body = {"format_version": FORMAT_VERSION, **fields}
    data = (json.dumps({**body, "checksum": _checksum(body)}, sort_keys=True) + "\n").encode()
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def _load(path: Path, kind: type[_T]) -> _T:
    """What :func:`_save` wrote, every name and number checked."""
    if not path.parent.is_dir():
        raise DataError(
            "the data directory does not exist",
            str(path.parent),
            "give a directory made by `janus-ds prepare`",
        )
    try:
        body = read_json(path, MOST_BYTES[path.name])
    except FileNotFoundError:
        fix = "if its preparation was interrupted, start the same `janus-ds prepare` again; "
        fix += "else give a directory that it has made"
        if path.name == INDEX_NAME and (path.parent / MANIFEST_NAME).is_file():
            fix = f"name a split in it, such as {path.parent / 'valid'}"
        raise DataError(f"the data directory holds no {path.name}", str(path.parent), fix) from None
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror})", str(path), _PREPARE_AGAIN) from None
    except ValueError as error:
        raise DataError(f"the file is cut or is not JSON ({error})", str(path), _PREPARE_AGAIN) from None
    version = body.get("format_version")
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
    try:
        return TypeAdapter(kind).validate_json(json.dumps(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part)[:60] for part in first["loc"])
        what = f"a field is missing or odd ({place}: {first['msg'][:200]})"
        raise DataError(what, str(path), _PREPARE_AGAIN) from None
