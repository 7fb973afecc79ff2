"""A METEOR in plain Python that knows equal words and equal stems, and nothing of meaning.

The formula and parameters are METEOR 1.5's ("rank", English; M. Denkowski and A. Lavie, WMT 2014). What
is left out: synonyms, paraphrases, the lesser weight of function words, and Snowball's stemmer, for
which Porter's stands. So the value is not METEOR, it is mostly lower, and it is never reported as METEOR.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from janus_ds.metrics.porter import rouge_stem
from janus_ds.metrics.question_generation import QuestionItem

__all__ = ["meteor_exact_stem"]

_ALPHA, _BETA, _GAMMA = 0.85, 0.2, 0.6
_EXACT, _STEM = 1.0, 0.6
_BEAM = 40
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|\w+|[^\w\s]")


@dataclass(frozen=True)
class _Statistics:
    """What adds up over items: lengths, matched words, their weights, chunks of adjacent matches."""

    length: int = 0
    wanted: int = 0
    matches: int = 0
    weight: float = 0.0
    chunks: int = 0

    def plus(self, other: _Statistics) -> _Statistics:
        return _Statistics(
            self.length + other.length,
            self.wanted + other.wanted,
            self.matches + other.matches,
            self.weight + other.weight,
            self.chunks + other.chunks,
        )

    def score(self) -> float:
        if self.matches == 0:
            return 0.0
        precision, recall = self.weight / self.length, self.weight / self.wanted
        mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
        penalty: float = _GAMMA * (self.chunks / self.matches) ** _BETA
        return mean * (1 - penalty)


@dataclass(frozen=True)
class _Path:
    """A partial alignment, hypothesis words from left to right; `used` has a bit for each reference word."""

    used: int = 0
    last: int = -2
    matches: int = 0
    weight: float = 0.0
    chunks: int = 0
    distance: int = 0

    def rank(self) -> tuple[int, int, int, float]:
        """More words, then fewer chunks, then less movement, then the better kind of match."""
        return -self.matches, self.chunks, self.distance, -self.weight


def meteor_exact_stem(items: Sequence[QuestionItem]) -> float:
    """Corpus score from 0 to 1; of several references the one that scores best counts."""
    total = _Statistics()
    for item in items:
        candidates = [_align(_words(item.hypothesis), _words(r)) for r in item.references]
        total = total.plus(max(candidates, key=_Statistics.score))
    return total.score()


def _words(text: str) -> list[str]:
    return _TOKEN.findall(text.replace("|||", "").lower())


def _align(hypothesis: list[str], reference: list[str]) -> _Statistics:
    hypothesis_stems = [rouge_stem(word) for word in hypothesis]
    reference_stems = [rouge_stem(word) for word in reference]
    beam = [_Path()]
    for place, word in enumerate(hypothesis):
        matches = [
            (other, _EXACT if word == reference[other] else _STEM)
            for other, stem in enumerate(reference_stems)
            if stem == hypothesis_stems[place]
        ]
        steps = (step for path in beam for step in _steps(path, place, matches))
        beam = sorted(steps, key=_Path.rank)[:_BEAM]
    best = beam[0]
    whole = best.chunks == 1 and best.matches == len(hypothesis) == len(reference)
    # A sentence that is right from end to end is not in pieces.
    chunks = 0 if whole else best.chunks
    return _Statistics(len(hypothesis), len(reference), best.matches, best.weight, chunks)


def _steps(path: _Path, place: int, matches: list[tuple[int, float]]) -> Iterator[_Path]:
    """The path with this word left alone (which ends a chunk), and with each free match."""
    yield _Path(path.used, -2, path.matches, path.weight, path.chunks, path.distance)
    for other, weight in matches:
        if not path.used >> other & 1:
            yield _Path(
                path.used | 1 << other,
                other,
                path.matches + 1,
                path.weight + weight,
                path.chunks + (other != path.last + 1),
                path.distance + abs(place - other),
            )
