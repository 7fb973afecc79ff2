"""ROUGE-1, -2 and -L as ROUGE-1.5.5 prints them, the way files2rouge and pyrouge call it.

Follows the definitions of C.-Y. Lin's "ROUGE: A Package for Automatic Evaluation of Summaries" (2004)
and what the released script does beside them: tokens are runs of ASCII letters and digits, lower-cased
and stemmed when longer than three characters; text behind a "<" is lost; precision, recall and F are
rounded to five decimals; the "average" is the mean of 1000 bootstrap means with seeds 0 to 999.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from janus_ds.metrics.perl_random import perl_draws
from janus_ds.metrics.porter import rouge_stem

__all__ = ["NAMES", "Rouge", "Summary", "rouge", "rouge_pair", "split_sentences"]

NAMES = ("rouge1", "rouge2", "rougeL")

Summary = Sequence[str]
"""A summary as its sentences."""

Sentences = list[list[str]]

_WORD = re.compile("[A-Za-z0-9]+")
_RESAMPLES = 1000


@dataclass(frozen=True)
class Rouge:
    """F scores from 0 to 1.

    Attributes:
        official: what ROUGE-1.5.5 prints as Average_F, for each of `NAMES`.
        mean: the plain mean over the lines.
        lines: one row for each line, one column for each of `NAMES`.
    """

    official: dict[str, float]
    mean: dict[str, float]
    lines: npt.NDArray[np.float64]


def split_sentences(line: str) -> list[str]:
    """The sentences that files2rouge makes of a line: it cuts at every " ."."""
    return line.strip().split(" .")


def rouge(models: Sequence[Summary], peers: Sequence[Summary]) -> Rouge:
    """ROUGE of summaries, one model (ROUGE's name for a reference) to one peer (a system's output).

    Only ROUGE-L depends on which of the two is the model, and only if both have several sentences.
    A summary without words scores 0.

    Raises:
        ValueError: the two do not have the same number of summaries, or there are none.
    """
    if len(models) != len(peers) or not models:
        raise ValueError(f"{len(models)} models and {len(peers)} peers")
    lines = np.array([rouge_pair(model, peer) for model, peer in zip(models, peers, strict=True)])
    return Rouge(
        official=dict(zip(NAMES, _bootstrap_mean(lines), strict=True)),
        mean=dict(zip(NAMES, lines.mean(axis=0).tolist(), strict=True)),
        lines=lines,
    )


def rouge_pair(model: Summary, peer: Summary) -> tuple[float, float, float]:
    """F of ROUGE-1, ROUGE-2 and summary-level ROUGE-L of one model and one peer, 0 to 1."""
    model_sentences, peer_sentences = _tokens(model), _tokens(peer)
    model_words = [word for sentence in model_sentences for word in sentence]
    peer_words = [word for sentence in peer_sentences for word in sentence]
    model_counts, peer_counts = Counter(model_words), Counter(peer_words)
    unigrams = (model_counts & peer_counts).total()
    bigrams = (Counter(_pairs(model_words)) & Counter(_pairs(peer_words))).total()
    lcs = _union_lcs(model_sentences, peer_sentences, model_counts, peer_counts)
    sizes = len(model_words), len(peer_words)
    return (
        _f_score(unigrams, *sizes),
        _f_score(bigrams, max(0, sizes[0] - 1), max(0, sizes[1] - 1)),
        _f_score(lcs, *sizes),
    )


def _tokens(summary: Summary) -> Sentences:
    # ROUGE reads pyrouge's HTML up to the next "<", and pyrouge escapes nothing.
    heads = (sentence.partition("<")[0] for sentence in summary)
    return [[rouge_stem(word.lower()) for word in _WORD.findall(head)] for head in heads]


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    return list(pairwise(words))


def _f_score(hits: int, model_size: int, peer_size: int) -> float:
    recall = _five_decimals(hits / model_size) if model_size else 0.0
    precision = _five_decimals(hits / peer_size) if peer_size else 0.0
    half = 0.5 * precision + 0.5 * recall
    return _five_decimals(precision * recall / half) if half > 0 else 0.0


def _five_decimals(value: float) -> float:
    # As C's printf rounds, which `round` does not always do.
    return float(f"{value:.5f}")


def _union_lcs(
    models: Sentences, peers: Sentences, model_counts: Counter[str], peer_counts: Counter[str]
) -> int:
    """Words of the models that lie in the LCS with any peer sentence, clipped by the counts of both sides."""
    left_in_model, left_in_peer = Counter(model_counts), Counter(peer_counts)
    hits = 0
    for model in models:
        marked: set[int] = set()
        for peer in peers:
            marked |= _lcs_positions(model, peer)
        for position in sorted(marked):
            word = model[position]
            if left_in_model[word] > 0 and left_in_peer[word] > 0:
                hits += 1
                left_in_model[word] -= 1
                left_in_peer[word] -= 1
    return hits


def _lcs_positions(model: list[str], peer: list[str]) -> set[int]:
    """Positions in `model` of one longest common subsequence: on ties the way back goes up the model."""
    if not model or not peer:
        return set()
    rows = [[0] * (len(peer) + 1)]
    for word in model:
        above = rows[-1]
        row = [0]
        for column, other in enumerate(peer):
            best = above[column] + 1 if word == other else max(above[column + 1], row[column])
            row.append(best)
        rows.append(row)
    found: set[int] = set()
    i, j = len(model), len(peer)
    while i and j:
        if model[i - 1] == peer[j - 1]:
            i, j = i - 1, j - 1
            found.add(i)
        elif rows[i - 1][j] >= rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _bootstrap_mean(lines: npt.NDArray[np.float64]) -> list[float]:
    """Mean of the means of 1000 samples drawn with replacement, five decimals."""
    count = len(lines)
    ordered = lines[_order_of_instances(count)]
    sums = np.zeros((_RESAMPLES, lines.shape[1]))
    for drawn in perl_draws(np.arange(_RESAMPLES), count, count):
        sums += ordered[drawn]
    means = (sums / count).mean(axis=0)
    return [_five_decimals(mean) for mean in means.tolist()]


def _order_of_instances(count: int) -> list[int]:
    """The order in which ROUGE draws from the lines, which decides which line a draw means.

    pyrouge sorts the files (0.txt, 1.txt, 10.txt, ...) by name and numbers them from 1; ROUGE sorts those
    numbers as strings.
    """
    files = sorted(range(count), key=str)
    return [files[rank] for rank in sorted(range(count), key=lambda rank: str(rank + 1))]
