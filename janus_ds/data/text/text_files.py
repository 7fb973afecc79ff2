"""Input files, plain or compressed, here or afar, in constant memory, with faults told by file and line."""

from __future__ import annotations

import codecs
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import IO

from janus_ds.config.locations import (
    PIPE,
    expanded,
    is_remote,
    location_key,
    public_location,
    split_address,
    user_path,
)
from janus_ds.data.stream.remote import Expected, Patience, TransferError, transferred
from janus_ds.data.text.byte_streams import (
    BUFFER_BYTES,
    COMPRESSED_SUFFIXES,
    DAMAGE,
    ByteStream,
    buffered,
    decompressed,
)
from janus_ds.errors import DataError

LONGEST_TEXT_BYTES = 64 << 20
"""Most of one line, one JSON value, one file in a tar."""

_MOST_INPUTS = 1_000_000

_PIPE_PATIENCE = Patience(stall_seconds=3600.0)
"""Of a command, which may be silent for long before it writes, as `sort` is."""

_BRACES = re.compile(r"\{(?:(\d{1,12})\.\.(\d{1,12})|([^{},\s$]*(?:,[^{},\s$]*)+))\}", re.ASCII)

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")

_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_UTF_32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_FOREIGN = {
    b"%PDF-": "a PDF file",
    b"PK\x03\x04": "a ZIP archive (such as .docx, .epub, .npz)",
    b"\xd0\xcf\x11\xe0": "an Office file",
    b"\x7fELF": "a program",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"RIFF": "a RIFF file (sound, video or a picture)",
    b"OggS": "an Ogg file",
    b"ID3": "an MP3 file",
    b"SQLite format 3": "an SQLite database",
    b"ARROW1": "an Arrow file",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"PAR1": "a Parquet file",
}


def list_inputs(paths: Sequence[Path | str], output: Path | None = None) -> list[Path | str]:
    """The files to read, in order: files as given, folders with all they hold, sorted by path.

    Linked folders are entered; what is hidden (`.name`, `lost+found`) in a folder is not. Of a folder no file
    is read twice; of one that holds Parquet files, as those of the Hugging Face hub, these alone are read.
    `{000..099}` and `{a,b}` are expanded. Addresses and `pipe:` commands stay text.

    Args:
        output: what is made of the files; a folder that it lies in is read without it.

    Raises:
        DataError: a path or a link's target does not exist, or a folder holds no file or cannot be read.
    """
    files: list[Path | str] = []
    for given in paths:
        for location in [str(given)] if os.path.exists(given) else _expanded_braces(str(given)):
            if is_remote(location):
                files.append(location)
                continue
            path = user_path(location)
            if os.path.isfile(path):  # unlike `Path.is_file`, also of a name that is too long for any file
                files.append(path)
            elif os.path.isdir(path):
                files.extend(_inside(path, output))
            else:
                there = (
                    "is neither a file nor a folder"
                    if os.path.exists(path) or str(path) == "-"
                    else "does not exist"
                )
                fix = "give the path of a text file or folder, or 'pipe:COMMAND', which writes text"
                raise DataError(f"the input {there}", str(path), fix)
    if not files:
        raise DataError("no input is given", "--input", "give at least one text file or folder")
    return files


def _expanded_braces(text: str) -> list[str]:
    """A pattern's names, as the shell and WebDataset expand {000..099} and {a,b}; others stay as they are.

    So do words in quotes of a command: `grep -v '^.{0,20}$'`.
    """
    pieces, at, count = list[list[str]](), 0, 1
    for found in _BRACES.finditer(text):
        begun = _QUOTED.sub("", text[: found.start()])
        if not found[1] and text.startswith(PIPE) and ("'" in begun or '"' in begun):
            continue
        words = (found[3] or "").split(",")
        if found[1]:
            ends = found[1], found[2]
            first, last = map(int, ends)
            width = max(map(len, ends)) if any(len(end) > 1 and end[0] == "0" for end in ends) else 0
            if (abs(last - first) + 1) * count > _MOST_INPUTS:
                what = f"the pattern names more than {_MOST_INPUTS:,} files"
                fix = "give the number of the last file, as in {000..099}"
                raise DataError(what, public_location(text), fix)
            step = 1 if first <= last else -1
            words = [f"{n:0{width}}" for n in range(first, last + step, step)]
        pieces += [[text[at : found.start()]], words]
        at, count = found.end(), count * len(words)
    return ["".join(parts) for parts in product(*pieces, [text[at:]])]


def _inside(folder: Path, output: Path | None) -> list[Path]:
    found: list[Path] = []
    own = os.path.realpath(output) if output else None
    for here, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        place = Path(here)
        above = {os.path.realpath(place), *map(str, Path(os.path.realpath(place)).parents)}
        # A link to a folder that it lies in would never end.
        folders[:] = [
            name
            for name in folders
            # `lost+found`, at the top of a disk, is the administrator's alone.
            if not name.startswith(".")
            and name != "lost+found"
            and (real := os.path.realpath(place / name)) != own
            and not ((place / name).is_symlink() and real in above)
        ]
        paths = [place / name for name in names if not name.startswith(".")]
        if lost := next((path for path in paths if not path.exists()), None):
            what, fix = "a link in the input folder leads to nothing", "mount or restore what it leads to"
            raise DataError(what, str(lost), f"{fix}, or remove the link")
        found += [path for path in paths if path.is_file()]
    parquet = [path for path in found if path.suffix.lower() == ".parquet"]
    if not found:
        raise DataError("the input folder is empty", str(folder), "give a folder or file with text")
    return _each_once(parquet or found)


def _each_once(paths: list[Path]) -> list[Path]:
    """In order; a file that several links lead to comes once, one that is there compressed too is refused."""
    there = set(paths)
    twice = next((p for p in paths if p.suffix in COMPRESSED_SUFFIXES and p.with_suffix("") in there), None)
    if twice is not None:
        what = "a file lies there compressed and not, so that its text would come twice"
        raise DataError(what, str(twice), "remove one of the two, or name the files to read")
    return sorted({os.path.realpath(path): path for path in sorted(paths, reverse=True)}.values())


def _refuse_folder(error: OSError) -> None:
    fix = "change its permissions, or name the files to read"
    raise DataError(f"the input folder cannot be read ({error.strerror})", str(error.filename), fix) from None


class TextFile:
    """One input file, read once from start to end.

    Args:
        location: a file, or the address or `pipe:` command of a distant one; `.gz`, `.xz`, `.zst` and
            `.bz2` are decompressed on the way.

    Attributes:
        where: the file as messages name it.
        name: its name, as a preparation remembers it (`location_key` of what comes from afar); bytes of it
            that are not UTF-8 stand as `\\xe9`, since JSON cannot hold them.
        size: its bytes on disk; 0 for what comes from afar.
        changed: time of its last change in ns; 0 for what comes from afar.
        behind: how far reading has come, for messages.
    """

    def __init__(self, location: Path | str) -> None:
        self.location = location
        self.where = public_location(str(location))
        self.size = self.changed = 0
        if isinstance(location, Path):
            state = location.stat()
            self.name = os.fsencode(location.name).decode("utf-8", "backslashreplace")
            self.size, self.changed = state.st_size, state.st_mtime_ns
            self._path = location.name
        else:
            self.name = location_key(location)
            self._path = self.where if location.startswith(PIPE) else split_address(location).path
        self._raw: IO[bytes] | None = None
        self.behind = "at its beginning"

    @property
    def suffix(self) -> str:
        """The last part of the name but compression, in lower case: ".jsonl"."""
        suffixes = [s for s in Path(self._path.lower()).suffixes if s not in COMPRESSED_SUFFIXES]
        return suffixes[-1].replace(".tgz", ".tar") if suffixes else ""

    @property
    def bytes_read(self) -> int:
        """Bytes of the file itself (compressed, if it is) that have been read so far."""
        readable = self._raw is not None and not self._raw.closed and self.size
        return self._raw.tell() if readable and self._raw is not None else 0

    @contextmanager
    def opened(self) -> Iterator[io.BufferedReader]:
        """What the file holds, decompressed.

        Raises:
            DataError: it cannot be read, is damaged (the place is the one last told to :meth:`at`), or is
                still being written.
        """
        try:
            with closing(self._open()) as raw, decompressed(raw, self._path) as stream:
                yield stream
            if isinstance(self.location, Path) and self.location.stat().st_size != self.size:
                what, fix = "the file has changed its size while it was read", "start again when it is whole"
                raise DataError(what, self.where, fix)
        except DAMAGE as error:
            raise DataError(
                f"the compressed file is cut or damaged ({error})",
                f"{self.where}, {self.behind}",
                "copy or download the file again",
            ) from None
        except TransferError as error:
            raise DataError(
                f"the input cannot be fetched: {error}",
                f"{self.where}, {self.behind}",
                "look whether the address or command is right; the same command again goes on",
            ) from None
        except OSError as error:
            # bz2 tells damage as an OSError without a number.
            raise DataError(
                f"the file cannot be read ({error})",
                f"{self.where}, {self.behind}",
                "check the file and its permissions",
            ) from None

    def at(self, place: str) -> None:
        """Remember how far reading has come, for messages."""
        self.behind = place

    def lines(self) -> Iterator[str]:
        """All lines, without their line ends: a line ends at a newline, with or without a carriage return.

        Raises:
            DataError: text that is not UTF-8 (tells line and byte), a damaged compressed file, a
                line of more than 64 MiB, a file that cannot be read.
        """
        with self.opened() as stream:
            yield from self.lines_of(stream)

    def lines_of(self, stream: io.BufferedReader) -> Iterator[str]:
        """:meth:`lines` of a stream of :meth:`opened`."""
        self._refuse_foreign(stream)
        number, offset = 0, 0
        while line := stream.readline(LONGEST_TEXT_BYTES):
            number += 1
            if len(line) == LONGEST_TEXT_BYTES:
                self._refuse_long_line(number)
            yield self._decode(line, number, offset)
            offset += len(line)
            self.behind = f"after line {number}"

    def pieces_of(self, stream: io.BufferedReader) -> Iterator[str]:
        """The text of a stream of :meth:`opened` in pieces of a MiB, for formats without lines.

        Raises:
            DataError: as :meth:`lines`.
        """
        self._refuse_foreign(stream)
        decoder, offset, data = codecs.getincrementaldecoder("utf-8-sig")(), 0, b"\n"
        while data:
            data = stream.read(BUFFER_BYTES)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise self._not_utf8(error, f"about byte {offset + error.start} of the text") from None
            offset += len(data)
            self.behind = f"after byte {offset}"
            yield text

    def _open(self) -> io.BufferedReader:
        if isinstance(self.location, str):
            patience = _PIPE_PATIENCE if self.location.startswith(PIPE) else Patience()
            pieces = transferred(expanded(self.location), patience, Expected(most=1 << 62))
            return buffered(ByteStream(pieces))
        self._raw = raw = buffered(self.location.open("rb", buffering=0))
        return raw

    def _decode(self, line: bytes, number: int, offset: int) -> str:
        if offset == 0 and line.startswith(_BOM):
            line = line[len(_BOM) :]
        try:
            return line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            place = f"line {number}, byte {offset + error.start} of the text"
            raise self._not_utf8(error, place) from None

    def _not_utf8(self, error: UnicodeDecodeError, place: str) -> DataError:
        what = f"the text is not UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})"
        fix = "convert the file, for example: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE"
        if b"\0" in error.object:
            what, fix = f"this is no text ({what})", "leave this file out, or convert it to text"
        return DataError(what, f"{self.where}, {place}", fix)

    def _refuse_foreign(self, stream: io.BufferedReader) -> None:
        """UTF-16, and files that are no text, by their first bytes."""
        head = stream.peek(512)[:512]
        odd, even = head[1::2], head[::2]
        halves = (odd.count(0), even.count(0))
        marked = head.startswith((*_UTF_16, *_UTF_32))
        if marked or (len(head) > 8 and max(halves) > 0.4 * len(odd) and 0 in halves):
            name = "UTF-16" if marked else f"UTF-16{'LE' if halves[0] > halves[1] else 'BE'}"
            name = "UTF-32" if head.startswith(_UTF_32) else name
            raise DataError(
                f"the text is {name}, not UTF-8",
                self.where,
                f"convert the file: iconv -f {name} -t UTF-8 FILE > NEW_FILE",
            )
        kind = next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None)
        # A text may begin with such letters, too.
        if kind is not None and (b"\0" in head or not _is_utf8(head)):
            fix = "convert it to text, JSON lines or Parquet, or leave it out"
            raise DataError(f"the input is no text but {kind}", self.where, fix)

    def _refuse_long_line(self, number: int) -> None:
        raise DataError(
            f"a line is longer than {LONGEST_TEXT_BYTES >> 20} MiB",
            f"{self.where}, line {number}",
            "give text files with line breaks",
        )


def _is_utf8(head: bytes) -> bool:
    """Whether bytes are UTF-8, but for a character that is cut at the end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
