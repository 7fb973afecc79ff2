"""Documents of text, JSON-lines and WikiExtractor files, one after the other.

- text: documents are separated by blank lines (`blank`), or each line (`line`) or each file (`file`)
  is one. Every line is a paragraph; wrapped lines should be joined beforehand.
- jsonl: one JSON object a line, the text in one of its fields.
- wiki: `<doc id=... title=...>`, the title again, the text, `</doc>`, as WikiExtractor writes.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from janus_ds.data.text.text_files import COMPRESSED_SUFFIXES, TextFile
from janus_ds.errors import DataError

INPUT_FORMATS = ("auto", "text", "jsonl", "wiki")

DOCUMENT_RULES = ("blank", "line", "file")

_LONGEST_DOCUMENT_CHARACTERS = 16 << 20
"""Longer text is taken as several documents, so that memory stays bounded."""

_TITLE = re.compile(r'title="([^"]*)"')


@dataclass(frozen=True)
class DocumentRule:
    """How files are cut into documents.

    Args:
        format: one of INPUT_FORMATS; auto looks at the name and the first line of each file.
        document: one of DOCUMENT_RULES, for text.
        field: the JSON field that holds the text.
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
    """All documents of all files, in order; memory is bounded by the largest document.

    Args:
        files: the inputs, as `text_files.list_inputs` gives them.
        rule: how they are cut.
    """

    def __init__(self, files: Sequence[Path], rule: DocumentRule) -> None:
        self.files = list(files)
        self._rule = rule
        self._sizes = [path.stat().st_size for path in self.files]
        self._done_bytes = 0
        self._current: TextFile | None = None

    @property
    def total_bytes(self) -> int:
        """Size of all input files on disk."""
        return sum(self._sizes)

    @property
    def bytes_read(self) -> int:
        """Bytes of the input files that have been read so far, for progress."""
        return self._done_bytes + (self._current.bytes_read if self._current else 0)

    def read(self, start: Position = Position()) -> Iterator[tuple[str, Position]]:
        """Documents after `start`, each with the position behind it; blank ones are passed over.

        Raises:
            DataError: a file is damaged, is not UTF-8, or does not have its format.
        """
        self._done_bytes = sum(self._sizes[: start.file])
        for number in range(start.file, len(self.files)):
            self._current = TextFile(self.files[number])
            skip = start.documents if number == start.file else 0
            documents = (text for text in self._documents(self._current) if text and not text.isspace())
            for count, text in enumerate(documents, 1):
                if count > skip:
                    yield text, Position(number, count)
            self._done_bytes += self._sizes[number]
            self._current = None

    def _documents(self, file: TextFile) -> Iterator[str]:
        lines = file.lines()
        head: list[str] = []
        for line in lines:
            head.append(line)
            if line.strip():
                break
        chosen = self._rule.format
        if chosen == "auto":
            chosen = _guess_format(file.path, head[-1] if head else "", self._rule.field)
        every_line = chain(head, lines)
        if chosen == "jsonl":
            return _jsonl_documents(every_line, file.path, self._rule.field)
        if chosen == "wiki":
            return _wiki_documents(every_line, file.path)
        return _text_documents(every_line, self._rule.document)


def _guess_format(path: Path, first_line: str, field: str) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED_SUFFIXES]
    if suffixes and suffixes[-1] in (".jsonl", ".ndjson"):
        return "jsonl"
    if first_line.startswith("<doc "):
        return "wiki"
    if first_line.startswith("{"):
        try:
            value = json.loads(first_line)
        except (ValueError, RecursionError):
            return "text"
        if isinstance(value, dict) and field in value:
            return "jsonl"
    return "text"


def _text_documents(lines: Iterator[str], document: str) -> Iterator[str]:
    if document == "line":
        yield from lines
        return
    paragraphs: list[str] = []
    size = 0
    for line in lines:
        blank = not line or line.isspace()
        if not blank:
            paragraphs.append(line)
            size += len(line)
        if size > _LONGEST_DOCUMENT_CHARACTERS or (blank and document == "blank"):
            yield "\n".join(paragraphs)
            paragraphs, size = [], 0
    yield "\n".join(paragraphs)


def _jsonl_documents(lines: Iterator[str], path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line or line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"the line is not JSON ({error})", where, "mend or remove this line") from None
        text = value.get(field) if isinstance(value, dict) else None
        if not isinstance(text, str):
            fields = ", ".join(sorted(value)) if isinstance(value, dict) else "no fields"
            what = f"the line has no text in field {field!r}; it has: {fields}"
            raise DataError(what, where, "name the field that holds the text with --field")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            what = f"the text in field {field!r} holds half of a surrogate pair"
            raise DataError(what, where, "mend or remove this line") from None
        yield text


def _wiki_documents(lines: Iterator[str], path: Path) -> Iterator[str]:
    paragraphs: list[str] | None = None
    title, begun, size = "", 0, 0
    for number, line in enumerate(lines, 1):
        if paragraphs is None:
            if line.startswith("<doc "):
                found = _TITLE.search(line)
                title, begun, paragraphs, size = (found[1] if found else ""), number, [], 0
            elif line and not line.isspace():
                fix = "give --format text if this is not WikiExtractor's output"
                raise DataError("there is text outside of <doc> ... </doc>", f"{path}, line {number}", fix)
        elif line.startswith("</doc>") or size > _LONGEST_DOCUMENT_CHARACTERS:
            yield html.unescape("\n".join(paragraphs))
            paragraphs, size = (None, 0) if line.startswith("</doc>") else ([line], len(line))
        elif line and not line.isspace() and (paragraphs or line != title):
            paragraphs.append(line)
            size += len(line)
    if paragraphs is not None:
        raise DataError(
            "the file ends inside a document: there is no </doc>",
            f"{path}, document begun at line {begun}",
            "copy the file again, or run WikiExtractor again",
        )
