"""Bytes of an input, from disk or from afar, decompressed on the way, in constant memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, cast

from janus_ds.config.locations import expanded
from janus_ds.data.stream.fetch import Patience
from janus_ds.data.stream.remote import Transfer, TransferError, open_transfer
from janus_ds.errors import MissingDependencyError

BUFFER_BYTES = 1 << 20
_ZSTD_PIECE_BYTES = 1 << 10

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")

_MAGIC = {
    ".gz": b"\x1f\x8b\x08",
    ".xz": b"\xfd7zXZ\x00",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".bz2": b"BZh",
}
_BZ2_BLOCK = b"1AY&SY"


def buffered(raw: io.BufferedIOBase | io.RawIOBase) -> io.BufferedReader:
    """A reader that shows its first bytes by `peek`."""
    return io.BufferedReader(cast(io.RawIOBase, raw), BUFFER_BYTES)


def decompressed(raw: io.BufferedReader, name: str) -> io.BufferedReader:
    """What a stream holds, by the name of its file or else by its first bytes.

    Args:
        raw: at its start.
        name: file name or address; `.tgz` counts as `.gz`.
    """
    suffix = Path(name).suffix.lower().replace(".tgz", ".gz")
    if suffix not in _MAGIC:
        head = raw.peek(16)
        found = (suffix for suffix, magic in _MAGIC.items() if head.startswith(magic))
        suffix = next(found, "")
        if suffix == ".bz2" and head[4:10] != _BZ2_BLOCK:
            suffix = ""
    if suffix == ".gz":
        return buffered(gzip.GzipFile(fileobj=raw))
    if suffix == ".xz":
        return buffered(lzma.LZMAFile(raw))
    if suffix == ".bz2":
        return buffered(bz2.BZ2File(raw))
    return buffered(_ZstdReader(raw)) if suffix == ".zst" else raw


class _ZstdReader(io.RawIOBase):
    """Decompresses zstd frames; unlike the package's own reader, it notices a cut file."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output and self._advance():
            pass
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _advance(self) -> bool:
        """Decompress one more piece; False at the end of the file."""
        if not self._input:
            self._input = self._raw.read(BUFFER_BYTES // 8)
        if not self._input:
            if self._frame is not None:
                raise EOFError("the last zstd frame has no end")
            return False
        zstandard = _zstandard()
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            # In small pieces: four bytes can stand for 128 KiB, and each piece is expanded at once.
            piece, self._input = self._input[:_ZSTD_PIECE_BYTES], self._input[_ZSTD_PIECE_BYTES:]
            self._output = memoryview(self._frame.decompress(piece))
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        if self._frame.eof:
            self._input = self._frame.unused_data + self._input
            self._frame = None
        return True


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise MissingDependencyError(
            "reading .zst files needs the package zstandard", "import zstandard", "pip install zstandard"
        ) from None
    return zstandard


class RemoteBytes(io.RawIOBase):
    """A distant file or a command's output, read once; a transfer that breaks off is continued."""

    def __init__(self, location: str, patience: Patience) -> None:
        self._location, self._patience = expanded(location), patience
        self._transfer = ExitStack()
        self._chunks: Iterator[bytes] | None = None
        self._rest = memoryview(b"")
        self._at, self._total, self._tries = 0, None, 0

    _total: int | None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, less at the end only."""
        filled = 0
        while filled < len(buffer) and (self._rest or self._advance()):
            size = min(len(buffer) - filled, len(self._rest))
            buffer[filled : filled + size] = self._rest[:size]
            self._rest, filled = self._rest[size:], filled + size
        return filled

    def close(self) -> None:
        """End the transfer."""
        self._transfer.close()
        super().close()

    def _advance(self) -> bool:
        """The next chunk; False at the end."""
        while True:
            try:
                if self._chunks is None:
                    self._chunks = self._begin()
                chunk = next(self._chunks, b"")
                if not chunk and self._total is not None and self._at < self._total:
                    raise TransferError(f"the transfer ended after {self._at:,} of {self._total:,} bytes")
            except TransferError as fault:
                self._tries += 1
                self._transfer.close()
                self._chunks = None
                if not fault.passing or self._tries > self._patience.retries:
                    raise
                self._patience.pause(self._tries)
                continue
            self._tries = 0 if chunk else self._tries
            self._at, self._rest = self._at + len(chunk), memoryview(chunk)
            return bool(chunk)

    def _begin(self) -> Iterator[bytes]:
        """Chunks from the position on; what the other side sends again is passed over."""
        asked = open_transfer(self._location, self._at, self._patience.stall_seconds)
        transfer: Transfer = self._transfer.enter_context(asked)
        self._total, skip = transfer.total, self._at - transfer.start

        def fresh() -> Iterator[bytes]:
            nonlocal skip
            for chunk in transfer.chunks:
                kept, skip = chunk[skip:], max(0, skip - len(chunk))
                if kept:
                    yield kept

        return fresh()


_BLOCK = 512
_MOST_HEADER_BYTES = 1 << 20
_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_MANY_DIGITS = re.compile(rb"(?<!\d)\d{400}")
"""On which `tarfile` of some Python versions takes hours."""


class TarBytes(io.RawIOBase):
    """A tar read to its end once, which knows the size of the file whose header came last.

    Sizes are looked at before a reader of tars trusts them: of long names and other headers, and of
    sparse files, which stand for more bytes than there are.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._left = stream, 0
        self._pax: int | None = None
        self.size = 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next bytes, never beyond the next header.

        Raises:
            EOFError: a header is larger than 1 MiB, or a file is sparse.
        """
        if self._left:
            data = self._stream.read(min(self._left, size if size > 0 else BUFFER_BYTES))
            self._left -= len(data)
            return data
        header = self._stream.read(_BLOCK)
        if len(header) == _BLOCK and any(header):
            return header + self._header(header)
        return header

    def _header(self, header: bytes) -> bytes:
        """Look at a header; returns the bytes of one that belongs to the next file."""
        field, kind = header[124:136], header[156:157]
        try:
            size = (
                int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b" \0") or b"0", 8)
            )
        except ValueError:
            raise EOFError("a header is damaged") from None
        padded = -(-size // _BLOCK) * _BLOCK
        if kind in b"xXgLK":
            if size > _MOST_HEADER_BYTES:
                raise EOFError(f"a header has {size:,} bytes")
            record = self._stream.read(padded)
            if b"GNU.sparse" in record:
                raise EOFError("a file is sparse")
            if kind in b"xXg":
                found = _pax_size(record.rstrip(b"\0"))
                if (kind == b"g" and found is not None) or self._pax is not None:
                    raise EOFError("a header gives the size of more than one file")
                self._pax = found
            return record
        if kind == b"S":
            raise EOFError("a file is sparse")
        self.size = size if self._pax is None else self._pax
        self._pax = None
        if kind not in b"123456":  # links, devices, folders, FIFOs: nothing follows
            self._left = -(-self.size // _BLOCK) * _BLOCK
        return b""


def _pax_size(records: bytes) -> int | None:
    """The size that a pax header gives the next file; None where it gives none.

    Raises:
        EOFError: it has not the one form that readers of tars cannot take for different things.
    """
    place, found = 0, None
    while place < len(records):
        head = _RECORD.match(records, place)
        end = place + int(head[1]) if head else 0
        value = records[head.end() : end - 1] if head else b""
        is_size = head is not None and head[2] == b"size"
        whole = head is not None and head.end() < end <= len(records) and records[end - 1 : end] == b"\n"
        if not whole or (is_size and not (value.isdigit() and len(value) < 20)) or _MANY_DIGITS.search(value):
            raise EOFError("a header is damaged")
        place, found = end, int(value) if is_size else found
    return found
