"""Summaries as the scripts of GLGE's four summarisation tasks hand them to ROUGE-1.5.5.

XSum and MSNews go through files2rouge; CNN/DailyMail and Gigaword through UniLM's scripts, which GLGE
took over. Each function gives (models, peers) for `rouge`.
"""

from __future__ import annotations

from collections.abc import Sequence

from janus_ds.metrics.rejoin import CASED_BRACKETS, LOWER_BRACKETS, rejoin
from janus_ds.metrics.rouge import Summary, split_sentences

__all__ = ["SENTENCE_MARK", "cnndm_summaries", "files2rouge_summaries", "gigaword_summaries"]

Summaries = tuple[list[Summary], list[Summary]]

SENTENCE_MARK = "[X_SEP]"
"""What stands between the sentences of a CNN/DailyMail hypothesis."""

_REFERENCE_MARK = " <S_SEP> "
_SHORTEST = 5
_KNOWN_SHARE = 0.7


def files2rouge_summaries(hypotheses: Sequence[str], references: Sequence[str]) -> Summaries:
    """XSum, MSNews: sentences end at " ."; the hypotheses take the place of the models, since GLGE's
    eval.py and today's files2rouge disagree about the order of the files."""
    return [split_sentences(line) for line in hypotheses], [split_sentences(line) for line in references]


def gigaword_summaries(hypotheses: Sequence[str], references: Sequence[str]) -> Summaries:
    """Gigaword: hypotheses are rejoined, and "1" becomes "#", which stands for digits in the references."""
    peers: list[Summary] = [[rejoin(line, LOWER_BRACKETS).replace("1", "#")] for line in hypotheses]
    return [[line.strip()] for line in references], peers


def cnndm_summaries(hypotheses: Sequence[str], references: Sequence[str]) -> Summaries:
    """CNN/DailyMail: sentences between [X_SEP] are rejoined; those of four words or fewer are dropped, and
    those with more than 70 % of their distinct words in the sentences before."""
    models: list[Summary] = [line.strip().split(_REFERENCE_MARK) for line in references]
    peers: list[Summary] = [
        _novel([rejoin(part, CASED_BRACKETS) for part in line.split(SENTENCE_MARK)]) for line in hypotheses
    ]
    return models, peers


def _novel(sentences: list[str]) -> list[str]:
    kept = []
    known: set[str] = set()
    for sentence in sentences:
        words = sentence.lower().split()
        if len(words) < _SHORTEST:
            continue
        if len(known.intersection(words)) / len(set(words)) <= _KNOWN_SHARE:
            kept.append(sentence)
        known.update(words)
    return kept
