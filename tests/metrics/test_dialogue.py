"""PersonaChat against the official script under two versions of nltk, and CoQA's F1 by hand."""

from __future__ import annotations

import pytest

from janus_ds.metrics.dialogue import Smoothing, answer_f1, distinct, mean_answer_f1, mean_sentence_bleu
from tests.support.metric_fixtures import metric_cases

VERSIONS: dict[Smoothing, str] = {"nltk35": "official_nltk_3_5", "nltk36": "official_nltk_3_10_4"}


@pytest.mark.parametrize("origin", ["own", "real"])
def test_scores_are_the_scripts(origin: str) -> None:
    for case in metric_cases(f"personachat.{origin}"):
        for smoothing, key in VERSIONS.items():
            expected, pair = case[key], (case["hyp"], case["ref"])
            where = f"{case['id']}, {smoothing}"
            one, two = mean_sentence_bleu(*pair, 1, smoothing), mean_sentence_bleu(*pair, 2, smoothing)
            assert one == pytest.approx(expected["bleu1"], abs=1e-6), where
            assert two == pytest.approx(expected["bleu2"], abs=1e-6), where
            assert distinct(case["hyp"], 1) == pytest.approx(100 * expected["distinct1"], abs=1e-6), where
            assert distinct(case["hyp"], 2) == pytest.approx(100 * expected["distinct2"], abs=1e-6), where


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
