"""Made-up run folders for reports: small, with the files that training and evaluation write."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REFERENCES = ["a man in a red hat .", "two dogs <run> & play", "the child sleeps"]
SOURCES = ["ein mann mit rotem hut .", "zwei hunde <rennen> & spielen", "das kind schläft"]

Modes = Mapping[str, tuple[float, float, float]]
"""By mode: BLEU, sentences/s, ms/sentence."""


@dataclass
class MadeUp:
    """A run to be written.

    Attributes:
        objective: preset of the recipe.
        seed: of training.
        modes: scored systems.
        steps: updates made, of 1,000 asked for.
        curves: modes with a validation curve.
        outputs: text of each mode; the reference with its first word doubled where none is given.
    """

    objective: str = "paper"
    seed: int = 1
    modes: Modes = field(default_factory=dict)
    steps: int = 1000
    curves: Sequence[str] = ("ar", "nar")
    outputs: Mapping[str, list[str]] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write run.json, metrics.jsonl and, with modes, eval/test/."""
        folder.mkdir(parents=True)
        record = {
            "command": ["launch/finetune.py", "--set", f"name={folder.name}"],
            "recipe": {
                "name": folder.name,
                "train": {"seed": self.seed, "max_steps": 1000, "valid_bleu_iterations": 4},
                "objective": {"preset": self.objective, "weight_kl_ar_nar": 0.0},
            },
            "attempts": [{"time": "2026-01-01", "command": ["launch/finetune.py", "--set", "a=<b>"]}],
            "versions": {"torch": "2.0"},
            "hardware": {"machine": "x", "cpus": 2, "gpus": []},
            "git_commit": "0123456789abcdef",
        }
        (folder / "run.json").write_text(json.dumps(record))
        lines = [self._line(step) for step in range(20, self.steps + 1, 20)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if self.modes:
            self._write_scores(folder / "eval" / "test")
        return folder

    def _line(self, step: int) -> dict[str, Any]:
        loss = 2 + 6 * math.exp(-step / 200)
        line = {"step": step, "ar": loss, "nar": loss + 1, "kl_ar_aux": 0.1, "kl_ar_nar": 0.2, "lr": 1e-3}
        if step % 100 == 0:
            line |= {"valid/ar": loss, "valid/nar": loss + 1}
            line |= {f"valid/bleu_{mode}": 30 * (1 - math.exp(-step / 200)) for mode in self.curves}
        return line

    def _write_scores(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        write_lines(folder / "references.txt", REFERENCES)
        write_lines(folder / "sources.txt", SOURCES)
        systems = {mode: scores_of(mode, values, self.objective) for mode, values in self.modes.items()}
        (folder / "scores.json").write_text(json.dumps({"systems": systems}))
        for mode in self.modes:
            doubled = [f"{line.split()[0]} {line}" for line in REFERENCES]
            write_lines(folder / f"{mode}.txt", self.outputs.get(mode, doubled))


def scores_of(mode: str, values: tuple[float, float, float], objective: str) -> dict[str, Any]:
    """One system of a scores.json."""
    bleu, sentences, milliseconds = values
    return {
        "task": "nmt",
        "split": "test",
        "n": len(REFERENCES),
        "metrics": {"sacrebleu": bleu, "chrf": bleu + 20, "repetition": 50 - bleu, "length_ratio": 100.0},
        "signatures": {"sacrebleu": "tok:13a"},
        "warnings": ["<few> sentences"],
        "system": mode,
        "objective": objective,
        "speed": {"sentences_per_second": sentences, "ms_per_sentence_batch_1": milliseconds},
        "checkpoint": "step-00001000",
        "average": 5,
    }


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """One text a line."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
