"""Translate a split with a checkpoint in several ways, score each, and measure speed.

`eval/nmt.py --checkpoint RUN` is a thin front of :func:`evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from janus_ds.data.prepare.pair_files import held_out_text
from janus_ds.decode.hypothesis import Hypothesis
from janus_ds.decode.load import LoadedRun
from janus_ds.errors import UsageError
from janus_ds.metrics.files import TextLines, read_lines
from janus_ds.metrics.scores import Scores
from janus_ds.metrics.translation import compare_translations, score_translations
from janus_ds.tools import checkpoint_eval
from janus_ds.tools.checkpoint_eval import (
    EvalRequest,
    EvalText,
    Progress,
    SystemResult,
    check_vocabulary,
    load_checkpoint,
    run_evaluation,
)

__all__ = ["EvalRequest", "SystemResult", "evaluate", "results_table"]

_COLUMNS = (
    ("sacrebleu", "BLEU 13a"),
    ("tokenized_bleu", "tok. BLEU"),
    ("compound_bleu", "compound"),
    ("chrf", "chrF"),
    ("repetition", "repeated %"),
    ("length_ratio", "length %"),
)


def evaluate(request: EvalRequest, progress: Progress | None = None) -> list[SystemResult]:
    """Translate, score, measure and write.

    Raises:
        UsageError: a mode or a number of iterations that cannot be.
        CheckpointError: no such run, too few checkpoints to average, another vocabulary than the data's.
        ConfigError: a mode that was not trained.
        DataError: the split's text is missing.
    """
    request.check()
    run = load_checkpoint(request)
    baseline = read_lines(request.baseline) if request.baseline else None
    return run_evaluation(request, run, _Translation(request.split, baseline), progress)


class _Translation:
    """Text prepared by `prepare_data.py --task nmt`, scored by BLEU and its like."""

    def __init__(self, split: str, baseline: TextLines | None) -> None:
        self._split = split
        self._baseline = baseline

    def read(self, request: EvalRequest, run: LoadedRun) -> EvalText:
        data = request.data or (Path(run.config.data.path) if run.config.data.path else None)
        if data is None:
            raise UsageError("the run does not say where its data lay", str(run.folder), "give --data DIR")
        check_vocabulary(run, data)
        text = held_out_text(data, request.split)
        return EvalText(text.sources, text.references, text.names)

    def score(self, outputs: TextLines, found: Sequence[Hypothesis], text: EvalText) -> Scores:
        references = TextLines(text.names[1], text.references or [])
        scores = score_translations(outputs, references, self._split, [h.tokens for h in found])
        if self._baseline is None:
            return scores
        significance = compare_translations(outputs, references, self._baseline)
        return replace(scores, extra={"significance": significance})


def results_table(results: Sequence[SystemResult]) -> str:
    """One line a system."""
    return checkpoint_eval.results_table(results, _COLUMNS)
