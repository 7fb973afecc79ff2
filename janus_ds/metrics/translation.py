"""Score translations, and compare two systems: the numbers of the paper's Tables 1, 3 and 6.

Is the difference of two systems' BLEU larger than chance makes it? Paired bootstrap: P. Koehn, "Statistical
Significance Tests for Machine Translation Evaluation", EMNLP 2004, in the form of Moses'
bootstrap-hypothesis-difference-significance.pl and of sacreBLEU's --paired-bs: with d the absolute difference
in a sample and D the real one, p is the share of samples with d - mean(d) >= D.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Sequence
from typing import Any, cast

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest

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
from janus_ds.metrics.scores import Scores, TextLines, check_same_length

_BPE = re.compile(r"@@( |$)")
_MOSES_ESCAPE = re.compile(r"&(apos|quot|amp|lt|gt|#91|#93|#124);")
_SPLIT_FULL_STOP = re.compile(r"\S [.?!]$")
SAMPLES = 1000
_SEED = 12345
"""sacreBLEU's own, where SACREBLEU_SEED does not name another."""


def score_translations(
    hypotheses: TextLines,
    references: TextLines,
    split: str,
    tokens: Sequence[Sequence[Hashable]] | None = None,
) -> Scores:
    """Score a system's output; subword-nmt's pieces ("@@ ") are joined where text is compared.

    Args:
        hypotheses: one translation a line.
        references: one for each.
        split: their name.
        tokens: what the model generated, for the repetition ratio; None: the words of the lines as they
            stand, which are BPE's pieces if the lines have them.

    Raises:
        DataError: the two do not have the same number of lines.
    """
    check_same_length(hypotheses, references)
    scores = Scores("nmt", split, len(hypotheses.lines))
    pair = hypotheses.lines, references.lines
    for name, metric in (
        ("sacrebleu", sacrebleu_13a),
        ("tokenized_bleu", tokenized_bleu),
        ("compound_bleu", compound_bleu),
        ("chrf", chrf),
    ):
        measured = metric(*pair)
        scores.put(name, measured.score, measured.signature)
    _put_repetition(scores, hypotheses, references, tokens)
    scores.put("length_ratio", length_ratio(*pair), "words of the hypotheses in % of the references'")
    _warn(scores, hypotheses, references)
    return scores


def _put_repetition(
    scores: Scores,
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
    scores.put("repetition", repetition(generated), f"% of tokens equal to the one before; {unit}")
    for name, text in (("repetition_words", hypotheses), ("reference_repetition_words", references)):
        words = [remove_bpe(line).split() for line in text.lines]
        scores.put(name, repetition(words), "% of words equal to the one before")


def _warn(scores: Scores, hypotheses: TextLines, references: TextLines) -> None:
    empty = sum(not line.strip() for line in hypotheses.lines)
    if empty:
        scores.warnings.append(
            f"{empty} hypotheses are empty; tokenized_bleu counts each as one wrong word, as fairseq does"
        )
    escaped = sum(bool(_MOSES_ESCAPE.search(line)) for line in references.lines)
    split = sum(bool(_SPLIT_FULL_STOP.search(line)) for line in references.lines)
    if escaped or 2 * split > len(references.lines):
        scores.warnings.append(
            f"the references are tokenised (of {len(references.lines)} lines {escaped} have Moses escapes, "
            f"{split} a full stop set apart): sacrebleu and chrf are not comparable with numbers on plain "
            "text, sacrebleu is too high; tokenized_bleu is the number of the literature"
        )


def compare_translations(hypotheses: TextLines, references: TextLines, baseline: TextLines) -> dict[str, Any]:
    """Paired bootstrap of a system's output against a baseline's, for JSON.

    Returns:
        For each compared metric `score` and `baseline` (0 to 100), `p_moses` (share of samples, about half of
        what approximate randomisation gives), `p_sacrebleu` ((count + 1) / (samples + 1)), and intervals:
        mean of the samples and half the width of their central 95 %.

    Raises:
        DataError: the files do not have the same number of lines.
    """
    check_same_length(hypotheses, references)
    check_same_length(baseline, references)
    found: dict[str, Any] = {
        "baseline": baseline.name,
        "samples": SAMPLES,
        "seed": os.environ.get("SACREBLEU_SEED", _SEED),
    }
    ours, gold = prepare_as_fairseq(hypotheses.lines, references.lines)
    theirs, _ = prepare_as_fairseq(baseline.lines, references.lines)
    found["tokenized_bleu"] = _bootstrap(
        BLEU(tokenize="none", smooth_method="none", force=True), ours, theirs, gold
    )
    joined = ([remove_bpe(line) for line in text.lines] for text in (hypotheses, baseline, references))
    found["sacrebleu"] = _bootstrap(BLEU(force=True), *joined)
    return found


def _bootstrap(
    bleu: BLEU, system: list[str], baseline: list[str], references: list[str]
) -> dict[str, float | tuple[float, float]]:
    pair: list[tuple[str, Sequence[str]]] = [("baseline", baseline), ("system", system)]
    columns = PairedTest(pair, {"BLEU": bleu}, [references], "bs", SAMPLES)()[1]
    theirs, ours = cast(list[Any], columns["BLEU"])
    # sacreBLEU would call two equal systems different, since no sample differs by more than nothing.
    p = 1.0 if system == baseline else float(ours.p_value)
    return {
        "score": ours.score,
        "baseline": theirs.score,
        "p_moses": (round(p * (SAMPLES + 1)) - 1) / SAMPLES,
        "p_sacrebleu": p,
        "score_interval": (float(ours.mean), float(ours.ci)),
        "baseline_interval": (float(theirs.mean), float(theirs.ci)),
    }
