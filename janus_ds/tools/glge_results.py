"""The report of the question-generation experiment: JSON with all figures, Markdown with the tables.

Made of what is there: runs that are not finished are named as such, and more sittings extend the tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ds.checkpoint.manifest import read_state, step_of
from janus_ds.io import disk_faults, write_atomic
from janus_ds.observe.run_record import read_run_record
from janus_ds.observe.writers import read_metrics
from janus_ds.tools.glge_page import HELD_OUT, render_page
from janus_ds.tools.nmt_results import FINISHED

__all__ = ["QuestionExperiment", "write_results"]

_NAME = "glge_squadqg"
_ROOT = "runs/results-glge"
_TRAINED = "trained.json"
_SAMPLES = (0, 400, 1200)
"""Test lines that are shown."""


@dataclass(frozen=True)
class QuestionExperiment:
    """Where the runs lie and where the report goes."""

    folder: Path
    """One folder a run, text/ and the data directories."""
    runs: Mapping[str, str | None]
    """The runs that make the experiment, in order, each with the run it starts from."""
    results: Path
    """glge_squadqg.json and .md are written here."""


def write_results(experiment: QuestionExperiment) -> Path:
    """Collect, write both files, and return the Markdown's path.

    Raises:
        ResourceError: the folder cannot be written.
    """
    path = experiment.results / f"{_NAME}.json"
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = _collect(experiment)
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())
    text = "\n".join([*render_page(content), ""])
    write_atomic(path.with_suffix(".md"), text.encode())
    return path.with_suffix(".md")


def _collect(experiment: QuestionExperiment) -> dict[str, Any]:
    found = {name: _collect_run(experiment, name) for name in experiment.runs}
    runs = {name: {"start": experiment.runs[name], **run} for name, run in found.items() if run}
    return {
        "order": [name for name in experiment.runs if name in runs],
        "runs": runs,
        "not_finished": [name for name in experiment.runs if name not in runs],
        "data": _data(experiment.folder),
        "samples": list(_samples(experiment.folder, runs)),
    }


def _collect_run(experiment: QuestionExperiment, name: str) -> dict[str, Any] | None:
    folder = experiment.folder / name
    record = read_run_record(folder)
    scores = folder / "eval" / "test" / "scores.json"
    if record is None or not (folder / _TRAINED).is_file():
        return None
    recipe = record["recipe"]
    tuned = recipe["data"]["task"] == "pair"
    if tuned and not ((folder / FINISHED).is_file() and scores.is_file()):
        return None
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "valid/loss" in line]
    state = read_state(sorted(p for p in folder.glob("checkpoints/step-*") if step_of(p) is not None)[-1])
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    wanted = HELD_OUT if not tuned else ()
    return {
        "fine_tuned": tuned,
        "systems": _systems(scores, experiment.folder) if tuned else {},
        "updates": state["step"],
        "training_seconds": round(state["meters"]["seconds"]),
        "wall_seconds": round(sum(attempt["seconds"] for attempt in attempts)),
        "attempts": attempts,
        "tokens": state["meters"]["tokens"],
        "held_out": {key: lines[-1][key] for key in wanted if lines and key in lines[-1]},
        "seed": recipe["train"]["seed"],
        "objective": recipe["objective"],
        "masking": recipe["masking"],
        "optim": recipe["optim"],
        "model": recipe["model"],
        "command": [_portable(argument, experiment.folder) for argument in record["command"]],
        "git_commit": record["git_commit"],
        "hardware": record["hardware"],
        "versions": record["versions"],
    }


def _systems(path: Path, folder: Path) -> dict[str, Any]:
    """Scores by way of decoding; warnings may name files."""
    systems: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["systems"]
    for scores in systems.values():
        scores["warnings"] = [_portable(text, folder) for text in scores["warnings"]]
    return systems


def _portable(argument: str, folder: Path) -> str:
    """An argument without the places where this clone and the runs happen to lie."""
    plain = argument.replace(str(folder), _ROOT)
    return re.sub(r"^/.*/(?=launch/)", "", plain)


def _data(folder: Path) -> dict[str, Any]:
    """What is known of the text: pairs, articles, tokens and what was cut."""
    found: dict[str, Any] = {}
    counts = folder / "text" / "counts.json"
    if counts.is_file():
        found["text"] = json.loads(counts.read_text(encoding="utf-8"))
    for name in ("wikipedia", "squadqg"):
        manifest = folder / name / "manifest.json"
        if manifest.is_file():
            content = json.loads(manifest.read_text(encoding="utf-8"))
            found[name] = {"splits": content["splits"], "counts": content["settings"].get("counts")}
    return found


def _samples(folder: Path, runs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    files = {
        "sentence": folder / "squadqg" / "raw" / "test.src",
        "reference": folder / "squadqg" / "raw" / "test.tgt",
        **{
            f"{name}, {system}": folder / name / "eval" / "test" / f"{system}.txt"
            for name, run in runs.items()
            for system in run["systems"]
            if system in ("ar", "nar-0", "nar-10")
        },
    }
    if not any(run["systems"] for run in runs.values()):
        return
    texts = {
        what: path.read_text(encoding="utf-8").split("\n") for what, path in files.items() if path.is_file()
    }
    for number in _SAMPLES:
        shown = {what: lines[number] for what, lines in texts.items() if number < len(lines) - 1}
        if shown:
            yield {"line": number + 1, **shown}
