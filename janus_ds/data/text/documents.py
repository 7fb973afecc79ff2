"""Documents of the files that text comes in, one after the other.

- text: documents are separated by blank lines (`blank`), or each line (`line`) or each file (`file`)
  is one. Every line is a paragraph; wrapped lines should be joined beforehand.
- jsonl: one JSON object a line, the text in one of its fields.
- json: an array of such objects or of strings, or objects that span several lines.
- parquet: a column of strings.
- tar: WebDataset's tars, with the text of a sample in KEY.txt, or in a field of KEY.json.
- wiki: `<doc id=... title=...>`, the title again, the text, `</doc>`, as WikiExtractor writes; what
  it reads, a dump in XML, is refused.
"""

from __future__ import annotations

import html
import io
import json
import re
import tarfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from janus_ds.data.text.byte_streams import tar_samples
from janus_ds.data.text.text_files import LONGEST_TEXT_BYTES, TextFile
from janus_ds.errors import DataError, MissingDependencyError
from janus_ds.io import MOST_VALUES, parse_json

INPUT_FORMATS = ("auto", "text", "jsonl", "json", "parquet", "tar", "wiki")

DOCUMENT_RULES = ("blank", "line", "file")

_LONGEST_DOCUMENT_CHARACTERS = 16 << 20
"""Longer text is taken as several documents, so that memory stays bounded."""
_LINE_COSTS = 64
"""Characters that a line counts for beside its own: short ones take memory, too."""

_HEAD_BYTES = 1 << 16
_PARQUET_ROWS = 8
"""Few: a file of 2 KB can hold a text of 16 MiB thousands of times, and rows come expanded."""
_JSON_BEGINS = re.compile(r'\{\s*"|\[\s*["{\[]')
_BETWEEN_VALUES = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class DocumentRule:
    """How files are cut into documents.

    Args:
        format: one of INPUT_FORMATS; auto looks at the name and the first bytes of each file.
        document: one of DOCUMENT_RULES, for text.
        field: the JSON field or Parquet column that holds the text; without a column of this name, the only
            one of strings.
    """

    format: str = "auto"
    document: str = "blank"
    field: str = "text"


@dataclass(frozen=True)
class Position:
    """A place between two documents: files read whole, and documents taken from the next one."""

    file: int = 0
    documents: int = 0


class DocumentReader:
    """All documents of all files, in order; memory is bounded by the largest document."""

    def __init__(self, files: Sequence[Path | str], rule: DocumentRule) -> None:
        self.files = [TextFile(location) for location in files]
        self.total_bytes = sum(file.size for file in self.files)
        """Size of all input files on disk."""
        self._rule = rule
        self._done_bytes = 0
        self._current: TextFile | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes of the input files that have been read so far, for progress."""
        return self._done_bytes + (self._current.bytes_read if self._current else 0)

    def read(self, start: Position = Position()) -> Iterator[tuple[str, Position]]:
        """Documents after `start`, each with the position behind it; blank ones are passed over.

        Raises:
            DataError: a file is damaged, is not UTF-8, or does not have its format.
        """
        self._done_bytes = sum(file.size for file in self.files[: start.file])
        for number in range(start.file, len(self.files)):
            self._current = file = self.files[number]
            skip = start.documents if number == start.file else 0
            documents = (text for text in self._documents(file) if text and not text.isspace())
            for count, text in enumerate(documents, 1):
                if count > skip:
                    yield text, Position(number, count)
            self._done_bytes += file.size
            self._current = None

    def _documents(self, file: TextFile) -> Iterator[str]:
        with file.opened() as stream:
            chosen = self._rule.format
            if chosen == "auto":
                chosen = _guess_format(file, stream.peek(_HEAD_BYTES)[:_HEAD_BYTES])
            yield from _READERS[chosen](file, stream, self._rule)


def _guess_format(file: TextFile, head: bytes) -> str:
    suffix = file.suffix
    if suffix in (".tar", ".parquet") or head[257:262] == b"ustar" or head.startswith(b"PAR1"):
        return "parquet" if suffix == ".parquet" or head.startswith(b"PAR1") else "tar"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix in (".csv", ".tsv"):
        fix = "convert it to Parquet or JSON lines; if its lines are meant as they are: --format text"
        raise DataError("the input is a table, of which plain text would be all columns", file.where, fix)
    text = head.decode("utf-8-sig", errors="ignore").lstrip()
    if text.startswith("<doc "):
        return "wiki"
    if text.startswith("<mediawiki"):
        fix = "give what WikiExtractor makes of it"
        raise DataError("the input is a raw dump of a wiki, most of which is markup", file.where, fix)
    if not _JSON_BEGINS.match(text):
        # A .json file is JSON, or is told to be none.
        return "json" if suffix == ".json" else "text"
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        cut = isinstance(error, json.JSONDecodeError) and _is_cut(error, text) and len(head) == _HEAD_BYTES
        return "json" if cut or suffix == ".json" or _first_element(text) else "text"
    one_line = "\n" not in text[:end] and isinstance(value, dict)
    return "jsonl" if one_line else "json"


def _first_element(text: str) -> bool:
    """Whether an array begins with a whole object: then its fault is told, and it is not taken as text."""
    try:
        return isinstance(json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())[0], dict)
    except (ValueError, RecursionError):
        return False


def records(file: TextFile, names: Collection[str]) -> Iterator[tuple[Any, str]]:
    """The objects of a file of JSON, JSON lines or Parquet, each with its place in the file.

    Args:
        names: columns that are read of Parquet, where it has them.

    Raises:
        DataError: the file is damaged, or not of its format.
    """
    with file.opened() as stream:
        form = _guess_format(file, stream.peek(_HEAD_BYTES)[:_HEAD_BYTES])
        if form == "parquet":
            yield from _parquet_rows(file, lambda columns: [name for name in columns if name in names])
        else:
            yield from (_jsonl_values if form == "jsonl" else _json_values)(file, stream)


def _text_documents(file: TextFile, stream: io.BufferedReader, rule: DocumentRule) -> Iterator[str]:
    lines = file.lines_of(stream)
    if rule.document == "line":
        yield from lines
        return
    paragraphs: list[str] = []
    size = 0
    for line in lines:
        blank = not line or line.isspace()
        if not blank:
            paragraphs.append(line)
            size += len(line) + _LINE_COSTS
        if size > _LONGEST_DOCUMENT_CHARACTERS or (blank and rule.document == "blank"):
            yield "\n".join(paragraphs)
            paragraphs, size = [], 0
    yield "\n".join(paragraphs)


def _documents_of(
    values: Callable[[TextFile, io.BufferedReader], Iterator[tuple[Any, str]]],
    file: TextFile,
    stream: io.BufferedReader,
    rule: DocumentRule,
) -> Iterator[str]:
    """Of JSON: texts, or objects that have one in a field."""
    for value, place in values(file, stream):
        where = f"{file.where}, {place}"
        yield _whole(value, where) if isinstance(value, str) else text_of(value, [rule.field], where)


def _jsonl_values(file: TextFile, stream: io.BufferedReader) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(file.lines_of(stream), 1):
        if not line or line.isspace():
            continue
        try:
            value = parse_json(line)
        except ValueError as error:
            fix = "mend or remove this line; if objects stand over several lines, give --format json"
            raise DataError(f"the line is not JSON ({error})", f"{file.where}, line {number}", fix) from None
        yield value, f"line {number}"


def _json_values(file: TextFile, stream: io.BufferedReader) -> Iterator[tuple[Any, str]]:
    """The elements of a top-level array, or values one after the other, each with its line."""
    pieces, decode = file.pieces_of(stream), json.JSONDecoder().raw_decode
    text, at, line, inside, wanted = "", 0, 1, False, 1
    while True:
        while len(text) - at < wanted and (piece := next(pieces, "")):
            text, at = text[at:] + piece, 0
        whole = len(text) - at < wanted
        begin = _BETWEEN_VALUES.match(text, at).end()  # type: ignore[union-attr]
        line, at = line + text.count("\n", at, begin), begin
        where = f"line {line}"
        if at == len(text):
            if not whole:
                continue
            if inside:
                raise DataError(
                    "the file ends inside an array: there is no ]", f"{file.where}, {where}", _AGAIN
                )
            return
        if text[at] == ("]" if inside else "["):
            inside, at, wanted = not inside, at + 1, 1
            continue
        try:
            if len(text) - at > MOST_VALUES and text.count(",", at) > MOST_VALUES:
                raise ValueError(f"it holds more than {MOST_VALUES:,} values")
            value, end = decode(text, at)
        except (ValueError, RecursionError) as error:
            cut = isinstance(error, json.JSONDecodeError) and _is_cut(error, text)
            if cut and not whole and len(text) - at < LONGEST_TEXT_BYTES:
                wanted = 2 * (len(text) - at) + 1
                continue
            what = "a value is longer than 64 MiB" if cut and not whole else f"this is not JSON ({error})"
            raise DataError(what, f"{file.where}, value at {where}", _AGAIN) from None
        if end == len(text) and not whole:
            wanted = len(text) - at + 1  # a number may go on
            continue
        yield value, where
        line, at, wanted = line + text.count("\n", at, end), end, 1


_AGAIN = "copy the file again, or give --format text if this is no JSON"


def _is_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether the text may only end too early."""
    return error.pos > len(text) - 16 or error.msg.startswith("Unterminated string")


def text_of(value: Any, names: Sequence[str], where: str, option: str = "--field") -> str:
    """The text of an object: of the first of these fields that holds any.

    Raises:
        DataError: there is none, or half a character in it; `where` and the option stand in the message.
    """
    fields = value if isinstance(value, dict) else {}
    field = next((name for name in names if isinstance(fields.get(name), str)), None)
    if field is None:
        has = f"has: {', '.join(sorted(fields)[:20])}" if isinstance(value, dict) else "has no fields"
        if there := [fields[name] for name in names if name in fields]:
            has = f"holds {json.dumps(there[0], default=repr)[:40]} there"
        what = f"the value has no text in field {' or '.join(map(repr, names))}; it {has}"
        others = ", or give --format text if this is no JSON" if option == "--field" else ""
        raise DataError(what, where, f"name the field that holds the text with {option}{others}")
    return _whole(fields[field], where, f" in field {field!r}")


def _whole(text: str, where: str, place: str = "") -> str:
    """The text itself; JSON can escape halves of characters, which no file of text can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        what = f"the text{place} holds half of a surrogate pair"
        raise DataError(what, where, "mend or remove it") from None
    return text


def _wiki_documents(file: TextFile, stream: io.BufferedReader, rule: DocumentRule) -> Iterator[str]:
    paragraphs: list[str] | None = None
    opening, begun, size = "", 0, 0
    for number, line in enumerate(file.lines_of(stream), 1):
        if paragraphs is None:
            if line.startswith("<doc "):
                opening, begun, paragraphs, size = line, number, [], 0
            elif line and not line.isspace():
                fix = "give --format text if this is not WikiExtractor's output"
                raise DataError(
                    "there is text outside of <doc> ... </doc>", f"{file.where}, line {number}", fix
                )
        elif line.startswith("</doc>") or size > _LONGEST_DOCUMENT_CHARACTERS:
            yield html.unescape("\n".join(paragraphs))
            paragraphs, size = (None, 0) if line.startswith("</doc>") else ([line], len(line))
        elif line and not line.isspace() and (paragraphs or f'title="{line}"' not in opening):
            paragraphs.append(line)
            size += len(line) + _LINE_COSTS
    if paragraphs is not None:
        raise DataError(
            "the file ends inside a document: there is no </doc>",
            f"{file.where}, document begun at line {begun}",
            "copy the file again, or run WikiExtractor again",
        )


def _tar_documents(file: TextFile, stream: io.BufferedReader, rule: DocumentRule) -> Iterator[str]:
    key = ""
    try:
        for key, files in tar_samples(stream, LONGEST_TEXT_BYTES):
            file.at(f"after sample {key[-200:]}")
            where = f"{file.where}, sample {key[-200:]}"
            texts = sorted(name for name in files if name.endswith("txt"))
            for name in texts or sorted(files):
                text = _utf8(files[name], f"{where}.{name}")
                yield text if texts else text_of(_json_of(text, where), [rule.field], where)
    except (tarfile.TarError, EOFError) as error:
        what = f"the tar is cut or damaged ({error})"
        raise DataError(what, f"{file.where}, {file.behind}", "copy or download the file again") from None
    if not key:
        raise DataError("the tar holds no .txt or .json file", file.where, "unpack it, or leave it out")


def _utf8(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"the text is not UTF-8: byte 0x{data[error.start]:02x} ({error.reason})"
        raise DataError(what, f"{where}, byte {error.start}", "convert it to UTF-8") from None


def _json_of(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"the file is not JSON ({error})", where, "mend or remove this file") from None


def _parquet_documents(file: TextFile, _: io.BufferedReader, rule: DocumentRule) -> Iterator[str]:
    def chosen(columns: Mapping[str, bool]) -> list[str]:
        strings = [name for name, text in columns.items() if text]
        if rule.field in strings or (rule.field not in columns and len(strings) == 1):
            return [rule.field if rule.field in strings else strings[0]]
        there = ", ".join(strings) or "none"
        what = f"the file has no column {rule.field!r} of text; of text it has: {there}"
        raise DataError(what, file.where, "name the column that holds the text with --field")

    for row, _place in _parquet_rows(file, chosen):
        yield from (text for text in row.values() if text is not None)


def _parquet_rows(
    file: TextFile, choose: Callable[[Mapping[str, bool]], list[str]]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Some rows at a time: neither a row group nor a file has to fit into memory."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        what = "reading Parquet files needs the package pyarrow"
        raise MissingDependencyError(what, file.where, "pip install 'janus_ds[parquet]'") from None
    if not isinstance(file.location, Path):
        fix = "download it, and give the file or its folder"
        raise DataError("a Parquet file is read from disk only", file.where, fix)
    try:
        schema = pq.read_schema(file.location)
        kinds = {f.name: f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema}
        strings = (pa.string(), pa.large_string(), pa.string_view())
        texts = {name: kind in strings for name, kind in kinds.items()}
        # Where there is none to choose, messages tell what is there.
        columns = choose(texts) or list(kinds)
        options: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}
        with pq.ParquetFile(file.location, **options) as table:
            number = 0
            for batch in table.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    file.at(f"after row {number}")
                    yield row, f"row {number}"
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        what = f"the Parquet file is cut or damaged ({str(error).splitlines()[0]})"
        raise DataError(what, f"{file.where}, {file.behind}", "copy or download the file again") from None


_READERS: dict[str, Callable[[TextFile, io.BufferedReader, DocumentRule], Iterator[str]]] = {
    "text": _text_documents,
    "jsonl": partial(_documents_of, _jsonl_values),
    "json": partial(_documents_of, _json_values),
    "parquet": _parquet_documents,
    "tar": _tar_documents,
    "wiki": _wiki_documents,
}
