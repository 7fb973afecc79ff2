"""F1 of short answers as the CoQA and SQuAD scripts compute it: words in common after normalisation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["answer_f1", "mean_answer_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def mean_answer_f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 in percent.

    Args:
        answers: one for each question.
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
