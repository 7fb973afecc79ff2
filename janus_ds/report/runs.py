"""What a report is made of: run folders, their curves, their scores. Missing pieces are noted, never fatal.

A run folder holds `run.json` and `metrics.jsonl` (training) and `eval/SPLIT/` (scores.json, one text a line
for each way of decoding, references.txt, sources.txt). Scores of `eval/glge.py` may also lie in the folder.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from janus_ds.config.schema import RUN_FILE
from janus_ds.data.stream.index import MANIFEST_NAME, Manifest
from janus_ds.errors import JanusError, UsageError, suggestion
from janus_ds.io import mapping, read_json
from janus_ds.metrics.glge import TASKS
from janus_ds.metrics.scores import METRIC_TITLES, finite_numbers, read_lines, split_of_folder
from janus_ds.observe import read_metrics, read_run_record

_TASK = re.compile(r"\w[\w.-]{0,63}")
_NAR = re.compile(r"nar-(\d+)$")
SPEED_TITLES = {
    "sentences_per_second": "sentences/s, in batches",
    "ms_per_sentence_batch_1": "ms/sentence, one by one",
}
_PRIMARY = ("sacrebleu", "overall", "rougeL", "f1", "bleu4", "bleu1")


@dataclass(frozen=True)
class System:
    """One way of decoding with one run, scored.

    Attributes:
        mode: ar, nar-4, draft, ...
        hypotheses: the file of outputs; None if it is not there.
    """

    mode: str
    scores: Mapping[str, Any]
    hypotheses: Path | None

    @property
    def metrics(self) -> dict[str, float]:
        """Values by name."""
        return finite_numbers(self.scores.get("metrics"))

    @property
    def speed(self) -> dict[str, float]:
        """sentences_per_second (in batches) and ms_per_sentence_batch_1, as far as measured."""
        return {name: value for name, value in finite_numbers(self.scores.get("speed")).items() if value > 0}


@dataclass
class RunFolder:
    """A run as a report sees it.

    Attributes:
        label: its name in tables and pictures, unique among the runs.
        record: run.json; empty if there is none.
        lines: metrics.jsonl, in the order of steps.
        tasks: scored systems by task ("nmt", "xsum", ...) and mode.
        notes: what is missing or odd, for the reader.
    """

    folder: Path
    label: str
    record: dict[str, Any]
    lines: list[dict[str, Any]]
    tasks: dict[str, dict[str, System]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def recipe(self, *keys: str) -> Any:
        """A value of the recipe; None where the record does not have it."""
        found: Any = self.record.get("recipe")
        for key in keys:
            found = mapping(found).get(key)
        return found

    @property
    def systems(self) -> list[System]:
        """Of all tasks."""
        return [system for found in self.tasks.values() for system in found.values()]

    @property
    def objective(self) -> str:
        """The preset of the objective; "?" if unknown."""
        told = [self.recipe("objective", "preset"), *(s.scores.get("objective") for s in self.systems)]
        return str(next(filter(None, told), "?"))

    @property
    def updates(self) -> int | None:
        """Updates made so far."""
        return self.lines[-1]["step"] if self.lines else None

    @property
    def ended(self) -> str | None:
        """How the last start ended ("complete", "stopped: SIGTERM"); None: it has not; "": not recorded."""
        attempts = listing(self.record.get("attempts"))
        last = mapping(attempts[-1]) if attempts else {}
        found = last.get("ended", "")
        return None if found is None else str(found)

    @property
    def averaged(self) -> int:
        """Checkpoints that `convert --from run` made the run's own weights of; 0 of a run of training."""
        return len(listing(mapping(self.record.get("execution")).get("checkpoints")))

    @property
    def group(self) -> str:
        """Equal for runs that differ in their seed only; a mean of a run's checkpoints is of another kind."""
        recipe = dict(mapping(self.record.get("recipe")))
        if not recipe:
            return str(self.folder)
        recipe["name"] = self.averaged
        recipe["train"] = {k: v for k, v in mapping(recipe.get("train")).items() if k != "seed"}
        return json.dumps(recipe, sort_keys=True)

    def points(self, key: str) -> list[tuple[int, float]]:
        """(update, value) of a key of metrics.jsonl, where it is a number."""
        one = ((line["step"], finite_numbers({key: line.get(key)})) for line in self.lines)
        return [(step, found[key]) for step, found in one if found]

    def epochs(self) -> dict[int, float] | None:
        """Epochs by update; None where the size of the data, or the count of samples, is not at hand."""
        named, totals = self.recipe("data", "path"), self.points("samples_total")
        for data in (Path(named) if isinstance(named, str) else None, self.folder.parent / "data"):
            if data is None or not (data / MANIFEST_NAME).is_file():
                continue
            try:
                manifest = Manifest.load(data)
                samples = manifest.splits["train"].samples
            except (JanusError, KeyError):
                continue
            expected = self.record.get("tokenizer_fingerprint", manifest.tokenizer_fingerprint)
            if manifest.tokenizer_fingerprint == expected and samples and totals:
                return {step: total / samples for step, total in totals}
        return None


def read_runs(folders: Sequence[Path], split: str) -> list[RunFolder]:
    """Read run folders and their scores of a split; a folder named twice is read once.

    Raises:
        UsageError: none is given, one is not a folder, or one holds nothing of a run.
    """
    if not folders:
        raise UsageError(
            "no run is named", "the command line", "give run folders, such as runs/ar runs/janus"
        )
    unique = list({folder.resolve(): folder for folder in folders})
    runs = [_read_run(folder, label, split) for folder, label in zip(unique, _labels(unique), strict=True)]
    _note_other_texts(runs)
    return runs


def _note_other_texts(runs: Sequence[RunFolder]) -> None:
    """Note of each run that it was scored on another text than the first one with scores of the task."""
    first: dict[str, tuple[str, Any, list[str]]] = {}
    for run in runs:
        for task, systems in run.tasks.items():
            system = next(iter(systems.values()))
            lines = lines_beside(system.hypotheses, "references.txt") if system.hypotheses else []
            label, count, others = first.setdefault(task, (run.label, system.scores.get("n"), lines))
            if system.scores.get("n") != count or (lines and others and lines != others):
                run.notes.append(f"{task}: scored on another text than {label}; their figures do not compare")


def lines_beside(outputs: Path, name: str) -> list[str]:
    """The lines of a file beside a system's outputs; none where it cannot be read."""
    try:
        return read_lines(outputs.with_name(name)).lines
    except JanusError:
        return []


def _labels(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    longest = max(len(folder.parts) for folder in folders)
    for count in range(1, longest + 1):
        labels = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read_run(folder: Path, label: str, split: str) -> RunFolder:
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.glob("*") if p.is_dir()) if folder.parent.is_dir() else []
        advice = suggestion(folder.name, near, "give folders that launch/ or eval/ programs wrote")
        raise UsageError("there is no such run folder", str(folder), advice)
    lines = sorted(read_metrics(folder / "metrics.jsonl"), key=lambda line: line["step"])
    run = RunFolder(folder, label, dict(mapping(read_run_record(folder))), lines)
    if not run.record and (folder / RUN_FILE).exists():
        run.notes.append(f"{folder / RUN_FILE} cannot be read as JSON: no recipe, no history of starts")
    _read_scores(run, split)
    if not run.record and not run.lines and not run.tasks:
        raise UsageError(
            "the folder holds nothing of a run: no run.json, no metrics.jsonl, no scores",
            f"{folder}{''.join(f'; {note}' for note in run.notes)}",
            "give the folder that training wrote (--output), or one with scores.json",
        )
    _note_state(run, split)
    return run


def _read_scores(run: RunFolder, split: str) -> None:
    """All scores of the split, the newest table first, then those of single systems beside it."""
    base = run.folder / "eval" / split
    places = [base, *sorted(path for path in base.glob("*") if path.is_dir()), run.folder]
    for place in places:
        for path in [place / "scores.json", *sorted(place.glob("*.scores.json"))]:
            if path.is_file():
                _take_scores(run, path, split)


def _take_scores(run: RunFolder, path: Path, split: str) -> None:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        run.notes.append(f"{path.name} cannot be read as JSON")
        return
    default = "predictions" if path.name == "scores.json" else path.name.removesuffix(".scores.json")
    for name, scores in _parts(content, default):
        task = str(scores.get("task", "nmt"))
        told, whole = scores.get("split", split), split_of_folder(split)
        # The first sentences of a split have a folder of their own, and the split's name in their scores.
        if told != split and (told != whole or path.parent == run.folder):
            run.notes.append(f"{path.name} is of split {told}, not {split}")
            continue
        # Both become names of files.
        if "/" in name or not _TASK.fullmatch(task):
            run.notes.append(f"{path.name} has a system {name!r} of a task {task!r}, which are no names")
            continue
        text = path.parent / f"{name}.txt"
        system = System(name, scores, text if text.is_file() else None)
        if system.metrics:
            run.tasks.setdefault(task, {}).setdefault(name, system)


def _parts(content: Mapping[str, Any], default: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(mode, scores) of a scores.json: a table of systems, of tasks, or one system."""
    for name, scores in mapping(content.get("systems")).items():
        yield str(name), mapping(scores)
    if "metrics" in content:
        yield str(content.get("system", default)), content
    for scores in mapping(content.get("tasks")).values():
        yield str(mapping(scores).get("system", default)), mapping(scores)


def _note_state(run: RunFolder, split: str) -> None:
    asked = run.recipe("train", "max_steps")
    if not run.lines:
        run.notes.append("no metrics.jsonl, hence no curves")
    elif isinstance(asked, int) and (run.lines[-1]["step"] < asked or run.ended is None):
        how = {None: "not complete: under way, killed or failed", "complete": "ended by train.patience"}
        told = how.get(run.ended, run.ended and f"not complete: {run.ended}")
        done = f"{run.lines[-1]['step']:,} of {asked:,} updates"
        run.notes.append(f"{told or 'not finished, or stopped early'}: {done}")
    # Pretraining has no text to score.
    if not run.tasks and run.recipe("data", "task") != "denoise":
        others = sorted(
            path.name for path in run.folder.glob("eval/*") if path.is_dir() and path.name != split
        )
        there = f" (there are scores of: {', '.join(others)})" if others else ""
        task = run.recipe("train", "valid_task")
        program = f"glge --task {task}" if task in TASKS else "nmt"
        whole = split_of_folder(split)
        part = f" --limit {split.rpartition('-')[2]}" if whole != split else ""
        asked = ("" if whole == "test" else f" --split {quote(whole)}") + part
        command = f"janus-ds eval {program} --checkpoint {quote(str(run.folder))}{asked}"
        run.notes.append(f"no scores of split {split}{there}: run `{command}`")
    for systems in run.tasks.values():
        first = next(iter(systems.values())).scores
        for system in systems.values():
            for key in ("n", "checkpoint", "average", "precision", "device"):
                if system.scores.get(key) != first.get(key):
                    told = f"{key} {system.scores.get(key)}, others {first.get(key)}"
                    run.notes.append(f"{system.mode} was not scored like the others: {told}")


def iterations_of(mode: str) -> int | None:
    """The iterations of a plain NAR mode; None for all others."""
    found = _NAR.match(mode)
    return int(found[1]) if found else None


def sorted_modes(systems: Sequence[Mapping[str, System]]) -> list[str]:
    """All modes: AR ones, plain NAR by iterations, other NAR ones, the rest."""

    def order(mode: str) -> tuple[int, int, str]:
        number = iterations_of(mode)
        if number is not None:
            return 1, number, mode
        return (0 if mode.startswith("ar") else 2 if mode.startswith("nar") else 3), 0, mode

    return sorted({mode for found in systems for mode in found}, key=order)


def metric_title(name: str) -> str:
    """How a metric is written for readers; unknown ones as they are."""
    if name in METRIC_TITLES:
        return METRIC_TITLES[name][0]
    return SPEED_TITLES.get(name, name.replace("_", " "))


def mode_title(mode: str) -> str:
    """How a mode is written for readers: AR, NAR 4; unknown ones as they are."""
    number = iterations_of(mode)
    return f"NAR {number}" if number is not None else mode.upper() if mode in ("ar", "nar") else mode


def term_title(term: str) -> str:
    """How a term of the loss is written for readers: AR, K(AR, NAR), length."""
    pair = term.removeprefix("kl_").upper().replace("_", ", ")
    return f"K({pair})" if term.startswith("kl_") else term if term == "length" else term.upper()


def primary_metric(systems: Sequence[System]) -> str:
    """The metric that stands for quality: BLEU for translation, OVERALL or what there is for GLGE."""
    counts = Counter(name for system in systems for name in system.metrics)
    known = [name for name in _PRIMARY if counts[name]]
    return known[0] if known else next(iter(counts), "sacrebleu")


def listing(value: Any) -> list[Any]:
    """The JSON array that a file should hold there; an empty one for anything else."""
    return value if isinstance(value, list) else []
