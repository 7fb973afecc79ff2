"""Bytes of an input, from disk or from afar, decompressed on the way, in constant memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, Any, cast

from janus_ds.errors import MissingDependencyError

BUFFER_BYTES = 1 << 20
_ZSTD_PIECE_BYTES = 1 << 10

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")
DAMAGE = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile)
"""What reading a cut or damaged file raises; of bz2, an OSError without a number comes besides."""

_MAGIC = {
    ".gz": b"\x1f\x8b\x08",
    ".xz": b"\xfd7zXZ\x00",
    ".zst": b"\x28\xb5\x2f\xfd",
    ".bz2": b"BZh",
}
_BZ2_BLOCK = b"1AY&SY"
_STREAMS: dict[str, Callable[[], Any]] = {".xz": lzma.LZMADecompressor, ".bz2": bz2.BZ2Decompressor}


def buffered(raw: io.BufferedIOBase | io.RawIOBase) -> io.BufferedReader:
    """A reader that shows its first bytes by `peek`."""
    return io.BufferedReader(cast(io.RawIOBase, raw), BUFFER_BYTES)


def decompressed(raw: io.BufferedReader, name: str) -> io.BufferedReader:
    """What a stream holds, by the name of its file or else by its first bytes.

    Args:
        raw: at its start.
        name: file name or address; `.tgz` counts as `.gz`.

    Raises:
        EOFError: nothing, of which gzip and zstd would make no text without a word.
    """
    suffix, head = Path(name).suffix.lower().replace(".tgz", ".gz"), raw.peek(16)
    if suffix in _MAGIC and not head:
        raise EOFError("it has no bytes")
    if suffix not in _MAGIC:
        found = (suffix for suffix, magic in _MAGIC.items() if head.startswith(magic))
        suffix = next(found, "")
        if suffix == ".bz2" and head[4:10] != _BZ2_BLOCK:
            suffix = ""
    if suffix == ".gz":
        return buffered(gzip.GzipFile(fileobj=raw))
    if suffix in _STREAMS:
        return buffered(ByteStream(_stream_pieces(raw, _STREAMS[suffix])))
    return buffered(ByteStream(_zstd_pieces(raw))) if suffix == ".zst" else raw


class ByteStream(io.RawIOBase):
    """The bytes that a generator gives, as a file; it is closed with it."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, less at the end only."""
        filled = 0
        while filled < len(buffer):
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = memoryview(piece)
            size = min(len(buffer) - filled, len(self._rest))
            buffer[filled : filled + size] = self._rest[:size]
            self._rest, filled = self._rest[size:], filled + size
        return filled

    def close(self) -> None:
        """End the generator."""
        self._pieces.close()
        super().close()


def _stream_pieces(raw: IO[bytes], new: Callable[[], Any]) -> Generator[bytes, None, None]:
    """What streams hold, one after the other; at a damaged one Python's own readers end without a word."""
    data = b""
    while True:
        # Between streams of xz there may be zeros, more than are read at once.
        while not (data := data.lstrip(b"\0")):
            if not (data := raw.read(BUFFER_BYTES)):
                return
        stream = new()
        while not stream.eof:
            if stream.needs_input and not data and not (data := raw.read(BUFFER_BYTES)):
                raise EOFError("the last stream has no end")
            yield stream.decompress(data, BUFFER_BYTES)
            data = b""
        data = stream.unused_data


def _zstd_pieces(raw: IO[bytes]) -> Generator[bytes, None, None]:
    """What zstd frames hold; unlike the package's own reader, this notices a cut file."""
    try:
        import zstandard
    except ImportError:
        raise MissingDependencyError(
            "reading .zst files needs the package zstandard", "import zstandard", "pip install zstandard"
        ) from None
    frame: Any = None
    data = b""
    while data := data or raw.read(BUFFER_BYTES // 8):
        # Windows as large as `zstd --long=31` writes them.
        frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        # In small pieces: four bytes can stand for 128 KiB, and each piece is expanded at once.
        piece, data = data[:_ZSTD_PIECE_BYTES], data[_ZSTD_PIECE_BYTES:]
        try:
            found = frame.decompress(piece)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        if frame.eof:
            data, frame = frame.unused_data + data, None
        yield found
    if frame is not None:
        raise EOFError("the last zstd frame has no end")


_MOST_HEADER_BYTES = 1 << 20
_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_TEXT_FILE = re.compile(r"((?:.*/)?[^./]+)\.((?:[^/]*\.)?(?:txt|json))", re.IGNORECASE | re.DOTALL)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_FOR_THE_NEXT = (*_PAX, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_WITHOUT_BYTES = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders, FIFOs."""


def tar_samples(stream: IO[bytes], most: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a WebDataset tar in reading order: each key with its .txt and .json files by extension.

    Python's `tarfile` trusts sizes that a header claims, and takes hours over some; here all are bounded.

    Args:
        most: bytes that the texts of a sample may have together.

    Raises:
        EOFError: the tar is cut, or a header, or the texts of a sample, are too large.
        tarfile.TarError: a header is damaged, or a file is sparse.
    """
    key, files, left = "", dict[str, bytes](), most
    while (entry := _next_file(stream)) is not None:
        name, size = entry
        found = _TEXT_FILE.fullmatch(name)
        if found is None:
            _skip(stream, size)
            continue
        if found[1] != key and files:
            yield key, files
            files, left = {}, most
        key, extension, left = found[1], found[2].lower(), left - size
        if left < 0:
            raise EOFError(f"the texts of a sample are larger than {most >> 20} MiB, with {name[-200:]}")
        if extension in files:
            raise EOFError(f"two files are called {name[-200:]}")
        files[extension] = _exactly(stream, size)
    if files:
        yield key, files


def _next_file(stream: IO[bytes]) -> tuple[str, int] | None:
    """Name and size of the next regular file, whose bytes come next in the stream; None at the end."""
    told: dict[bytes, bytes] = {}
    while any(block := stream.read(tarfile.BLOCKSIZE)):
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        kind, size = header.type, header.size
        if kind in _FOR_THE_NEXT:
            if not 0 <= size <= _MOST_HEADER_BYTES:
                raise EOFError(f"a header has {size:,} bytes")
            data = _exactly(stream, size)
            if kind in _PAX:
                found = _records(data)
                if kind == tarfile.XGLTYPE and b"size" in found:
                    raise EOFError("a header gives the size of more than one file")
                told |= {} if kind == tarfile.XGLTYPE else found
            elif kind == tarfile.GNUTYPE_LONGNAME:
                told[b"path"] = data.rstrip(b"\0")
            continue
        if kind == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse") for key in told):
            raise EOFError("a file is sparse")
        if (value := told.get(b"size")) is not None:
            size = int(value) if value.isdigit() and len(value) < 20 else -1
        if size < 0:
            raise EOFError("a header is damaged")
        name = told[b"path"].decode("utf-8", "surrogateescape") if b"path" in told else header.name
        if header.isreg():
            return name, size
        if kind not in _WITHOUT_BYTES:
            _skip(stream, size)
        told = {}
    return None


def _records(data: bytes) -> dict[bytes, bytes]:
    """The records of a pax header, each "LENGTH KEY=VALUE\\n" with its own length in bytes."""
    place, found = 0, {}
    while place < len(data):
        head = _RECORD.match(data, place)
        end = place + int(head[1]) if head else 0
        if head is None or not head.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise EOFError("a header is damaged")
        found[head[2]] = data[head.end() : end - 1]
        place = end
    return found


def _exactly(stream: IO[bytes], size: int) -> bytes:
    """The next bytes of a tar; what fills up their last block is passed over."""
    data = stream.read(size + -size % tarfile.BLOCKSIZE)
    if len(data) < size:
        raise EOFError("it ends inside a file")
    return data[:size]


def _skip(stream: IO[bytes], size: int) -> None:
    for start in range(0, size, BUFFER_BYTES):
        _exactly(stream, min(BUFFER_BYTES, size - start))
