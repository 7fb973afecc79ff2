"""Line-by-line text files of hypotheses, references and sources."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from janus_ds.errors import DataError


@dataclass(frozen=True)
class TextLines:
    """The lines of a file, without their ends.

    Attributes:
        name: the file, for messages.
        lines: one text a line.
        ends_with_newline: whether the last line is closed; some official scripts cut a character if not.
    """

    name: str
    lines: list[str]
    ends_with_newline: bool = True


def read_lines(path: Path) -> TextLines:
    """Read a UTF-8 file; a line ends at a newline, a carriage return or both, and nowhere else.

    Raises:
        DataError: the file is missing, empty or not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the file cannot be read: {error.strerror}", str(path), "check the path and its permissions"
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            "the file is not UTF-8 text", f"{path}, line {line}", "convert it to UTF-8 (iconv -t utf-8)"
        ) from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if not text:
        raise DataError("the file is empty", str(path), "give a file with one text a line")
    return TextLines(str(path), text.removesuffix("\n").split("\n"), text.endswith("\n"))


def check_same_length(first: TextLines, second: TextLines) -> None:
    """Every line of one file must have its line in the other.

    Raises:
        DataError: the numbers of lines differ; names both files and both numbers.
    """
    if len(first.lines) != len(second.lines):
        raise DataError(
            "the files do not have the same number of lines",
            f"{first.name} has {len(first.lines)} lines, {second.name} has {len(second.lines)} lines",
            "line N of one must belong to line N of the other: look for lost, empty or split lines",
        )
