"""Translate a split with a checkpoint in several ways, score each, and measure speed.

`eval/nmt.py --checkpoint RUN` is a thin front of :func:`evaluate`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from janus_ds.checkpoint.average import average_weights, last_checkpoints
from janus_ds.data.files import disk_faults
from janus_ds.data.index import Manifest
from janus_ds.data.pair_text import PairText, held_out_text
from janus_ds.decode.generator import Generator, trained_modes
from janus_ds.decode.hypothesis import Hypothesis
from janus_ds.decode.load import LoadedRun, load_run, with_decode
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.metrics.files import TextLines, read_lines
from janus_ds.metrics.scores import Scores, save_json
from janus_ds.metrics.translation import compare_translations, score_translations
from janus_ds.model.weights import load_weights
from janus_ds.tools.common import table

__all__ = ["EvalRequest", "SystemResult", "evaluate", "results_table"]

_COLUMNS = (
    ("sacrebleu", "BLEU 13a"),
    ("tokenized_bleu", "tok. BLEU"),
    ("compound_bleu", "compound"),
    ("chrf", "chrF"),
    ("repetition", "repeated %"),
    ("length_ratio", "length %"),
)


@dataclass(frozen=True)
class EvalRequest:
    """What is to be evaluated.

    Attributes:
        checkpoint: a run folder, or one of its checkpoints.
        average: mean of the run's last N checkpoints; 1: the newest, or the one named.
        modes: of ar and nar; empty: all that the run was trained for.
        iterations: NAR refinements, one system each.
        split: valid or test.
        data: data directory; None: where it lay in training.
        output: folder of hypotheses and scores; None: RUN/eval/SPLIT.
        decode: other fields of `DecodeConfig`, such as beam.
        limit: sentences, from the first; 0: all.
        latency_sentences: sentences decoded one by one for ms/sentence; 0: none.
        baseline: another system's translations, for significance.
        device: where to decode.
    """

    checkpoint: Path
    average: int = 1
    modes: tuple[str, ...] = ()
    iterations: tuple[int, ...] = (0, 1, 4, 10)
    split: str = "test"
    data: Path | None = None
    output: Path | None = None
    decode: Mapping[str, Any] = field(default_factory=dict)
    limit: int = 0
    latency_sentences: int = 50
    baseline: Path | None = None
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class SystemResult:
    """One way of decoding: its name (ar, nar-4), output file, scores and speed."""

    name: str
    file: Path
    scores: Scores
    speed: dict[str, float]


Progress = Callable[[str, int, int], None]
"""Called with the system, and the numbers of finished sentences and of all."""


def evaluate(request: EvalRequest, progress: Progress | None = None) -> list[SystemResult]:
    """Translate, score, measure and write.

    Raises:
        UsageError: a mode or a number of iterations that cannot be.
        CheckpointError: no such run, too few checkpoints to average, another vocabulary than the data's.
        ConfigError: a mode that was not trained.
        DataError: the split's text is missing.
    """
    _check(request)
    run = _load(request)
    text = _text(request, run)
    output = request.output or run.folder / "eval" / request.split
    references = TextLines(text.names[1], text.references)
    baseline = read_lines(request.baseline) if request.baseline else None
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
    _write_lines(output / "references.txt", text.references)
    results = []
    for name, decode in _systems(request, run).items():
        generator = Generator(run.model, run.text, run.special, with_decode(run.config, decode))
        found, speed = _translate(generator, text.sources, request, name, progress)
        lines = TextLines(name, [hypothesis.text for hypothesis in found])
        scores = score_translations(lines, references, request.split, [h.tokens for h in found])
        extra: dict[str, Any] = {"system": name, "speed": speed, "decode": decode, **_origin(run, request)}
        if baseline is not None:
            extra["significance"] = compare_translations(lines, references, baseline)
        scores = replace(scores, extra=extra)
        _write_lines(output / f"{name}.txt", lines.lines)
        save_json(output / f"{name}.scores.json", scores.as_dict())
        results.append(SystemResult(name, output / f"{name}.txt", scores, speed))
    save_json(output / "scores.json", {"systems": {r.name: r.scores.as_dict() for r in results}})
    return results


def _check(request: EvalRequest) -> None:
    for mode in request.modes:
        if mode not in ("ar", "nar"):
            raise UsageError(f"there is no mode {mode!r}", "--modes", "use ar, nar, or ar,nar")
    for number in request.iterations:
        if number < 0:
            raise UsageError(
                f"{number} iterations cannot be made", "--iterations", "give 0 or more, such as 0,1,4,10"
            )


def _load(request: EvalRequest) -> LoadedRun:
    run = load_run(request.checkpoint, None, request.device)
    if request.average != 1:
        if not (request.checkpoint / "run.json").is_file():
            raise UsageError(
                f"--average {request.average} needs a run, but one of its checkpoints is named",
                str(request.checkpoint),
                f"give the run folder {run.folder}, or leave --average out",
            )
        paths = last_checkpoints(run.folder, request.average)
        load_weights(run.model, average_weights(paths), str(paths[-1]))
    if run.text is None:
        raise CheckpointError(
            "the run has no tokenizer", str(run.folder), "convert it again with its dictionary (--dict)"
        )
    return run


def _text(request: EvalRequest, run: LoadedRun) -> PairText:
    data = request.data or (Path(run.config.data.path) if run.config.data.path else None)
    if data is None:
        raise UsageError("the run does not say where its data lay", str(run.folder), "give --data DIR")
    expected = Manifest.load(data).tokenizer_fingerprint
    own = getattr(run.text, "fingerprint", expected)
    if own != expected and not (run.folder / "tokenizer" / "dict.txt").is_file():
        raise CheckpointError(
            "the checkpoint is from another vocabulary than the data",
            f"{run.folder}: tokenizer {own[:12]}, {data}: {expected[:12]}",
            f"prepare the data with --tokenizer {run.folder / 'tokenizer'}",
        )
    text = held_out_text(data, request.split)
    count = request.limit or len(text.sources)
    return PairText(text.sources[:count], text.references[:count], text.names)


def _systems(request: EvalRequest, run: LoadedRun) -> dict[str, dict[str, Any]]:
    """Decoding options by name."""
    systems: dict[str, dict[str, Any]] = {}
    for mode in request.modes or trained_modes(run.config.objective):
        if mode == "ar":
            systems["ar"] = {**request.decode, "mode": "ar"}
        else:
            for number in request.iterations:
                systems[f"nar-{number}"] = {**request.decode, "mode": "nar", "iterations": number}
    for decode in systems.values():
        # All modes are looked at before the first is decoded.
        Generator(run.model, run.text, run.special, with_decode(run.config, decode))
    return systems


def _translate(
    generator: Generator,
    sources: Sequence[str],
    request: EvalRequest,
    name: str,
    progress: Progress | None,
) -> tuple[list[Hypothesis], dict[str, float]]:
    """Outputs, sentences a second in batches, and milliseconds a sentence one by one."""

    def show(done: int, total: int) -> None:
        if progress is not None:
            progress(name, done, total)

    start = time.perf_counter()
    found = generator.generate(sources, show)
    speed = {"sentences_per_second": len(sources) / max(time.perf_counter() - start, 1e-9)}
    # The first sentences of a test set need not be typical: take them from all over it.
    every = max(1, len(sources) // request.latency_sentences) if request.latency_sentences else 0
    alone = list(sources[::every][: request.latency_sentences]) if every else []
    if alone:
        start = time.perf_counter()
        for source in alone:
            generator.generate([source])
        speed["ms_per_sentence_batch_1"] = 1000 * (time.perf_counter() - start) / len(alone)
    return found, speed


def _origin(run: LoadedRun, request: EvalRequest) -> dict[str, Any]:
    return {
        "run": run.config.name,
        "objective": run.config.objective.preset,
        "checkpoint": run.weights.parent.name,
        "average": request.average,
    }


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with disk_faults(path):
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def results_table(results: Sequence[SystemResult]) -> str:
    """One line a system."""
    rows = [("system", *(title for _, title in _COLUMNS), "sent./s", "ms/sent.")]
    for result in results:
        metrics = result.scores.metrics
        cells = [f"{metrics[name]:.2f}" if name in metrics else "-" for name, _ in _COLUMNS]
        latency = result.speed.get("ms_per_sentence_batch_1")
        cells += [f"{result.speed['sentences_per_second']:.1f}", f"{latency:.1f}" if latency else "-"]
        rows.append((result.name, *cells))
    return table(rows)
