"""Score translations: from lines of text to the numbers of the paper's Tables 1, 3 and 6."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

from janus_ds.metrics.bleu import (
    chrf,
    compound_bleu,
    length_ratio,
    remove_bpe,
    repetition,
    sacrebleu_13a,
    tokenized_bleu,
)
from janus_ds.metrics.files import TextLines, check_same_length
from janus_ds.metrics.scores import Scores, ScoreSheet
from janus_ds.metrics.significance import (
    SAMPLES,
    SEED,
    Smoothing,
    Tokenization,
    bleu_statistics,
    bootstrap_draws,
    compare,
)

__all__ = ["compare_translations", "score_translations"]

_BPE = re.compile(r"@@( |$)")
_MOSES_ESCAPE = re.compile(r"&(apos|quot|amp|lt|gt|#91|#93|#124);")
_SPLIT_FULL_STOP = re.compile(r"\S [.?!]$")
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
        found[name] = compare(system, other, draws, smoothing).as_dict()
    return found
