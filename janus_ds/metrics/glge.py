"""The eight tasks of GLGE, their official metrics and OVERALL (Tables 2, 4, 5, 7, 8 of the paper), and where
their files lie: the data folder, and the folder of a submission."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from janus_ds.config.faults import suggestion
from janus_ds.errors import DataError, UsageError
from janus_ds.metrics.files import TextLines, check_same_length, read_lines
from janus_ds.metrics.glge_metrics import (
    Meteor,
    Scorer,
    TaskTexts,
    question_scorer,
    score_answers,
    score_cnndm,
    score_dialogue,
    summary_scorer,
)
from janus_ds.metrics.glge_text import files2rouge_summaries, gigaword_summaries
from janus_ds.metrics.question_generation import msqg_items, squad_items
from janus_ds.metrics.scores import Scores, ScoreSheet

_SUMMARY = ("rouge1", "rouge2", "rougeL")
_QUESTION = ("rougeL", "bleu4", "meteor")
_DIALOGUE = ("bleu1", "bleu2", "distinct1", "distinct2")
_ANSWER = ("f1",)
_DOUBT = "built from the published definition; not compared with the official script's output"


@dataclass(frozen=True)
class Task:
    """A task of GLGE.

    Attributes:
        name: as in file names.
        columns: the metrics whose mean is OVERALL.
        score: fills in the metrics.
        uses_sources: lines with equal sources are one item.
        doubt: what is not known about the agreement with the official script, if anything.
    """

    name: str
    columns: tuple[str, ...]
    score: Scorer
    uses_sources: bool = False
    doubt: str = ""


_FILES2ROUGE = summary_scorer(files2rouge_summaries, "files2rouge")
_GIGAWORD = summary_scorer(gigaword_summaries, "UniLM's Gigaword script")

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("cnndm", _SUMMARY, score_cnndm, doubt=_DOUBT),
        Task("gigaword", _SUMMARY, _GIGAWORD, doubt=_DOUBT),
        Task("xsum", _SUMMARY, _FILES2ROUGE),
        Task("msnews", _SUMMARY, _FILES2ROUGE, doubt=f"{_DOUBT} (the procedure is xsum's)"),
        Task("squadqg", _QUESTION, question_scorer(squad_items), uses_sources=True),
        Task("msqg", _QUESTION, question_scorer(msqg_items), uses_sources=True, doubt=_DOUBT),
        Task("coqa", _ANSWER, score_answers, doubt=_DOUBT),
        Task("personachat", _DIALOGUE, score_dialogue),
    )
}
"""All tasks by name, in the order of the benchmark."""


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        UsageError: there is none; names the nearest.
    """
    if name not in TASKS:
        advice = suggestion(name, TASKS, f"use {', '.join(TASKS)} or all")
        raise UsageError(f"there is no task {name!r}", "--task", advice)
    return TASKS[name]


def score_task(task: Task, texts: TaskTexts, split: str, meteor: Meteor) -> Scores:
    """Score the predictions of one task as its official script does, in percent.

    Args:
        task: see `TASKS`.
        texts: predictions, references and, for question generation, sources.
        split: "dev" or "test".
        meteor: see `choose_meteor`; only question generation asks for it.

    Raises:
        DataError: the files do not have the same number of lines.
        MissingDependencyError: METEOR's program failed.
    """
    check_same_length(texts.predictions, texts.references)
    if texts.sources is not None:
        check_same_length(texts.sources, texts.references)
    sheet = ScoreSheet()
    task.score(texts, meteor, sheet)
    if task.doubt:
        sheet.warn(f"{task.name}: {task.doubt}")
    missing = [name for name in task.columns if name not in sheet.metrics]
    if missing:
        sheet.warn(f"overall is left out, since it needs {', '.join(missing)}")
    else:
        value = overall([sheet.metrics[name] for name in task.columns])
        sheet.put("overall", value, f"mean of {', '.join(task.columns)}")
    count = len(texts.references.lines)
    return Scores(task.name, split, count, sheet.metrics, sheet.signatures, sheet.warnings)


def overall(values: Sequence[float]) -> float:
    """OVERALL of a row of a table: the unweighted mean of its columns, Distinct in percent.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("there is nothing to average")
    return sum(values) / len(values)


def combine(found: Sequence[Scores], split: str) -> Scores:
    """The scores of several tasks as one: OVERALL of each task, and their mean if all eight are there.

    The tasks' own scores stand under `tasks` in the JSON.
    """
    sheet = ScoreSheet()
    for scores in found:
        if "overall" in scores.metrics:
            sheet.put(scores.task, scores.metrics["overall"], scores.signatures["overall"])
    missing = [name for name in TASKS if name not in sheet.metrics]
    if missing:
        sheet.warn(f"overall of the benchmark is left out: no overall of {', '.join(missing)}")
    else:
        value = overall([sheet.metrics[name] for name in TASKS])
        sheet.put("overall", value, "mean over the eight tasks")
    parts = {"tasks": {scores.task: scores.as_dict() for scores in found}}
    count = sum(scores.n for scores in found)
    return Scores("all", split, count, sheet.metrics, sheet.signatures, sheet.warnings, parts)


def read_texts(task: Task, predictions: Path, data: Path, split: str) -> TaskTexts:
    """Predictions with the references of the data folder, and the sources where the task uses them.

    Args:
        task: see `TASKS`.
        predictions: one a line.
        data: the folder of one level in the official layout: glge/easy, with xsum_data/org_data/test.tgt.
        split: "dev" or "test".

    Raises:
        DataError: a file is missing (sources may be) or not text.
    """
    folder = data / f"{task.name}_data" / "org_data"
    references = folder / f"{split}.tgt"
    if not references.is_file():
        raise DataError(
            f"the references of {task.name} are missing",
            str(references),
            "--data is the folder of one level, such as glge/easy, that holds TASK_data/org_data/SPLIT.tgt",
        )
    sources: TextLines | None = None
    if task.uses_sources and (path := folder / f"{split}.src").is_file():
        sources = read_lines(path)
    return TaskTexts(read_lines(predictions), read_lines(references), sources)


def find_predictions(folder: Path, split: str) -> dict[str, Path]:
    """The prediction file of each task that a submission has, in the order of the benchmark.

    Raises:
        DataError: the folder is missing, or there is none for any task.
        UsageError: there are several for one task.
    """
    if not folder.is_dir():
        raise DataError("there is no such folder", str(folder), "give a folder of predictions")
    found = {name: path for name in TASKS if (path := _find_prediction(folder, name, split)) is not None}
    if not found:
        raise DataError(
            f"no predictions for any task and the split {split!r}",
            str(folder),
            f"name the files as submissions are named: xsum.easy.{split}, squadqg.easy.{split}, ...",
        )
    return found


def _find_prediction(folder: Path, task: str, split: str) -> Path | None:
    """The prediction file of one task, or None: TASK.LEVEL.SPLIT, as submissions are named, TASK.SPLIT or
    TASK.SPLIT.txt.

    Raises:
        UsageError: there are several.
    """
    names = (f"{task}.{split}", f"{task}.{split}.txt")
    found = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.name in names or (path.name.startswith(f"{task}.") and path.name.endswith(f".{split}")))
    ]
    if len(found) > 1:
        raise UsageError(
            f"there are {len(found)} predictions for {task}",
            ", ".join(str(path) for path in found),
            "keep one level's predictions in a folder",
        )
    return found[0] if found else None
