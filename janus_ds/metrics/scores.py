"""Files of lines that are scored, and the scores of one evaluation, as JSON and as a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_ds.data.text.byte_streams import DAMAGE, buffered, decompressed
from janus_ds.errors import DataError
from janus_ds.io import make_folder, mapping, write_atomic

_FIRST = re.compile(r"-first-\d+$")


def split_folder(split: str, limit: int = 0) -> str:
    """The folder of a split's scores below RUN/eval; that of its first `limit` sentences is another."""
    return f"{split}-first-{limit}" if limit else split


def split_of_folder(name: str) -> str:
    """The split whose scores, or those of its first sentences, such a folder has."""
    return _FIRST.sub("", name)


@dataclass(frozen=True)
class TextLines:
    """The lines of a file, without their ends.

    Attributes:
        ends_with_newline: whether the last line is closed; some official scripts cut a character if not.
    """

    name: str
    lines: list[str]
    ends_with_newline: bool = True


def read_lines(path: Path) -> TextLines:
    """Read a UTF-8 file, plain or compressed; a line ends at a newline (with a carriage return or not),
    nowhere else.

    Raises:
        DataError: the file is missing, empty, damaged or not UTF-8.
    """
    try:
        with path.open("rb", buffering=0) as raw, decompressed(buffered(raw), path.name) as stream:
            content = stream.read()
    except DAMAGE as error:
        what, fix = f"the compressed file is cut or damaged ({error})", "copy or download the file again"
        raise DataError(what, str(path), fix) from None
    except OSError as error:
        what = f"the file cannot be read: {error.strerror or error}"  # bz2 tells damage without strerror
        raise DataError(what, str(path), "check the path and its permissions") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            "the file is not UTF-8 text",
            f"{path}, line {line}",
            "convert the file, for example: iconv -f LATIN1 -t UTF-8 FILE > NEW_FILE",
        ) from error
    text = text.replace("\r\n", "\n")
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


METRIC_TITLES = {
    "sacrebleu": ("BLEU", "BLEU 13a"),
    "tokenized_bleu": ("tokenised BLEU", "tok. BLEU"),
    "compound_bleu": ("compound-split BLEU", "compound"),
    "chrf": ("chrF", "chrF"),
    "repetition": ("repeated tokens, %", "repeated %"),
    "repetition_words": ("repeated words, %", "rep. words %"),
    "reference_repetition_words": ("repeated words in the references, %", "ref. rep. %"),
    "length_ratio": ("length, % of references", "length %"),
    "rouge1": ("ROUGE-1", "R-1"),
    "rouge2": ("ROUGE-2", "R-2"),
    "rougeL": ("ROUGE-L", "R-L"),
    "bleu1": ("BLEU-1", "B-1"),
    "bleu2": ("BLEU-2", "B-2"),
    "bleu4": ("BLEU-4", "B-4"),
    "meteor": ("METEOR", "METEOR"),
    "distinct1": ("Distinct-1", "D-1"),
    "distinct2": ("Distinct-2", "D-2"),
    "f1": ("F1", "F1"),
    "overall": ("overall", "overall"),
}
"""How metrics are written in a report, and in a table on the terminal."""


@dataclass
class Scores:
    """What an evaluation found; metrics enter themselves by `put`.

    Attributes:
        metrics: values by name, in percent (0 to 100; BLEU of PersonaChat can be higher by definition).
            A metric that could not be computed is absent and spoken of in `warnings`.
        signatures: how each metric was computed.
        warnings: what a reader must know to compare the numbers with others.
        extra: further parts of the JSON, such as `significance`.
    """

    task: str
    split: str
    n: int
    metrics: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, percent: float, signature: str) -> None:
        """Enter one metric."""
        self.metrics[name] = percent
        self.signatures[name] = signature

    def as_dict(self) -> dict[str, Any]:
        """The form of `scores.json`."""
        return {
            "task": self.task,
            "split": self.split,
            "n": self.n,
            "metrics": self.metrics,
            "signatures": self.signatures,
            "warnings": self.warnings,
            **self.extra,
        }


def render(scores: Scores) -> str:
    """A table of metric, value and how it was computed; the warnings stand below it."""
    rows = [(name, f"{value:.2f}", scores.signatures.get(name, "")) for name, value in scores.metrics.items()]
    name_width = max([len(row[0]) for row in rows], default=0)
    value_width = max([len(row[1]) for row in rows], default=0)
    head = f"{scores.task}, {scores.split}, {scores.n} lines"
    lines = [f"  {name:<{name_width}}  {value:>{value_width}}  {how}".rstrip() for name, value, how in rows]
    return "\n".join([head, *lines, *(f"warning: {text}" for text in scores.warnings)])


def finite_numbers(values: Any) -> dict[str, float]:
    """The numbers of a part of a JSON file that can be shown and drawn; none where it is no object."""
    items = mapping(values).items()
    return {str(k): float(v) for k, v in items if isinstance(v, int | float) and abs(v) < 1e300}


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `scores.json`, making its folder if need be."""
    make_folder(path.parent)
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
