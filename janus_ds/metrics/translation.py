"""Score translations, and compare two systems: the numbers of the paper's Tables 1, 3 and 6.

Is the difference of two systems' BLEU larger than chance makes it? Paired bootstrap: P. Koehn, "Statistical
Significance Tests for Machine Translation Evaluation", EMNLP 2004, in the form of Moses'
bootstrap-hypothesis-difference-significance.pl and of sacreBLEU's --paired-bs: with d the absolute difference
in a sample and D the real one, p is the share of samples with d - mean(d) >= D.

* `sacrebleu`: sacreBLEU with its 13a tokenisation, for detokenised text; the comparable number.
* `tokenized_bleu`: what `fairseq-generate --remove-bpe` and `fairseq-score` print: white space is the
  tokenisation, case counts, no smoothing.
* `compound_bleu`: the same after hyphenated compounds are split on both sides, as the paper's WMT14
  En-De numbers are made (compound_split_bleu.sh).
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF
from sacrebleu.significance import PairedTest

from janus_ds.errors import UsageError
from janus_ds.metrics.scores import Scores, TextLines, check_same_length

_FAIRSEQ_BLEU = partial(BLEU, tokenize="none", smooth_method="none", force=True)
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
    hidden = (
        [_ESCAPED_UNKNOWN if word == _UNKNOWN else word for word in remove_bpe(line).split()]
        for line in references
    )
    ours = [remove_bpe(line).strip() or _END for line in hypotheses]
    return ours, [" ".join(words) or _END for words in hidden]


def tokenized_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """BLEU as fairseq computes it; within 0.005 of it, since fairseq's hashes can collide."""
    return _measured(_FAIRSEQ_BLEU(), *prepare_as_fairseq(hypotheses, references))


def compound_bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """BLEU as fairseq computes it after the compounds of both sides are split."""
    sides = ([split_compounds(remove_bpe(line)) for line in side] for side in (hypotheses, references))
    measured = tokenized_bleu(*sides)
    return Measured(measured.score, f"{measured.signature}, compounds split at hyphens")


def sacrebleu_13a(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """sacreBLEU with its defaults, on text whose subwords are joined."""
    return _measured(BLEU(force=True), *_joined(hypotheses, references))


def chrf(hypotheses: Sequence[str], references: Sequence[str]) -> Measured:
    """chrF2 with sacreBLEU's defaults."""
    return _measured(CHRF(), *_joined(hypotheses, references))


def _joined(*sides: Sequence[str]) -> list[list[str]]:
    return [[remove_bpe(line) for line in side] for side in sides]


def _measured(metric: BLEU | CHRF, hypotheses: list[str], references: list[str]) -> Measured:
    score = metric.corpus_score(hypotheses, [references]).score
    return Measured(score, str(metric.get_signature()))


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


_BPE = re.compile(r"@@( |$)")
_MOSES_ESCAPE = re.compile(r"&(apos|quot|amp|lt|gt|#91|#93|#124);")
_SPLIT_FULL_STOP = re.compile(r"\S [.?!]$")
SAMPLES = 1000
_SEED = 12345
"""sacreBLEU's own, where SACREBLEU_SEED does not name another."""
_FEWEST = 2
"""Different sentences that samples must be drawn from to tell anything."""


def score_translations(
    hypotheses: TextLines,
    references: TextLines,
    split: str,
    tokens: Sequence[Sequence[Hashable]] | None = None,
) -> Scores:
    """Score a system's output; subword-nmt's pieces ("@@ ") are joined where text is compared.

    Args:
        tokens: what the model generated, for the repetition ratio; None: the words of the lines as they
            stand, which are BPE's pieces if the lines have them.
    """
    check_same_length(hypotheses, references)
    scores = Scores("nmt", split, len(hypotheses.lines))
    pair = hypotheses.lines, references.lines
    metrics = {"sacrebleu": sacrebleu_13a, "tokenized_bleu": tokenized_bleu}
    for name, metric in {**metrics, "compound_bleu": compound_bleu, "chrf": chrf}.items():
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

    cased = sum(line != line.upper() for line in references.lines)
    if 2 * cased > len(references.lines) and all(line == line.lower() for line in references.lines):
        scores.warnings.append(
            "the references are lower-cased: whatever the signatures say of the case, the scores are those "
            "of lower-cased text, and not comparable with numbers on text as it was written"
        )


def bootstrap_seed() -> str | int:
    """What samples are drawn from, as sacreBLEU reads it.

    Raises:
        UsageError: sacreBLEU would end on it.
    """
    seed = os.environ.get("SACREBLEU_SEED", _SEED)
    if not re.fullmatch(r"\d+|none", str(seed), re.ASCII | re.IGNORECASE):
        raise UsageError(
            f"{seed!r} is no seed", "the environment variable SACREBLEU_SEED", "unset it, or give a number"
        )
    return seed


def compare_translations(hypotheses: TextLines, references: TextLines, baseline: TextLines) -> dict[str, Any]:
    """Paired bootstrap of a system's output against a baseline's, for JSON.

    Returns:
        For each compared metric `score` and `baseline` (0 to 100), `p_moses` (share of samples, about half of
        what approximate randomisation gives), `p_sacrebleu` ((count + 1) / (samples + 1)), and intervals:
        mean of the samples and half the width of their central 95 %. Both p are 1 where the scores are equal,
        or all sentences are.
    """
    check_same_length(hypotheses, references)
    check_same_length(baseline, references)
    found: dict[str, Any] = {"baseline": baseline.name, "samples": SAMPLES, "seed": bootstrap_seed()}
    ours, gold = prepare_as_fairseq(hypotheses.lines, references.lines)
    theirs, _ = prepare_as_fairseq(baseline.lines, references.lines)
    found["tokenized_bleu"] = _bootstrap(_FAIRSEQ_BLEU(), ours, theirs, gold)
    joined = _joined(hypotheses.lines, baseline.lines, references.lines)
    found["sacrebleu"] = _bootstrap(BLEU(force=True), *joined)
    return found


def _bootstrap(
    bleu: BLEU, system: list[str], baseline: list[str], references: list[str]
) -> dict[str, float | tuple[float, float]]:
    pair: list[tuple[str, Sequence[str]]] = [("baseline", baseline), ("system", system)]
    columns = PairedTest(pair, {"BLEU": bleu}, [references], "bs", SAMPLES)()[1]
    theirs, ours = cast(list[Any], columns["BLEU"])
    # sacreBLEU takes a difference that no sample exceeds for a sure one: also one of nothing, and the one
    # that all samples have, since they are draws of one and the same sentence.
    alike = len(set(zip(system, baseline, references, strict=True))) < _FEWEST
    p = 1.0 if alike or ours.score == theirs.score else float(ours.p_value)
    return {
        "score": ours.score,
        "baseline": theirs.score,
        "p_moses": (round(p * (SAMPLES + 1)) - 1) / SAMPLES,
        "p_sacrebleu": p,
        "score_interval": (float(ours.mean), float(ours.ci)),
        "baseline_interval": (float(theirs.mean), float(theirs.ci)),
    }
