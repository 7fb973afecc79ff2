"""Scores of translations: BLEU in the three ways of the literature, chrF, repetition, length.

* `sacrebleu`: sacreBLEU with its 13a tokenisation, for detokenised text; the comparable number.
* `tokenized_bleu`: what `fairseq-generate --remove-bpe` and `fairseq-score` print: white space is the
  tokenisation, case counts, no smoothing.
* `compound_bleu`: the same after hyphenated compounds are split on both sides, as the paper's WMT14
  En-De numbers are made (compound_split_bleu.sh).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

_END = "</s>"
_UNKNOWN = "<unk>"
_ESCAPED_UNKNOWN = "<<unk>>"
# White space is ASCII's here, since the script that defines this reads bytes.
_COMPOUND = re.compile(r"(\S)-(\S)", re.ASCII)


@dataclass(frozen=True)
class Measured:
    """A score from 0 to 100 and sacreBLEU's account of how it was computed."""

    score: float
    signature: str


def remove_bpe(line: str) -> str:
    """Join the pieces of subword-nmt: "bo@@ at" becomes "boat"."""
    return (line + " ").replace("@@ ", "").rstrip()


def split_compounds(line: str) -> str:
    """Split hyphenated words: "well-known" becomes "well ##AT##-##AT## known". Matches do not overlap,
    so "a-b-c" is split once."""
    return _COMPOUND.sub(r"\1 ##AT##-##AT## \2", line)


def prepare_as_fairseq(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    """Both sides as fairseq's scorer sees them, for a BLEU that counts words between white space.

    Subwords are joined. An empty line is its end-of-sentence symbol, which counts as one word. <unk> in
    a reference is another word than in a hypothesis, so that an unknown word is never right.
    """
    hypothesis_lines = [remove_bpe(line).strip() or _END for line in hypotheses]
    reference_lines = [" ".join(_hide_unknown(remove_bpe(line).split())) or _END for line in references]
    return hypothesis_lines, reference_lines


def _hide_unknown(words: list[str]) -> Iterable[str]:
    return (_ESCAPED_UNKNOWN if word == _UNKNOWN else word for word in words)


def tokenized_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """BLEU as fairseq computes it; within 0.005 of it, since fairseq's hashes can collide."""
    bleu = BLEU(tokenize="none", smooth_method="none", force=True)
    hypothesis_lines, reference_lines = prepare_as_fairseq(hypotheses, references)
    score = bleu.corpus_score(hypothesis_lines, [reference_lines]).score
    return Measured(score, str(bleu.get_signature()))


def compound_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """BLEU as fairseq computes it after the compounds of both sides are split."""
    measured = tokenized_bleu(
        [split_compounds(remove_bpe(line)) for line in hypotheses],
        [split_compounds(remove_bpe(line)) for line in references],
    )
    return Measured(measured.score, f"{measured.signature}, compounds split at hyphens")


def sacrebleu_13a(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """sacreBLEU with its defaults, on text whose subwords are joined."""
    bleu = BLEU(force=True)
    score = bleu.corpus_score(*_joined(hypotheses, references)).score
    return Measured(score, str(bleu.get_signature()))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """chrF2 with sacreBLEU's defaults."""
    metric = CHRF()
    score = metric.corpus_score(*_joined(hypotheses, references)).score
    return Measured(score, str(metric.get_signature()))


def _joined(hypotheses: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    return [remove_bpe(line) for line in hypotheses], [[remove_bpe(line) for line in references]]


def repetition(sentences: Iterable[Sequence[Hashable]]) -> float:
    """Token repetition ratio (the paper's Table 3): the share of tokens that repeat the one before them.

    Args:
        sentences: tokens as generated: without bos, eos and pad, before anything is removed.

    Returns:
        100 * (number of y_i = y_(i-1), i >= 2) / (number of tokens), over all sentences.
    """
    repeated = total = 0
    for sentence in sentences:
        total += len(sentence)
        repeated += sum(a == b for a, b in pairwise(sentence))
    return 100.0 * repeated / total if total else 0.0


def length_ratio(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Words of the hypotheses in percent of the words of the references, subwords joined."""
    words = sum(len(remove_bpe(line).split()) for line in hypotheses)
    wanted = sum(len(remove_bpe(line).split()) for line in references)
    return 100.0 * words / wanted if wanted else 0.0
