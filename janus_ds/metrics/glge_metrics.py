"""What each kind of GLGE task is scored with: summaries, questions, dialogue, answers.

Each scorer takes the texts of a task and fills a score sheet, warnings included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from janus_ds.errors import MissingDependencyError
from janus_ds.metrics.dialogue import Order, distinct, mean_answer_f1, mean_sentence_bleu
from janus_ds.metrics.files import TextLines
from janus_ds.metrics.glge_text import SENTENCE_MARK, cnndm_summaries
from janus_ds.metrics.meteor import MeteorProgram, find_meteor
from janus_ds.metrics.question_generation import QuestionItem, coco_bleu, coco_rouge_l
from janus_ds.metrics.rouge import NAMES, Summary, rouge
from janus_ds.metrics.scores import ScoreSheet


@dataclass(frozen=True)
class TaskTexts:
    """The files of one task: predictions and references, and sources where question generation has them."""

    predictions: TextLines
    references: TextLines
    sources: TextLines | None = None


@dataclass(frozen=True)
class Meteor:
    """The METEOR to use: the program, or why there is none."""

    program: MeteorProgram | None
    why_not: str = ""


Scorer = Callable[[TaskTexts, Meteor, ScoreSheet], None]
PrepareSummaries = Callable[[Sequence[str], Sequence[str]], tuple[list[Summary], list[Summary]]]
MakeItems = Callable[[Sequence[str], Sequence[str], Sequence[str] | None], list[QuestionItem]]

_ORDERS: tuple[Order, ...] = (1, 2)
_GLUED_STOP = re.compile(r"\w[.?!]$")


def choose_meteor(wanted: Literal["auto", "require", "skip"]) -> Meteor:
    """Find METEOR, or say why it is missing.

    Args:
        wanted: "auto" goes without if Java or the program is missing, "require" does not, "skip" does not
            look for it: the program takes seconds to start.

    Raises:
        MissingDependencyError: it is required and not there.
    """
    if wanted == "skip":
        return Meteor(None, "it was not asked for")
    try:
        return Meteor(find_meteor())
    except MissingDependencyError as error:
        if wanted == "require":
            raise
        return Meteor(None, f"{error.what} ({error.where}); to have it: {error.fix}")


def summary_scorer(prepare: PrepareSummaries, script: str) -> Scorer:
    """ROUGE-1, -2 and -L of summaries that `prepare` hands over as `script` does."""

    def score(texts: TaskTexts, meteor: Meteor, sheet: ScoreSheet) -> None:
        found = rouge(*prepare(texts.predictions.lines, texts.references.lines))
        for name in NAMES:
            signature = f"F1, ROUGE-1.5.5 -m, mean of 1000 bootstrap means, as {script}"
            sheet.put(name, 100 * found.official[name], signature)
        for name in NAMES:
            sheet.put(f"{name}_mean", 100 * found.mean[name], "F1, plain mean over the lines")
        _warn_of_summaries(texts, sheet)

    return score


def _warn_of_summaries(texts: TaskTexts, sheet: ScoreSheet) -> None:
    for text in (texts.predictions, texts.references):
        empty = [number for number, line in enumerate(text.lines, 1) if not line.strip()]
        if empty:
            sheet.warn(
                f"{text.name}: {len(empty)} empty lines (the first is line {empty[0]}) count as 0; "
                "the official tool stops at them"
            )
    cut = sum("<" in line for line in texts.predictions.lines)
    if cut:
        sheet.warn(f"{cut} predictions have a '<': ROUGE-1.5.5 loses the text behind it")


def score_cnndm(texts: TaskTexts, meteor: Meteor, sheet: ScoreSheet) -> None:
    """ROUGE of summaries of several sentences."""
    summary_scorer(cnndm_summaries, "UniLM's CNN/DailyMail script")(texts, meteor, sheet)
    if not any(SENTENCE_MARK in line for line in texts.predictions.lines):
        sheet.warn(f"no prediction has {SENTENCE_MARK}: each counts as one sentence, which lowers rougeL")


def question_scorer(make_items: MakeItems) -> Scorer:
    """ROUGE-L, BLEU-4 and METEOR of questions, grouped into items by `make_items`."""

    def score(texts: TaskTexts, meteor: Meteor, sheet: ScoreSheet) -> None:
        sources = None if texts.sources is None else texts.sources.lines
        items = make_items(texts.predictions.lines, texts.references.lines, sources)
        grouping = f"{len(items)} items" + (", one a line" if sources is None else ", one a source")
        sheet.put("rougeL", 100 * coco_rouge_l(items), f"coco-caption, beta 1.2, {grouping}")
        sheet.put("bleu4", 100 * coco_bleu(items)[3], f"coco-caption, {grouping}")
        _put_meteor(items, meteor, sheet)
        _warn_of_questions(texts, sheet)

    return score


def _put_meteor(items: Sequence[QuestionItem], meteor: Meteor, sheet: ScoreSheet) -> None:
    if meteor.program is not None:
        (value,) = meteor.program.scores([items])
        sheet.put("meteor", 100 * value, "METEOR 1.5, -l en -norm")
    else:
        sheet.warn(f"METEOR is missing: {meteor.why_not}")


def _warn_of_questions(texts: TaskTexts, sheet: ScoreSheet) -> None:
    if texts.sources is None:
        sheet.warn(
            "no sources were given, so every line is an item; the official script makes one item of all "
            "lines with the same source, which raises rougeL and bleu4 where sources repeat"
        )
    _warn_of_glued_stops(texts, sheet)
    for text in (texts.predictions, texts.references, texts.sources):
        if text is not None and not text.ends_with_newline:
            sheet.warn(
                f"{text.name}: the last line has no newline; the official script would lose its last letter"
            )


def _warn_of_glued_stops(texts: TaskTexts, sheet: ScoreSheet) -> None:
    glued = sum(bool(_GLUED_STOP.search(line.strip())) for line in texts.predictions.lines)
    if 2 * glued > len(texts.predictions.lines):
        sheet.warn(
            f"{glued} predictions end in a word with its full stop or question mark: the references are "
            "tokenised ('x ?'), so tokenise the predictions, too, or the scores are too low"
        )


def score_dialogue(texts: TaskTexts, meteor: Meteor, sheet: ScoreSheet) -> None:
    """BLEU-1, BLEU-2, Distinct-1, Distinct-2 of responses."""
    pair = texts.predictions.lines, texts.references.lines
    for order in _ORDERS:
        value = mean_sentence_bleu(*pair, order)
        sheet.put(f"bleu{order}", value, "mean of sentence_bleu with method7, as in nltk 3.5")
    for order in _ORDERS:
        value = distinct(texts.predictions.lines, order)
        sheet.put(f"distinct{order}", value, "different n-grams in % of all, over all lines")
    for order in _ORDERS:
        value = mean_sentence_bleu(*pair, order, "nltk36")
        sheet.put(f"bleu{order}_nltk36", value, "the same as nltk 3.6 and later smooth it")
    _warn_of_glued_stops(texts, sheet)


def score_answers(texts: TaskTexts, meteor: Meteor, sheet: ScoreSheet) -> None:
    """F1 of answers, one accepted answer a line."""
    accepted = [[line] for line in texts.references.lines]
    value = mean_answer_f1(texts.predictions.lines, accepted)
    sheet.put("f1", value, "mean F1 of words, normalised as for SQuAD")
