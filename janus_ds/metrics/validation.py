"""One number a task by which a run picks its best checkpoint: quick, in percent, without Java or Perl.

| task | name | what it is |
| --- | --- | --- |
| nmt | bleu | sacreBLEU, 13a |
| cnndm, gigaword, xsum, msnews | rouge | mean of ROUGE-1, -2 and -L (OVERALL, but for the bootstrap) |
| squadqg, msqg | question | mean of ROUGE-L and BLEU-4: OVERALL without METEOR; every line is an item |
| coqa | f1 | F1 of words |
| personachat | bleu2 | BLEU-2 |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from janus_ds.metrics.dialogue import mean_answer_f1, mean_sentence_bleu
from janus_ds.metrics.glge import MakeItems, PrepareSummaries
from janus_ds.metrics.glge_text import cnndm_summaries, files2rouge_summaries, gigaword_summaries
from janus_ds.metrics.question_generation import coco_bleu, coco_rouge_l, msqg_items, squad_items
from janus_ds.metrics.rouge import rouge_pair
from janus_ds.metrics.translation import sacrebleu_13a

Lines = Sequence[str]


@dataclass(frozen=True)
class ValidationMetric:
    """A metric of outputs.

    Attributes:
        name: its name among the figures of a run: `valid/NAME_MODE`.
        score: from outputs and references, one line each, to percent; higher is better.
    """

    name: str
    title: str
    score: Callable[[Lines, Lines], float]


def _rouge(prepare: PrepareSummaries) -> ValidationMetric:
    def score(outputs: Lines, references: Lines) -> float:
        pairs = zip(*prepare(outputs, references), strict=True)
        return 100 * float(np.mean([rouge_pair(model, peer) for model, peer in pairs]))

    return ValidationMetric("rouge", "mean ROUGE", score)


def _question(make_items: MakeItems) -> ValidationMetric:
    def score(outputs: Lines, references: Lines) -> float:
        items = make_items(outputs, references, None)
        return 50 * (coco_rouge_l(items) + coco_bleu(items)[3])

    return ValidationMetric("question", "mean of ROUGE-L and BLEU-4", score)


VALIDATION_METRICS: Mapping[str, ValidationMetric] = {
    "nmt": ValidationMetric("bleu", "BLEU", lambda out, ref: float(sacrebleu_13a(out, ref).score)),
    "cnndm": _rouge(cnndm_summaries),
    "gigaword": _rouge(gigaword_summaries),
    "xsum": _rouge(files2rouge_summaries),
    "msnews": _rouge(files2rouge_summaries),
    "squadqg": _question(squad_items),
    "msqg": _question(msqg_items),
    "coqa": ValidationMetric("f1", "F1", lambda out, ref: mean_answer_f1(out, [[line] for line in ref])),
    "personachat": ValidationMetric("bleu2", "BLEU-2", lambda out, ref: mean_sentence_bleu(out, ref, 2)),
}
"""By the name of the task (`train.valid_task`)."""
