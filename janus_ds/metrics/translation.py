"""Score translations, and compare two systems: the numbers of the paper's Tables 1, 3 and 6.

Is the difference of two systems' BLEU larger than chance makes it? Paired bootstrap: P. Koehn, "Statistical
Significance Tests for Machine Translation Evaluation", EMNLP 2004, in the form of Moses'
bootstrap-hypothesis-difference-significance.pl and of sacreBLEU's --paired-bs: with d the absolute difference
in a sample and D the real one, p is the share of samples with d - mean(d) >= D.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from sacrebleu.metrics.bleu import BLEU

from janus_ds.metrics.bleu import (
    chrf,
    compound_bleu,
    length_ratio,
    prepare_as_fairseq,
    remove_bpe,
    repetition,
    sacrebleu_13a,
    tokenized_bleu,
)
from janus_ds.metrics.scores import Scores, ScoreSheet, TextLines, check_same_length

_BPE = re.compile(r"@@( |$)")
_MOSES_ESCAPE = re.compile(r"&(apos|quot|amp|lt|gt|#91|#93|#124);")
_SPLIT_FULL_STOP = re.compile(r"\S [.?!]$")
SAMPLES = 1000
SEED = 12345
_ORDERS = 4

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Smoothing = Literal["none", "exp"]
Tokenization = Literal["none", "13a"]

# For each compared metric: how its words are made, and how it is smoothed.
_COMPARED: dict[str, tuple[Tokenization, Smoothing]] = {
    "tokenized_bleu": ("none", "none"),
    "sacrebleu": ("13a", "exp"),
}


def score_translations(
    hypotheses: TextLines,
    references: TextLines,
    split: str,
    tokens: Sequence[Sequence[Hashable]] | None = None,
) -> Scores:
    """Score a system's output.

    Args:
        hypotheses: one translation a line; subword-nmt's pieces ("@@ ") are joined where text is compared.
        references: one for each.
        split: "test", ...
        tokens: what the model generated, for the repetition ratio; without them the words of the
            lines as they stand, which are BPE's pieces if the lines have them.

    Raises:
        DataError: the two do not have the same number of lines.
    """
    check_same_length(hypotheses, references)
    sheet = ScoreSheet()
    pair = hypotheses.lines, references.lines
    for name, metric in (
        ("sacrebleu", sacrebleu_13a),
        ("tokenized_bleu", tokenized_bleu),
        ("compound_bleu", compound_bleu),
        ("chrf", chrf),
    ):
        measured = metric(*pair)
        sheet.put(name, measured.score, measured.signature)
    _put_repetition(sheet, hypotheses, references, tokens)
    sheet.put("length_ratio", length_ratio(*pair), "words of the hypotheses in % of the references'")
    _warn(sheet, hypotheses, references)
    return Scores("nmt", split, len(hypotheses.lines), sheet.metrics, sheet.signatures, sheet.warnings)


def _put_repetition(
    sheet: ScoreSheet,
    hypotheses: TextLines,
    references: TextLines,
    tokens: Sequence[Sequence[Hashable]] | None,
) -> None:
    if tokens is not None:
        unit = "generated tokens"
    elif any(_BPE.search(line) for line in hypotheses.lines):
        unit = "subwords (@@)"
    else:
        unit = "words: the lines have no subword marks"
    generated = [line.split() for line in hypotheses.lines] if tokens is None else tokens
    sheet.put("repetition", repetition(generated), f"% of tokens equal to the one before; {unit}")
    for name, text in (("repetition_words", hypotheses), ("reference_repetition_words", references)):
        words = [remove_bpe(line).split() for line in text.lines]
        sheet.put(name, repetition(words), "% of words equal to the one before")


def _warn(sheet: ScoreSheet, hypotheses: TextLines, references: TextLines) -> None:
    empty = sum(not line.strip() for line in hypotheses.lines)
    if empty:
        sheet.warn(
            f"{empty} hypotheses are empty; tokenized_bleu counts each as one wrong word, as fairseq does"
        )
    escaped = sum(bool(_MOSES_ESCAPE.search(line)) for line in references.lines)
    split = sum(bool(_SPLIT_FULL_STOP.search(line)) for line in references.lines)
    if escaped or 2 * split > len(references.lines):
        sheet.warn(
            f"the references are tokenised (of {len(references.lines)} lines {escaped} have Moses escapes, "
            f"{split} a full stop set apart): sacrebleu and chrf are not comparable with numbers on plain "
            "text, sacrebleu is too high; tokenized_bleu is the number of the literature"
        )


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


def compare_translations(hypotheses: TextLines, references: TextLines, baseline: TextLines) -> dict[str, Any]:
    """Paired bootstrap of a system's output against a baseline's, for JSON.

    Raises:
        DataError: the files do not have the same number of lines.
    """
    check_same_length(hypotheses, references)
    check_same_length(baseline, references)
    draws = bootstrap_draws(len(references.lines))
    found: dict[str, Any] = {"baseline": baseline.name, "samples": SAMPLES, "seed": SEED}
    for name, (tokenization, smoothing) in _COMPARED.items():
        system, other = (
            bleu_statistics(text.lines, references.lines, tokenization) for text in (hypotheses, baseline)
        )
        found[name] = asdict(compare(system, other, draws, smoothing))
    return found
