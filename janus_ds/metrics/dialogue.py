"""Scores of GLGE's two conversational tasks: responses (PersonaChat) and answers (CoQA).

Responses get BLEU-1, BLEU-2 and Distinct as GLGE's PersonaChat script (PLATO's) computes them: the mean of
nltk's sentence BLEU with "method7" smoothing over the lines. nltk changed that smoothing in 3.5 and in 3.6;
the published numbers fit 3.5 only, which is followed here. Smoothing lifts every order, so a perfect line
scores more than 100. Answers get the F1 of words that the CoQA and SQuAD scripts compute.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

Order = Literal[1, 2]
Weights = tuple[float, float, float, float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ORDERS = 4
_K = 5
_WEIGHTS: dict[int, Weights] = {1: (1.0, 0.0, 0.0, 0.0), 2: (0.5, 0.5, 0.0, 0.0)}


def mean_sentence_bleu(hypotheses: Sequence[str], references: Sequence[str], order: Order) -> float:
    """Mean over the lines of sentence BLEU-1 or BLEU-2, times 100.

    Args:
        hypotheses: tokens between single spaces, case kept.
    """
    scores = [
        _sentence_bleu(_tokens(hypothesis), _tokens(reference), _WEIGHTS[order])
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return 100 * math.fsum(scores) / len(scores) if scores else 0.0


def distinct(hypotheses: Sequence[str], order: int) -> float:
    """Distinct-n over all lines, times 100: different n-grams in percent of all n-grams. An empty line
    counts as one empty token."""
    counts: Counter[tuple[str, ...]] = Counter()
    for hypothesis in hypotheses:
        counts.update(_ngrams(_tokens(hypothesis), order))
    return 100 * (len(counts) + 1e-12) / (counts.total() + 1e-5)


def _tokens(line: str) -> list[str]:
    return line.strip().split(" ")


def _ngrams(tokens: list[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]


def _sentence_bleu(hypothesis: list[str], reference: list[str], weights: Weights) -> float:
    counted = [_hits_and_total(hypothesis, reference, order) for order in range(1, _ORDERS + 2)]
    if counted[0][0] == 0:
        return 0.0
    try:
        precisions = _smooth_neighbours(_smooth_zeros(counted, len(hypothesis)))
        logs = [weight * math.log(p) for weight, p in zip(weights, precisions, strict=True)]
    except (ZeroDivisionError, ValueError):
        # The script counts a line as 0 when nltk fails, as it does for one token: 5 / ln(1).
        return 0.0
    length, wanted = len(hypothesis), len(reference)
    brevity = 1.0 if length > wanted else math.exp(1 - wanted / length)
    return brevity * math.exp(math.fsum(logs))


def _hits_and_total(hypothesis: list[str], reference: list[str], order: int) -> tuple[int, int]:
    grams = Counter(_ngrams(hypothesis, order))
    hits = grams & Counter(_ngrams(reference, order))
    return hits.total(), max(1, grams.total())


def _smooth_zeros(counted: list[tuple[int, int]], length: int) -> list[float]:
    """nltk's method4 on the first four orders; the fifth stays as counted."""
    return [
        (hits if hits or order == _ORDERS else order + _K / math.log(length)) / total
        for order, (hits, total) in enumerate(counted)
    ]


def _smooth_neighbours(precisions: list[float]) -> list[float]:
    """nltk's method5: each order is the mean of itself, the smoothed one below and the raw one above."""
    below = precisions[0] + 1
    smoothed = []
    for here, above in pairwise(precisions):
        below = (below + here + above) / 3
        smoothed.append(below)
    return smoothed


def mean_answer_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 in percent.

    Args:
        references: for each question the accepted answers; the best of them counts.
    """
    scores = [
        max(answer_f1(answer, reference) for reference in accepted)
        for answer, accepted in zip(answers, references, strict=True)
    ]
    return 100 * sum(scores) / len(scores) if scores else 0.0


def answer_f1(answer: str, reference: str) -> float:
    """F1 of the words of two texts, 0 to 1; lower-cased, without punctuation, a, an and the. If one of
    them has no words, 1 when the other has none either."""
    given, wanted = _words(answer), _words(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = (Counter(given) & Counter(wanted)).total()
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()
