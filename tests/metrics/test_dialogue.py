"""PersonaChat against the official script under nltk 3.5, and CoQA's F1 by hand."""

from __future__ import annotations

import pytest

from janus_ds.metrics.glge_scores import answer_f1, distinct, mean_answer_f1, mean_sentence_bleu
from tests.support.metric_fixtures import metric_cases


@pytest.mark.parametrize("origin", ["own", "real"])
def test_scores_are_the_scripts(origin: str) -> None:
    for case in metric_cases(f"personachat.{origin}"):
        expected, pair = case["official_nltk_3_5"], (case["hyp"], case["ref"])
        for order in (1, 2):
            bleu = mean_sentence_bleu(*pair, order)
            assert bleu == pytest.approx(expected[f"bleu{order}"], abs=1e-6), case["id"]
            different = distinct(case["hyp"], order)
            assert different == pytest.approx(100 * expected[f"distinct{order}"], abs=1e-6), case["id"]


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The white cat.", "a White cat", 1.0),
        ("white cat", "the cat sat", 2 * (1 / 2) * (1 / 2) / (1 / 2 + 1 / 2)),
        ("no no yes", "no", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("dog", "cat", 0.0),
        ("the", "", 1.0),
        ("", "cat", 0.0),
        ("they're theirs", "theyre theirs", 1.0),
    ],
)
def test_f1_of_answers(answer: str, reference: str, f1: float) -> None:
    assert answer_f1(answer, reference) == pytest.approx(f1)


def test_the_best_accepted_answer_counts() -> None:
    assert mean_answer_f1(["cat", "dog"], [["a bird", "the cat"], ["cat"]]) == 50
