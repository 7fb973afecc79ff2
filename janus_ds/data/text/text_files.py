"""Lines of text files, plain or compressed, in constant memory, with faults told by file and line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from janus_ds.errors import DataError, MissingDependencyError

COMPRESSED_SUFFIXES = (".gz", ".xz", ".zst", ".bz2")

_LONGEST_LINE_BYTES = 64 << 20

_BUFFER_BYTES = 1 << 20
_ZSTD_PIECE_BYTES = 1 << 10

_BOM = b"\xef\xbb\xbf"


def list_inputs(paths: Sequence[Path]) -> list[Path]:
    """The files to read, in order: files as given, folders with all they hold, sorted by path.

    Raises:
        DataError: a path does not exist, or a folder holds no file.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
            if not inside:
                raise DataError("the input folder is empty", str(path), "give a folder or file with text")
            files.extend(inside)
        else:
            raise DataError("the input does not exist", str(path), "give the path of a text file or folder")
    if not files:
        raise DataError("no input is given", "--input", "give at least one text file or folder")
    return files


class TextFile:
    """One input file, read once from start to end.

    Args:
        path: the file; `.gz`, `.xz`, `.zst` and `.bz2` are decompressed on the way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._raw: IO[bytes] | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the file itself (compressed, if it is) that have been read so far."""
        return self._raw.tell() if self._raw is not None and not self._raw.closed else 0

    def lines(self) -> Iterator[str]:
        """All lines, without their line ends.

        Raises:
            DataError: text that is not UTF-8 (tells line and byte), a damaged compressed file, a
                line of more than 64 MiB, a file that cannot be read.
        """
        number, offset = 0, 0
        try:
            with self.path.open("rb") as self._raw, _decompressed(self._raw, self.path) as file:
                while line := file.readline(_LONGEST_LINE_BYTES):
                    number += 1
                    if len(line) == _LONGEST_LINE_BYTES:
                        self._refuse_long_line(number)
                    yield self._decode(line, number, offset)
                    offset += len(line)
        except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(
                f"the compressed file is cut or damaged ({error})",
                f"{self.path}, after line {number}",
                "copy or download the file again",
            ) from None
        except OSError as error:
            # bz2 tells damage as an OSError without a number.
            raise DataError(
                f"the file cannot be read ({error})",
                f"{self.path}, after line {number}",
                "check the file and its permissions",
            ) from None

    def _decode(self, line: bytes, number: int, offset: int) -> str:
        if offset == 0 and line.startswith(_BOM):
            line = line[len(_BOM) :]
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the text is not UTF-8: byte 0x{line[error.start]:02x} ({error.reason})",
                f"{self.path}, line {number}, byte {offset + error.start} of the text",
                "convert the file, for example: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE",
            ) from None

    def _refuse_long_line(self, number: int) -> None:
        raise DataError(
            f"a line is longer than {_LONGEST_LINE_BYTES >> 20} MiB",
            f"{self.path}, line {number}",
            "give text files with line breaks",
        )


def _decompressed(raw: IO[bytes], path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), _BUFFER_BYTES)
    if suffix == ".xz":
        return io.BufferedReader(lzma.LZMAFile(raw), _BUFFER_BYTES)
    if suffix == ".bz2":
        return io.BufferedReader(bz2.BZ2File(raw), _BUFFER_BYTES)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw), _BUFFER_BYTES)
    return raw


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
            self._input = self._raw.read(_BUFFER_BYTES // 8)
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
