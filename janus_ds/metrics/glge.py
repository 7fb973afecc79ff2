"""The eight tasks of GLGE, their official metrics and OVERALL (Tables 2, 4, 5, 7, 8 of the paper), and where
their files lie: the data folder, and the folder of a submission."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from janus_ds.data.text.byte_streams import COMPRESSED_SUFFIXES
from janus_ds.errors import DataError, MissingDependencyError, UsageError, suggestion
from janus_ds.metrics.glge_scores import (
    MeteorProgram,
    Order,
    QuestionItem,
    coco_bleu,
    coco_rouge_l,
    distinct,
    find_meteor,
    mean_answer_f1,
    mean_sentence_bleu,
    msqg_items,
    squad_items,
)
from janus_ds.metrics.glge_text import (
    REFERENCE_MARK,
    SENTENCE_MARK,
    cnndm_summaries,
    files2rouge_summaries,
    gigaword_summaries,
)
from janus_ds.metrics.rouge import NAMES, Summary, rouge, rouge_pair
from janus_ds.metrics.scores import Scores, TextLines, check_same_length, read_lines
from janus_ds.metrics.translation import sacrebleu_13a


@dataclass(frozen=True)
class TaskTexts:
    """The files of one task: predictions and references, and sources where question generation has them."""

    predictions: TextLines
    references: TextLines
    sources: TextLines | None = None

    def check(self) -> None:
        """Every line of a file must have its line in the others; raises as :func:`check_same_length`."""
        for text in (self.predictions, self.sources):
            if text is not None:
                check_same_length(text, self.references)


Meteor = MeteorProgram | str
"""METEOR's program, or why there is none."""
Scorer = Callable[[TaskTexts, Meteor, Scores], None]
PrepareSummaries = Callable[[Sequence[str], Sequence[str]], tuple[list[Summary], list[Summary]]]
MakeItems = Callable[[Sequence[str], Sequence[str], Sequence[str] | None], list[QuestionItem]]

_ORDERS: tuple[Order, ...] = (1, 2)
_GLUED_STOP = re.compile(r"\w[.?!]$")


def choose_meteor(wanted: Literal["auto", "require", "skip"]) -> Meteor:
    """Find METEOR and try it on a word, or say why it is missing.

    Args:
        wanted: "auto" goes without if Java or the program is missing or fails, "require" does not, "skip"
            does not look for it: the program takes seconds to start.

    Raises:
        MissingDependencyError: it is required and not there, or fails.
    """
    if wanted == "skip":
        return "it was not asked for"
    try:
        program = find_meteor()
        program.score([QuestionItem("a", ["a"])])
        return program
    except MissingDependencyError as error:
        if wanted == "require":
            raise
        return f"{error.what} ({error.where}); to have it: {error.fix}"


@dataclass(frozen=True)
class ValidationMetric:
    """What picks the best checkpoint of a run: quick, without Java or Perl.

    Attributes:
        name: its name among the figures of a run: `valid/NAME_MODE`.
        score: from outputs and references, one line each, to percent; higher is better.
    """

    name: str
    title: str
    score: Callable[[Sequence[str], Sequence[str]], float]


@dataclass(frozen=True)
class Task:
    """A task of GLGE.

    Attributes:
        columns: the metrics whose mean is OVERALL.
        uses_sources: lines with equal sources are one item.
        doubt: what is not known about the agreement with the official script, if anything.
    """

    name: str
    columns: tuple[str, ...]
    score: Scorer
    validation: ValidationMetric
    uses_sources: bool = False
    doubt: str = ""


def _summaries(name: str, prepare: PrepareSummaries, script: str, doubt: str = "") -> Task:
    """ROUGE-1, -2 and -L of summaries that `prepare` hands over as `script` does.

    In validation their mean, which is OVERALL but for the bootstrap.
    """

    def score(texts: TaskTexts, meteor: Meteor, scores: Scores) -> None:
        found = rouge(*prepare(texts.predictions.lines, texts.references.lines))
        for metric in NAMES:
            signature = f"F1, ROUGE-1.5.5 -m, mean of 1000 bootstrap means, as {script}"
            scores.put(metric, 100 * found.official[metric], signature)
        for metric in NAMES:
            scores.put(f"{metric}_mean", 100 * found.mean[metric], "F1, plain mean over the lines")
        _warn_of_summaries(texts, scores)
        marked = any(m in line for line in texts.predictions.lines for m in (SENTENCE_MARK, REFERENCE_MARK))
        if prepare is cnndm_summaries and not marked:
            scores.warnings.append(
                f"no prediction has {SENTENCE_MARK}: each counts as one sentence, which lowers rougeL"
            )

    def quick(outputs: Sequence[str], references: Sequence[str]) -> float:
        pairs = zip(*prepare(outputs, references), strict=True)
        return 100 * float(np.mean([rouge_pair(model, peer) for model, peer in pairs]))

    return Task(name, NAMES, score, ValidationMetric("rouge", "mean ROUGE", quick), doubt=doubt)


def _questions(name: str, make_items: MakeItems, doubt: str = "") -> Task:
    """ROUGE-L, BLEU-4 and METEOR of questions, grouped into items by `make_items`.

    In validation the mean of the first two, and every line is an item.
    """

    def score(texts: TaskTexts, meteor: Meteor, scores: Scores) -> None:
        sources = None if texts.sources is None else texts.sources.lines
        items = make_items(texts.predictions.lines, texts.references.lines, sources)
        grouping = f"{len(items)} items" + (", one a line" if sources is None else ", one a source")
        scores.put("rougeL", 100 * coco_rouge_l(items), f"coco-caption, beta 1.2, {grouping}")
        scores.put("bleu4", 100 * coco_bleu(items)[3], f"coco-caption, {grouping}")
        if isinstance(meteor, MeteorProgram):
            scores.put("meteor", 100 * meteor.score(items), "METEOR 1.5, -l en -norm")
        else:
            scores.warnings.append(f"METEOR is missing: {meteor}")
        _warn_of_questions(texts, scores)

    def quick(outputs: Sequence[str], references: Sequence[str]) -> float:
        items = make_items(outputs, references, None)
        return 50 * (coco_rouge_l(items) + coco_bleu(items)[3])

    metric = ValidationMetric("question", "mean of ROUGE-L and BLEU-4", quick)
    return Task(name, ("rougeL", "bleu4", "meteor"), score, metric, uses_sources=True, doubt=doubt)


def _warn_of_summaries(texts: TaskTexts, scores: Scores) -> None:
    for text in (texts.predictions, texts.references):
        empty = [number for number, line in enumerate(text.lines, 1) if not line.strip()]
        if empty:
            scores.warnings.append(
                f"{text.name}: {len(empty)} empty lines (the first is line {empty[0]}) count as 0; "
                "the official tool stops at them"
            )
    cut = sum("<" in line.replace(REFERENCE_MARK, "") for line in texts.predictions.lines)
    if cut:
        scores.warnings.append(f"{cut} predictions have a '<': ROUGE-1.5.5 loses the text behind it")


def _warn_of_questions(texts: TaskTexts, scores: Scores) -> None:
    if texts.sources is None:
        scores.warnings.append(
            "no sources were given, so every line is an item; the official script makes one item of all "
            "lines with the same source, which raises rougeL and bleu4 where sources repeat"
        )
    _warn_of_glued_stops(texts, scores)
    for text in (texts.predictions, texts.references, texts.sources):
        if text is not None and not text.ends_with_newline:
            scores.warnings.append(
                f"{text.name}: the last line has no newline; the official script would lose its last letter"
            )


def _warn_of_glued_stops(texts: TaskTexts, scores: Scores) -> None:
    glued = sum(bool(_GLUED_STOP.search(line.strip())) for line in texts.predictions.lines)
    if 2 * glued > len(texts.predictions.lines):
        scores.warnings.append(
            f"{glued} predictions end in a word with its full stop or question mark: the references are "
            "tokenised ('x ?'), so tokenise the predictions, too, or the scores are too low"
        )


def _score_dialogue(texts: TaskTexts, meteor: Meteor, scores: Scores) -> None:
    """BLEU-1, BLEU-2, Distinct-1, Distinct-2 of responses."""
    pair = texts.predictions.lines, texts.references.lines
    for order in _ORDERS:
        value = mean_sentence_bleu(*pair, order)
        scores.put(f"bleu{order}", value, "mean of sentence_bleu with method7, as in nltk 3.5")
    for order in _ORDERS:
        value = distinct(texts.predictions.lines, order)
        scores.put(f"distinct{order}", value, "different n-grams in % of all, over all lines")
    _warn_of_glued_stops(texts, scores)


def _f1(outputs: Sequence[str], references: Sequence[str]) -> float:
    """F1 of answers, one accepted answer a line."""
    return mean_answer_f1(outputs, [[line] for line in references])


def _score_answers(texts: TaskTexts, meteor: Meteor, scores: Scores) -> None:
    value = _f1(texts.predictions.lines, texts.references.lines)
    scores.put("f1", value, "mean F1 of words, normalised as for SQuAD")


_DIALOGUE = ("bleu1", "bleu2", "distinct1", "distinct2")
_DOUBT = "built from the published definition; not compared with the official script's output"
_BLEU_2 = ValidationMetric("bleu2", "BLEU-2", lambda out, ref: mean_sentence_bleu(out, ref, 2))

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        _summaries("cnndm", cnndm_summaries, "UniLM's CNN/DailyMail script", _DOUBT),
        _summaries("gigaword", gigaword_summaries, "UniLM's Gigaword script", _DOUBT),
        _summaries("xsum", files2rouge_summaries, "files2rouge"),
        _summaries("msnews", files2rouge_summaries, "files2rouge", f"{_DOUBT} (the procedure is xsum's)"),
        _questions("squadqg", squad_items),
        _questions("msqg", msqg_items, _DOUBT),
        Task("coqa", ("f1",), _score_answers, ValidationMetric("f1", "F1", _f1), doubt=_DOUBT),
        Task("personachat", _DIALOGUE, _score_dialogue, _BLEU_2),
    )
}
"""All tasks by name, in the order of the benchmark."""
VALIDATION_METRICS: Mapping[str, ValidationMetric] = {
    "nmt": ValidationMetric("bleu", "BLEU", lambda out, ref: sacrebleu_13a(out, ref).score),
    **{name: task.validation for name, task in TASKS.items()},
}
"""By the name of the task (`train.valid_task`)."""


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
    """Score the predictions of one task as its official script does, in percent; only question generation
    asks for METEOR.
    """
    texts.check()
    count = len(texts.references.lines)
    scores = Scores(task.name, split, count)
    task.score(texts, meteor, scores)
    if task.doubt:
        scores.warnings.append(f"{task.name}: {task.doubt}")
    missing = [name for name in task.columns if name not in scores.metrics]
    if missing:
        scores.warnings.append(f"overall is left out, since it needs {', '.join(missing)}")
    else:
        value = overall([scores.metrics[name] for name in task.columns])
        scores.put("overall", value, f"mean of {', '.join(task.columns)}")
    return scores


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
    parts = {"tasks": {scores.task: scores.as_dict() for scores in found}}
    whole = Scores("all", split, sum(scores.n for scores in found), extra=parts)
    for scores in found:
        if "overall" in scores.metrics:
            whole.put(scores.task, scores.metrics["overall"], scores.signatures["overall"])
    missing = [name for name in TASKS if name not in whole.metrics]
    if missing:
        whole.warnings.append(f"overall of the benchmark is left out: no overall of {', '.join(missing)}")
    else:
        whole.put("overall", overall([whole.metrics[name] for name in TASKS]), "mean over the eight tasks")
    return whole


def read_texts(task: Task, predictions: Path, data: Path, split: str) -> TaskTexts:
    """Predictions with the references of the data folder, and the sources where the task uses them; the
    folder is of one level in the official layout: glge/easy, with xsum_data/org_data/test.tgt.

    Raises:
        DataError: a file is missing (sources may be) or not text.
    """
    folder = data / f"{task.name}_data" / "org_data"
    references, sources = (_plain_or_compressed(folder / f"{split}.{side}") for side in ("tgt", "src"))
    if references is None:
        raise DataError(
            f"the references of {task.name} are missing",
            str(folder / f"{split}.tgt"),
            "--data is the folder of one level, such as glge/easy, that holds TASK_data/org_data/SPLIT.tgt",
        )
    grouping = read_lines(sources) if task.uses_sources and sources else None
    return TaskTexts(read_lines(predictions), read_lines(references), grouping)


def _plain_or_compressed(path: Path) -> Path | None:
    names = (path.with_name(f"{path.name}{end}") for end in ("", *COMPRESSED_SUFFIXES))
    return next((name for name in names if name.is_file()), None)


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
    """The prediction file of one task, compressed or not, or None: TASK.LEVEL.SPLIT, as submissions are
    named, TASK.SPLIT or TASK.SPLIT.txt.

    Raises:
        UsageError: there are several.
    """
    named = (path for path in sorted(folder.glob(f"{task}.*")) if path.is_file())
    names = {path: path.stem if path.suffix in COMPRESSED_SUFFIXES else path.name for path in named}
    plain = f"{task}.{split}.txt"
    found = [path for path, name in names.items() if name.endswith(f".{split}") or name == plain]
    if len(found) > 1:
        raise UsageError(
            f"there are {len(found)} predictions for {task}",
            ", ".join(str(path) for path in found),
            "keep one level's predictions in a folder",
        )
    return found[0] if found else None
