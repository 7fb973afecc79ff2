"""ROUGE-1, -2 and -L as ROUGE-1.5.5 prints them, the way files2rouge and pyrouge call it.

Follows the definitions of C.-Y. Lin's "ROUGE: A Package for Automatic Evaluation of Summaries" (2004)
and what the released script does beside them: tokens are runs of ASCII letters and digits, lower-cased
and stemmed when longer than three characters; text behind a "<" is lost; precision, recall and F are
rounded to five decimals; the "average" is the mean of 1000 bootstrap means with seeds 0 to 999.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

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
            marked |= lcs_positions(model, peer)
        for position in sorted(marked):
            word = model[position]
            if left_in_model[word] > 0 and left_in_peer[word] > 0:
                hits += 1
                left_in_model[word] -= 1
                left_in_peer[word] -= 1
    return hits


def lcs_positions(model: list[str], peer: list[str]) -> set[int]:
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


# Perl's random numbers: a 48-bit linear congruence, "drand48", which Perl carries itself since 5.20.
# ROUGE-1.5.5 draws its bootstrap samples with `srand(seed)` and `int(rand(n))`.

_PERL_MULTIPLIER = 0x5DEECE66D
_PERL_INCREMENT = 0xB
_PERL_LOW_WORD = 0x330E
_PERL_MASK = (1 << 48) - 1


def perl_draws(seeds: npt.NDArray[np.int64], below: int, count: int) -> Iterator[npt.NDArray[np.int64]]:
    """What `int(rand(below))` gives after `srand(seed)`, for many seeds at once.

    Args:
        seeds: S seeds, each the start of a generator of its own.
        below: draws are from 0 to below - 1.

    Yields:
        `count` arrays of S draws, the k-th of them the k-th draw of every seed.
    """
    mask, multiplier, increment = (np.uint64(n) for n in (_PERL_MASK, _PERL_MULTIPLIER, _PERL_INCREMENT))
    state = ((seeds.astype(np.uint64) << np.uint64(16)) + np.uint64(_PERL_LOW_WORD)) & mask
    for _ in range(count):
        # The product wraps at 2**64, which leaves its low 48 bits as they are.
        state = (state * multiplier + increment) & mask
        yield (state.astype(np.float64) * (below / 2.0**48)).astype(np.int64)


# The stemmer: M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980, with the author's
# later rules of step 2 (-bli -> -ble, -logi -> -log) and C.-Y. Lin's fourth step, which tries one suffix of
# the list without -ment and -ent, and then those two alone: "agreement" becomes "agreem".

_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble",
    "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate",
    "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al",
    "iviti": "ive", "biliti": "ble", "logi": "log",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ou", "ism", "ate", "iti", "ous", "ive",
    "ize",
)  # fmt: skip


@lru_cache(maxsize=1 << 16)
def rouge_stem(word: str) -> str:
    """Stem of a word of lower-case ASCII letters and digits; three characters or fewer stay as they are."""
    if len(word) <= 3:
        return word
    word = _step_1c(_step_1b(_step_1a(word)))
    word = _longest(word, _STEP_2)
    word = _longest(word, _STEP_3)
    return _step_5(_step_4(word))


def _kinds(word: str) -> str:
    """The word with v for each vowel and c for each consonant; a y is a vowel behind a consonant only."""
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and kinds.endswith("c"))
        kinds += "v" if vowel else "c"
    return kinds


def _measure(stem: str) -> int:
    """Porter's m: how often a consonant follows a vowel."""
    return _kinds(stem).count("vc")


def _is_short(stem: str) -> bool:
    """Consonants, one vowel, one consonant other than w, x, y: Porter's condition m = 1 and *o."""
    kinds = _kinds(stem)
    return kinds.endswith("cvc") and kinds.count("v") == 1 and stem[-1] not in "wxy"


def _step_1a(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    if word.endswith("s") and word[-2] != "s":
        return word[:-1]
    return word


def _step_1b(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix):
            stem = word.removesuffix(suffix)
            return _mend(stem) if "v" in _kinds(stem) else word
    return word


def _mend(stem: str) -> str:
    """Put back the e that -ed and -ing swallow, or take the doubled consonant away."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if len(stem) > 1 and stem[-1] == stem[-2] and stem[-1] not in "aeiouylsz":
        return stem[:-1]
    return stem + "e" if _is_short(stem) else stem


def _step_1c(word: str) -> str:
    return word[:-1] + "i" if word.endswith("y") and "v" in _kinds(word[:-1]) else word


def _longest(word: str, rules: dict[str, str]) -> str:
    """Exchange the longest suffix of `rules` if the stem before it has m > 0."""
    suffix = max((s for s in rules if word.endswith(s)), key=len, default="")
    stem = word.removesuffix(suffix)
    return stem + rules[suffix] if suffix and _measure(stem) > 0 else word


def _drop(word: str, suffix: str) -> str:
    stem = word.removesuffix(suffix)
    return stem if _measure(stem) > 1 else word


def _step_4(word: str) -> str:
    word = _drop(word, max((s for s in _STEP_4 if word.endswith(s)), key=len, default=""))
    word = _drop(word, "ment")
    if word.endswith("ent"):
        return _drop(word, "ent")
    return _drop(word, "ion") if word.endswith(("sion", "tion")) else word


def _step_5(word: str) -> str:
    if word.endswith("e"):
        stem = word[:-1]
        measure = _measure(stem)
        if measure > 1 or (measure == 1 and not _is_short(stem)):
            word = stem
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
