"""Paired bootstrap: is the difference of two systems' BLEU larger than chance makes it?

P. Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004, in the form
of Moses' bootstrap-hypothesis-difference-significance.pl and of sacreBLEU's --paired-bs: with d the
absolute difference in a sample and D the real one, p is the share of samples with d - mean(d) >= D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics.bleu import BLEU

from janus_ds.metrics.bleu import prepare_as_fairseq, remove_bpe

__all__ = ["SAMPLES", "SEED", "Comparison", "bleu_statistics", "bootstrap_draws", "compare", "corpus_bleu"]

SAMPLES = 1000
SEED = 12345
_ORDERS = 4

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Smoothing = Literal["none", "exp"]
Tokenization = Literal["none", "13a"]


@dataclass(frozen=True)
class Comparison:
    """A system against a baseline; scores from 0 to 100.

    Attributes:
        score: of the system, on all lines.
        baseline: of the baseline.
        p_moses: p-value as Moses' script counts it; about half of what approximate randomisation gives.
        p_sacrebleu: (count + 1) / (samples + 1), sacreBLEU's way.
        score_interval: middle and half width of the central 95 % of the system's samples.
        baseline_interval: the same of the baseline.
    """

    score: float
    baseline: float
    p_moses: float
    p_sacrebleu: float
    score_interval: tuple[float, float]
    baseline_interval: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def bleu_statistics(hypotheses: Sequence[str], references: Sequence[str], tokenize: Tokenization) -> Integers:
    """What BLEU adds up over lines.

    Args:
        hypotheses: N lines.
        references: N lines.
        tokenize: "none" prepares both sides as fairseq does, "13a" is sacreBLEU's tokenisation.

    Returns:
        N x 10: length of hypothesis and reference, hits of 1- to 4-grams, numbers of 1- to 4-grams.
    """
    if tokenize == "none":
        hypothesis_lines, reference_lines = prepare_as_fairseq(hypotheses, references)
    else:
        hypothesis_lines = [remove_bpe(line) for line in hypotheses]
        reference_lines = [remove_bpe(line) for line in references]
    # The effective order changes the score of a line, which is not used, and not its counts.
    bleu = BLEU(tokenize=tokenize, smooth_method="none", force=True, effective_order=True)
    rows = []
    for hypothesis, reference in zip(hypothesis_lines, reference_lines, strict=True):
        line = bleu.sentence_score(hypothesis, [reference])
        rows.append([line.sys_len, line.ref_len, *line.counts, *line.totals])
    return np.array(rows, dtype=np.int64)


def corpus_bleu(statistics: npt.NDArray[Any], smoothing: Smoothing = "none") -> Floats:
    """BLEU from added-up statistics.

    Args:
        statistics: ... x 10, see `bleu_statistics`.
        smoothing: "none", or "exp": the k-th order without a hit counts 2**-k hits, sacreBLEU's default.

    Returns:
        Scores from 0 to 100, shape of `statistics` without its last axis.
    """
    counts = np.asarray(statistics, dtype=np.float64)
    length, wanted = counts[..., 0], counts[..., 1]
    log_precision = np.zeros(counts.shape[:-1])
    credit = np.ones(counts.shape[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        for order in range(_ORDERS):
            hits, total = counts[..., 2 + order], counts[..., 2 + _ORDERS + order]
            if smoothing == "exp":
                credit = np.where(hits == 0, credit / 2, credit)
                hits = np.where(hits == 0, credit, hits)
            log_precision += np.where((hits > 0) & (total > 0), np.log(hits / total), -np.inf)
        brevity = np.where(length < wanted, np.exp(1 - wanted / length), 1.0)
        score = np.where(length > 0, 100 * brevity * np.exp(log_precision / _ORDERS), 0.0)
    # sacreBLEU gives 0, not a smoothed score, where no word at all is right.
    return np.where(counts[..., 2] > 0, score, 0.0)


def bootstrap_draws(lines: int, samples: int = SAMPLES, seed: int = SEED) -> Integers:
    """The lines of each sample, samples x lines: the draws that sacreBLEU makes with the same seed."""
    return np.random.default_rng(seed).choice(lines, size=(samples, lines), replace=True)


def compare(system: Integers, baseline: Integers, draws: Integers, smoothing: Smoothing) -> Comparison:
    """Compare two systems on the same lines.

    Args:
        system: N x 10 statistics, see `bleu_statistics`.
        baseline: the same of the other system.
        draws: samples x N line numbers, see `bootstrap_draws`.
        smoothing: see `corpus_bleu`.
    """
    score, other = (corpus_bleu(part.sum(axis=0), smoothing) for part in (system, baseline))
    weights = np.stack([np.bincount(row, minlength=len(system)) for row in draws]).astype(np.float64)
    samples, other_samples = (corpus_bleu(weights @ part, smoothing) for part in (system, baseline))
    differences = np.abs(samples - other_samples)
    count = int(np.sum(differences - differences.mean() >= abs(score - other)))
    if np.array_equal(system, baseline):
        # Rounding must not make two equal systems differ.
        count = len(draws)
    return Comparison(
        score=float(score),
        baseline=float(other),
        p_moses=count / len(draws),
        p_sacrebleu=(count + 1) / (len(draws) + 1),
        score_interval=_interval(samples),
        baseline_interval=_interval(other_samples),
    )


def _interval(samples: Floats) -> tuple[float, float]:
    """Middle and half width between the order statistics 2.5 % from both ends (25 and 974 of 1000)."""
    ordered = np.sort(samples)
    low = ordered[len(ordered) // 40]
    high = ordered[len(ordered) - 1 - len(ordered) // 40]
    return float(low + high) / 2, float(high - low) / 2
