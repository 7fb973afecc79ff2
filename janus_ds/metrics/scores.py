"""The scores of one evaluation: one form for translation and GLGE, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from janus_ds.errors import ResourceError

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
class ScoreSheet:
    """What a metric fills in while a task is scored; the parts of `Scores`."""

    metrics: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def put(self, name: str, percent: float, signature: str) -> None:
        """Enter one metric."""
        self.metrics[name] = percent
        self.signatures[name] = signature

    def warn(self, text: str) -> None:
        """Enter something a reader must know."""
        self.warnings.append(text)


@dataclass(frozen=True)
class Scores:
    """What an evaluation found.

    Attributes:
        task: "nmt" or a task of GLGE.
        split: "dev", "test", ...
        n: number of lines scored.
        metrics: values by name, in percent (0 to 100; BLEU of PersonaChat can be higher by definition).
            A metric that could not be computed is absent and spoken of in `warnings`.
        signatures: how each metric was computed.
        warnings: what a reader must know to compare the numbers with others.
        extra: further parts of the JSON, such as `significance`.
    """

    task: str
    split: str
    n: int
    metrics: dict[str, float]
    signatures: dict[str, str]
    warnings: list[str]
    extra: dict[str, Any] = field(default_factory=dict)

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


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `scores.json`, making its folder if need be.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"the scores cannot be written: {error.strerror}", str(path), "choose another --output"
        ) from error
