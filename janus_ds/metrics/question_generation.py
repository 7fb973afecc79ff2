"""BLEU-1 to -4 and ROUGE-L of generated questions, as coco-caption computes them for the QG scripts.

Lines with the same source are one item: its references are collected, its last hypothesis counts.
All lower-casing, stripping and splitting is that of Python 2 byte strings: ASCII only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from janus_ds.metrics.glge_text import LOWER_BRACKETS, ascii_lower, ascii_strip, rejoin
from janus_ds.metrics.rouge import lcs_positions

_ORDERS = 4
_TINY = 1e-15
_SMALL = 1e-9
_BETA = 1.2
_SPACES = re.compile("[ \t\n\r\x0b\x0c]+")


@dataclass
class QuestionItem:
    """One thing to ask about: the hypothesis of its last line and the references of all its lines."""

    hypothesis: str = ""
    references: list[str] = field(default_factory=list)


def squad_items(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None
) -> list[QuestionItem]:
    """Items of SQuAD question generation: hypotheses rejoined and lower-cased, the rest lower-cased. Without
    sources every line is an item."""

    def plain(text: str) -> str:
        return ascii_lower(ascii_strip(text))

    def mend(text: str) -> str:
        return ascii_lower(rejoin(ascii_strip(text), LOWER_BRACKETS))

    keys = None if sources is None else [plain(source) for source in sources]
    return group([mend(text) for text in hypotheses], [plain(text) for text in references], keys)


def msqg_items(
    hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None
) -> list[QuestionItem]:
    """Items of MSQG, whose script changes nothing in the lines."""
    return group(hypotheses, references, sources)


def group(
    hypotheses: Sequence[str], references: Sequence[str], keys: Sequence[str] | None
) -> list[QuestionItem]:
    """One item for each distinct key, in order of appearance; without keys one for each line."""
    items: dict[str | int, QuestionItem] = {}
    own_keys: Sequence[str | int] = range(len(references)) if keys is None else keys
    for key, hypothesis, reference in zip(own_keys, hypotheses, references, strict=True):
        item = items.setdefault(key, QuestionItem())
        item.hypothesis = hypothesis
        item.references.append(reference)
    return list(items.values())


def coco_bleu(items: Sequence[QuestionItem]) -> tuple[float, float, float, float]:
    """Corpus BLEU-1 to BLEU-4, 0 to 1: counts clipped by the best reference, closest reference length,
    no smoothing but for two tiny constants that keep zeros from dividing."""
    correct, guessed = np.zeros(_ORDERS), np.zeros(_ORDERS)
    length = wanted = 0
    for item in items:
        words = _words(item.hypothesis)
        references = [_words(reference) for reference in item.references]
        length += len(words)
        wanted += min((abs(len(r) - len(words)), len(r)) for r in references)[1]
        for order in range(1, _ORDERS + 1):
            guessed[order - 1] += max(0, len(words) - order + 1)
            correct[order - 1] += _clipped_hits(words, references, order)
    precisions = (correct + _TINY) / (guessed + _SMALL)
    ratio = (length + _TINY) / (wanted + _SMALL)
    brevity = np.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores = brevity * np.cumprod(precisions) ** (1 / np.arange(1, _ORDERS + 1))
    one, two, three, four = scores.tolist()
    return one, two, three, four


def _words(text: str) -> list[str]:
    return [word for word in _SPACES.split(text) if word]


def _clipped_hits(words: list[str], references: list[list[str]], order: int) -> int:
    best: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        best |= _ngrams(reference, order)
    return (_ngrams(words, order) & best).total()


def _ngrams(words: list[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))


def coco_rouge_l(items: Sequence[QuestionItem]) -> float:
    """Mean ROUGE-L over items, 0 to 1: F with beta 1.2 of the best precision and the best recall, which
    may come from two references. Words are split at single spaces, so two spaces make an empty word."""
    return float(np.mean([_rouge_l(item) for item in items])) if items else 0.0


def _rouge_l(item: QuestionItem) -> float:
    words = item.hypothesis.split(" ")
    references = [reference.split(" ") for reference in item.references]
    common = [len(lcs_positions(words, reference)) for reference in references]
    precision = max(common) / len(words)
    recall = max(hits / len(reference) for hits, reference in zip(common, references, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)
