"""Finds every kind of damage in a data directory and names shard and member.

Every byte of every shard is covered: tar headers, token and offset files, padding, the end of the
archive. Manifest and indexes carry checksums of their own, and the manifest knows the indexes.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from janus_ds.data.stream.index import INDEX_NAME, BlobEntry, Manifest, ShardEntry, SplitIndex, SplitTotals
from janus_ds.data.stream.shards import TAR_BLOCK_BYTES, unpack_member
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.errors import DataError, JanusError
from janus_ds.io import open_regular, sha256_of_file


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        place: the file, relative to the data directory.
        member: the member of the shard, where one can be named.
    """

    place: str
    member: str | None
    what: str

    def __str__(self) -> str:
        member = f", member {self.member}" if self.member else ""
        return f"{self.place}{member}: {self.what}"


@dataclass
class VerifyReport:
    """All faults, and what was looked at so far."""

    faults: list[Fault] = field(default_factory=list)
    shards: int = 0
    samples: int = 0
    tokens: int = 0
    bytes: int = 0

    def raise_if_faulty(self, directory: Path | str) -> None:
        """Raise the faults as one error.

        Raises:
            DataError: there are faults; lists the first ten.
        """
        if not self.faults:
            return
        shown = "\n    ".join(str(fault) for fault in self.faults[:10])
        more = f"\n    and {len(self.faults) - 10} more" if len(self.faults) > 10 else ""
        count = f"{len(self.faults)} fault{'s' if len(self.faults) > 1 else ''}"
        raise DataError(
            f"the data is damaged, {count}:\n    {shown}{more}",
            str(directory),
            "copy the named files again, or prepare the data again",
        )


def verify_dataset(
    directory: Path,
    progress: Callable[[float, VerifyReport], None] | None = None,
    read_shard: Callable[[str, ShardEntry], bytes] | None = None,
) -> VerifyReport:
    """Look at every byte of a data directory.

    Args:
        progress: called after each shard with the share done (0 to 1) and the report so far.
        read_shard: brings the bytes of a shard, given its split, where they do not lie in `directory`.

    Returns:
        The report; damage is in its `faults`, not raised.
    """
    report = VerifyReport()
    manifest = Manifest.load(directory)
    _check_tokenizer(directory, manifest, report)
    indexes = dict(_load_indexes(directory, manifest, report))
    total = sum(shard.size for index in indexes.values() for shard in index.shards) or 1
    for name, index in indexes.items():
        known = {shard.name for shard in index.shards} | {INDEX_NAME}
        for path in sorted((directory / name).iterdir()):
            if path.name not in known:
                report.faults.append(Fault(f"{name}/{path.name}", None, "the index knows no such file"))
        for shard in index.shards:
            report.shards += 1
            report.samples += shard.samples
            report.tokens += shard.tokens
            report.bytes += shard.size
            found = _shard_faults(directory / name, index, shard, manifest.vocab_size, read_shard)
            report.faults += [Fault(f"{name}/{shard.name}", member, what) for member, what in found]
            if progress is not None:
                progress(min(1.0, report.bytes / total), report)
    for extra in sorted(path.parent.name for path in directory.glob(f"*/{INDEX_NAME}")):
        if extra not in manifest.splits:
            report.faults.append(Fault(f"{extra}/{INDEX_NAME}", None, "the manifest knows no such split"))
    return report


def _check_tokenizer(directory: Path, manifest: Manifest, report: VerifyReport) -> None:
    try:
        tokenizer = load_tokenizer(directory / "tokenizer")
    except JanusError as error:
        report.faults.append(Fault("tokenizer", None, error.what))
        return
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        what = (
            f"the tokenizer is not the one that the data was made with (fingerprint "
            f"{tokenizer.fingerprint[:12]}, the manifest says {manifest.tokenizer_fingerprint[:12]})"
        )
        report.faults.append(Fault("tokenizer", None, what))


def _load_indexes(
    directory: Path, manifest: Manifest, report: VerifyReport
) -> Iterator[tuple[str, SplitIndex]]:
    for name, totals in manifest.splits.items():
        place = f"{name}/{INDEX_NAME}"
        try:
            index = SplitIndex.load(directory / name)
        except JanusError as error:
            report.faults.append(Fault(place, None, error.what))
            continue
        found = SplitTotals(
            len(index.shards), index.samples, index.tokens, sha256_of_file(directory / name / INDEX_NAME)
        )
        if found != totals:
            what = "the index is not the one that the manifest was written with (swapped or from elsewhere)"
            report.faults.append(Fault(place, None, what))
        yield name, index


def _shard_faults(
    folder: Path,
    index: SplitIndex,
    shard: ShardEntry,
    vocab_size: int,
    read_shard: Callable[[str, ShardEntry], bytes] | None,
) -> list[tuple[str | None, str]]:
    """What is wrong with one shard, each with the member where one can be named."""
    try:
        # One shard is tens of MB: read whole, so that each byte is read once.
        if read_shard is not None:
            data = read_shard(folder.name, shard)
            size, digest = len(data), hashlib.sha256(data).hexdigest()
        else:
            data, size, digest = _read_shard(folder / shard.name, shard.size)
    except DataError as error:
        return [(None, error.what)]
    except FileNotFoundError:
        return [(None, "the shard is missing")]
    except OSError as error:
        return [(None, f"the shard cannot be read ({error.strerror})")]
    other = next((other.name for other in index.shards if other.sha256 == digest), shard.name)
    if digest != shard.sha256 and other != shard.name:
        return [(None, f"the file holds the bytes of {other}: swapped")]
    found = list(_member_faults(data, index, shard, vocab_size))
    if size != shard.size:
        kind = "cut" if size < shard.size else "longer than it should be"
        return [(None, f"the shard is {kind}: {size} bytes, the index says {shard.size}"), *found]
    ends = [_padded_end(blob) for member in shard.members for blob in member.blobs.values()]
    if any(data[max(ends, default=0) :]):
        found.append((None, "the end of the archive is damaged"))
    if digest != shard.sha256 and not found:
        found.append((None, "the bytes differ from those that were written (SHA-256 differs)"))
    return found


def _read_shard(path: Path, most: int) -> tuple[bytes, int, str]:
    """The first `most` bytes of a regular file, its size, and its SHA-256."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(most)
    digest = hashlib.sha256(data).hexdigest() if size <= most else sha256_of_file(path)
    return data, size, digest


def _member_faults(
    data: bytes, index: SplitIndex, shard: ShardEntry, vocab_size: int
) -> Iterator[tuple[str | None, str]]:
    for member in shard.members:
        try:
            rows = unpack_member(member, index, lambda b: data[b.offset : b.offset + b.size], shard.name)
        except DataError as error:
            yield member.key, error.what
            continue
        for stream, ragged in rows.items():
            if ragged.values.max(initial=0) >= vocab_size:
                yield member.key, f"stream {stream!r} holds ids beyond the vocabulary"
        for name, blob in member.blobs.items():
            if not _header_fits(data, f"{member.key}.{name}", blob):
                yield member.key, f"the tar header of {member.key}.{name} is damaged"
            elif any(data[blob.offset + blob.size : _padded_end(blob)]):
                yield member.key, f"the padding after {member.key}.{name} is damaged"


def _padded_end(blob: BlobEntry) -> int:
    return -(-(blob.offset + blob.size) // TAR_BLOCK_BYTES) * TAR_BLOCK_BYTES


def _header_fits(data: bytes, name: str, blob: BlobEntry) -> bool:
    raw = data[blob.offset - TAR_BLOCK_BYTES : blob.offset]
    try:
        header = tarfile.TarInfo.frombuf(raw, tarfile.ENCODING, "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        return False
    # Written again, for the bytes that the header's own checksum does not cover.
    same = header.tobuf(tarfile.USTAR_FORMAT) == raw
    return same and header.name == name and header.size == blob.size
