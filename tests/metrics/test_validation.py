"""The metric by which a run picks its best checkpoint is the task's own."""

from __future__ import annotations

import pytest

from janus_ds.config.schema import FIELDS
from janus_ds.metrics.glge import TASKS, VALIDATION_METRICS, TaskTexts, score_task
from janus_ds.metrics.scores import TextLines
from janus_ds.metrics.translation import sacrebleu_13a

OUTPUTS = [
    "the old river runs past the mill . it is slow .",
    "what did the man see ?",
    "",
    "a bird sings at night",
]
REFERENCES = [
    "the river runs past an old mill . it runs slow .",
    "what did the man look at ?",
    "nothing here",
    "a bird sang in the night",
]


def test_there_is_one_for_every_task() -> None:
    assert tuple(VALIDATION_METRICS) == FIELDS["train.valid_task"].choices == ("nmt", *TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_it_is_the_mean_of_official_values(task: str) -> None:
    texts = TaskTexts(TextLines("outputs", OUTPUTS), TextLines("references", REFERENCES))
    official = score_task(TASKS[task], texts, "dev", "not here").metrics
    columns = {
        "rouge": ("rouge1_mean", "rouge2_mean", "rougeL_mean"),
        "question": ("rougeL", "bleu4"),
        "f1": ("f1",),
        "bleu2": ("bleu2",),
    }[VALIDATION_METRICS[task].name]
    expected = sum(official[column] for column in columns) / len(columns)
    assert VALIDATION_METRICS[task].score(OUTPUTS, REFERENCES) == pytest.approx(expected, abs=1e-9)
    assert expected > 0


def test_translations_are_scored_by_sacrebleu() -> None:
    assert VALIDATION_METRICS["nmt"].score(OUTPUTS, REFERENCES) == sacrebleu_13a(OUTPUTS, REFERENCES).score
