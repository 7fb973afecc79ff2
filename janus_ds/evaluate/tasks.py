"""Translate a split with a checkpoint in several ways, score each, and measure speed.

`eval/nmt.py --checkpoint RUN` is a thin front of :func:`evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from janus_ds.checkpoint.manager import BEST_FOLDER
from janus_ds.data.prepare.pair_files import (
    GLGE_SPLITS,
    PairText,
    find_split,
    held_out_text,
    read_pairs,
    source_limit,
    task_limits,
)
from janus_ds.data.stream.index import MANIFEST_NAME
from janus_ds.decode.load import LoadedRun
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.errors import DataError, UsageError
from janus_ds.evaluate.evaluation import (
    EvalRequest,
    Progress,
    SystemResult,
    check_vocabulary,
    encode_sources,
    load_checkpoint,
    run_evaluation,
)
from janus_ds.evaluate.latency import LatencyReport, measure_glge
from janus_ds.evaluate.timing import LatencyPlan
from janus_ds.metrics.glge import Meteor, Task, TaskTexts, score_task
from janus_ds.metrics.scores import Scores, TextLines, read_lines, save_json
from janus_ds.metrics.translation import compare_translations, score_translations

NMT_COLUMNS = ("sacrebleu", "tokenized_bleu", "compound_bleu", "chrf", "repetition", "length_ratio")


def evaluate(request: EvalRequest, progress: Progress | None = None) -> list[SystemResult]:
    """Translate, score, measure and write."""
    request.check()
    run = load_checkpoint(request)
    baseline = read_lines(request.baseline) if request.baseline else None
    return run_evaluation(request, run, _Translation(request.split, baseline), progress)


def _data_of(request: EvalRequest, run: LoadedRun) -> Path:
    """The data directory that is asked for, or else the one of training."""
    data = request.data or run.config.data.path
    if not data:
        raise UsageError("the run does not say where its data lay", str(run.folder), "give --data DIR")
    return Path(data)


class _Translation:
    """Text prepared by `prepare_data.py --task nmt`, scored by BLEU and its like."""

    def __init__(self, split: str, baseline: TextLines | None) -> None:
        self._split = split
        self._baseline = baseline

    def read(self, request: EvalRequest, run: LoadedRun) -> PairText:
        data = _data_of(request, run)
        check_vocabulary(run, data)
        return held_out_text(data, request.split)

    def score(self, outputs: TextLines, found: Sequence[Hypothesis], text: PairText) -> Scores:
        references = TextLines(text.names[1], text.references or [])
        scores = score_translations(outputs, references, self._split, [h.tokens for h in found])
        if self._baseline is None:
            return scores
        significance = compare_translations(outputs, references, self._baseline)
        return replace(scores, extra={"significance": significance})


def evaluate_glge(
    request: EvalRequest,
    task: Task,
    meteor: Meteor = "it was not asked for",
    latency: LatencyPlan | None = None,
    ar_checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[SystemResult], LatencyReport | None, Path]:
    """Decode, score, measure and write; `scores.json` has the systems, and the latency if it was measured.

    Args:
        request: checkpoint, modes, split and so on; its `latency_sentences` is not used.
        latency: how speed is measured; None: it is not.
        ar_checkpoint: a run whose AR is the 1.0x of the speed-ups; None: the run itself, if it has AR.

    Returns:
        One result for each way of decoding, the latency, and the folder of the weights.
    """
    request = replace(request, latency_sentences=0)
    request.check()
    run = load_checkpoint(request)
    split = _GlgeSplit(task, request.split, meteor)
    results = run_evaluation(request, run, split, progress)
    if latency is None:
        return results, None, run.weights.parent
    sources, _ = encode_sources(run, split.read(request, run).first(request.limit), request.on_long)
    report = measure_glge(request, run, sources, latency, ar_checkpoint, progress)
    systems = {result.name: result.scores.as_dict() for result in results}
    save_json(request.folder(run) / "scores.json", {"systems": systems, "latency": report.as_dict()})
    return results, report, run.weights.parent


def with_best(checkpoint: Path, average: int) -> Path:
    """The run's best checkpoint where training kept one (`train.keep_best`) and nothing else is named."""
    best = checkpoint / "checkpoints" / BEST_FOLDER
    return best if average == 1 and best.is_dir() else checkpoint


class _GlgeSplit:
    """A split of one task, prepared or in the official layout."""

    def __init__(self, task: Task, split: str, meteor: Meteor) -> None:
        self._task = task
        self._split = split
        self._meteor = meteor

    def read(self, request: EvalRequest, run: LoadedRun) -> PairText:
        data = _data_of(request, run)
        if (data / MANIFEST_NAME).is_file():
            files, limit = self._prepared(data, run)
        else:
            files, limit = find_split(data, self._task.name, self._split), task_limits(self._task.name).source
        source, target = files
        pairs = list(read_pairs(source, target))
        references = None if target is None else [pair[1] for pair in pairs]
        names = (str(source), str(target))
        return PairText([pair[0] for pair in pairs], references, names, limit)

    def _prepared(self, data: Path, run: LoadedRun) -> tuple[tuple[Path, Path | None], int]:
        """The text that `prepare_glge.py` keeps, and the longest source of its settings."""
        recorded = check_vocabulary(run, data).settings
        settings = recorded.get("request", {}).get("settings", {})
        if settings.get("task", self._task.name) != self._task.name:
            raise UsageError(
                f"the data is of task {settings['task']!r}, not {self._task.name!r}",
                str(data),
                f"give --task {settings['task']}, or other --data",
            )
        ours = {official: own for own, official in GLGE_SPLITS.items()}.get(self._split, self._split)
        source, target = (data / "raw" / f"{ours}.{side}" for side in ("src", "tgt"))
        if not source.is_file():
            raise DataError(
                f"the data has no text of split {self._split!r}",
                str(source),
                "name another split (dev or test), or prepare the data with this split's files",
            )
        limit = source_limit(recorded) or task_limits(self._task.name).source
        return (source, target if target.is_file() else None), limit

    def score(self, outputs: TextLines, found: Sequence[Hypothesis], text: PairText) -> Scores:
        if text.references is None:
            warning = f"nothing is scored: {text.names[0]} has no references beside it"
            return Scores(self._task.name, self._split, len(outputs.lines), warnings=[warning])
        sources = TextLines(text.names[0], text.sources) if self._task.uses_sources else None
        references = TextLines(text.names[1], text.references)
        return score_task(self._task, TaskTexts(outputs, references, sources), self._split, self._meteor)
