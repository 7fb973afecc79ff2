"""Decode a split with a checkpoint in several ways, score each, write what was found.

What translation and GLGE share; `tasks.py` says what is read and how it is scored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from janus_ds.checkpoint.tensors import average_weights, last_checkpoints
from janus_ds.config.locations import model_path, user_path
from janus_ds.config.modes import (
    GREEDY,
    MODES,
    NAMES,
    RESCORED,
    refuse_unused,
    trained_modes,
    way_of,
    with_decode,
)
from janus_ds.config.schema import RUN_FILE
from janus_ds.data.prepare.pair_files import PairText
from janus_ds.data.stream.index import Manifest
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import InferenceOptions, LoadedRun, load_run, prepare_for_inference
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.decode.text import fit_sources, long_warning, one_line, too_long
from janus_ds.errors import CheckpointError, UsageError
from janus_ds.evaluate.latency import LatencyReport, device_name, measure, precision_of, timed_sources
from janus_ds.io import disk_faults, read_json, write_atomic
from janus_ds.metrics.scores import METRIC_TITLES, Scores, TextLines, save_json, split_folder
from janus_ds.model.weights import load_weights
from janus_ds.progress import table

_DIALS = ("beam", "iterations", "threshold", "rescore")

Progress = Callable[[str, int, int], None]
"""Called with the system, and the numbers of finished sentences and of all."""


@dataclass(frozen=True)
class EvalRequest:
    """What is to be evaluated.

    Attributes:
        checkpoint: a run folder, or one of its checkpoints.
        average: mean of the run's last N checkpoints; 1: the newest, or the one named.
        modes: of ar, ar-greedy, nar, draft and aux; empty: all that the run was trained for.
        iterations: NAR refinements, one system each.
        thresholds: probabilities above which NAR settles a token in a pass, one system each.
        split: name of the split.
        data: where the text lies; None: where the data lay in training.
        output: folder of hypotheses and scores; None: RUN/eval/SPLIT.
        decode: other fields of `DecodeConfig`, such as beam; a system takes those that its mode uses.
        given: names of options that were asked for: where the run says which modes, one that none of them
            uses is refused.
        limit: sentences, from the first; 0: all.
        on_long: what becomes of sources that are too long: cut, skip (the output is an empty line) or stop.
        latency_sentences: sentences decoded one by one for ms/sentence; 0: none.
        baseline: another system's outputs, for significance (translation).
        device: where to decode.
        inference: in which precision, on which weights.

    Raises:
        UsageError: a mode, a number of iterations or of sentences, or a threshold that cannot be.
    """

    checkpoint: Path
    average: int = 1
    modes: tuple[str, ...] = ()
    iterations: tuple[int, ...] = (0, 1, 4, 10)
    thresholds: tuple[float, ...] = ()
    split: str = "test"
    data: Path | None = None
    output: Path | None = None
    decode: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    limit: int = 0
    on_long: str = "cut"
    latency_sentences: int = 50
    baseline: Path | None = None
    device: torch.device | str = "cpu"
    inference: InferenceOptions = field(default_factory=InferenceOptions)

    def __post_init__(self) -> None:
        for mode in (mode for mode in self.modes if mode not in (*NAMES, GREEDY)):
            fix = f"use {', '.join((*NAMES, GREEDY))}, or several, as ar,nar"
            raise UsageError(f"there is no mode {mode!r}", "--modes", fix)
        for number in (number for number in self.iterations if number < 0):
            fix = "give 0 or more, such as 0,1,4,10"
            raise UsageError(f"{number} iterations cannot be made", "--iterations", fix)
        for share in (share for share in self.thresholds if not 0 < share <= 1):
            fix = "give shares above 0 and up to 1, such as 0.9,0.99"
            raise UsageError(f"{share} is no probability", "--threshold", fix)
        for option, count in (("--limit", self.limit), ("--latency-samples", self.latency_sentences)):
            if count < 0:
                raise UsageError(f"{count} sentences cannot be taken", option, "give 0 or more")

    def systems(self, modes: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Fields of `DecodeConfig` by system: ar, ar-greedy, nar-0, nar-4-rescored, nar-t0.9, draft, aux, ...

        Each threshold is one system, whose passes have no limit. Where AR rescores, NAR systems come with and
        without. Each takes the options that its mode uses.
        """

        def options(way: str, **own: Any) -> dict[str, Any]:
            used = MODES[way].options - {"rescore"}
            asked = {name: value for name, value in self.decode.items() if name in used}
            return {**asked, "mode": "nar" if way == RESCORED else way, **own}

        found: dict[str, dict[str, Any]] = {}
        # A recipe may name a threshold, or AR as the judge: these systems have what their names say.
        dials: dict[str, dict[str, Any]] = {
            f"nar-{n}": {"iterations": n, "threshold": None} for n in self.iterations
        }
        dials |= {f"nar-t{share:g}": {"threshold": share} for share in self.thresholds}
        for mode in modes:
            if mode == GREEDY:
                found[mode] = options("ar", beam=1, temperature=0.0)
            elif mode != "nar":
                found[mode] = options(mode)
            for name, dial in dials.items() if mode == "nar" else ():
                found[name] = options("nar", **dial, rescore=None)
                if rescore := self.decode.get("rescore"):
                    found[f"{name}-rescored"] = options(RESCORED, **dial, rescore=rescore)
        return found

    def folder(self, run: LoadedRun) -> Path:
        """Where hypotheses and scores go; those of a part of the split not to those of the whole.

        Raises:
            UsageError: no output is named, and the model is one of the package.
        """
        if self.output is None and model_path(self.checkpoint) != user_path(str(self.checkpoint)):
            what = "the package's own model has no place for hypotheses and scores"
            raise UsageError(what, f"--checkpoint {self.checkpoint}", "give --output DIR")
        return self.output or run.folder / "eval" / split_folder(self.split, self.limit)


@dataclass(frozen=True)
class SystemResult:
    """One way of decoding: its name (ar, nar-4), output file, scores and speed."""

    name: str
    file: Path
    scores: Scores
    speed: dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found.

    Attributes:
        weights: their folder.
        sources: what was decoded, as token ids.
        removed: systems of an earlier evaluation of other weights or sentences, whose files gave way.
    """

    systems: list[SystemResult]
    weights: Path
    sources: list[list[int]]
    removed: list[str]
    latency: LatencyReport | None = None


class Evaluation(Protocol):
    """What one kind of task knows."""

    def read(self, request: EvalRequest, run: LoadedRun) -> PairText:
        """The text of the split, as much of it as is asked for."""

    def score(self, outputs: TextLines, found: Sequence[Hypothesis], text: PairText) -> Scores:
        """Scores of one system's outputs; `found` are the hypotheses behind the lines."""


def run_evaluation(
    request: EvalRequest, run: LoadedRun, task: Evaluation, progress: Progress | None = None
) -> Evaluated:
    """Decode, score, measure and write; a system's files appear as soon as it is done."""
    systems = systems_of(request, run)
    # First, as soon as they are read: a run that goes on may put others into the place of its best weights.
    origin = _origin(run, request)
    text = task.read(request, run)
    sources, long = encode_sources(run, text, request.on_long)
    output = request.folder(run)
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        removed = _give_way(output, origin, text)
    if text.references is not None:
        _write_lines(output / "references.txt", text.references)
    # For readers and reports: data directories move.
    _write_lines(output / "sources.txt", text.sources)
    results, precision = [], precision_of(run.model, request.inference)
    for name, generator in systems.items():
        found, speed = _decode(generator, sources, request, name, progress)
        lines = TextLines(name, [one_line(run.codec().decode(item.tokens)) for item in found])
        # A kill in between must not leave these outputs beside scores of an earlier evaluation; where they
        # cannot be scored, they are not lost.
        for stale in (f"{name}.scores.json", "scores.json"):
            (output / stale).unlink(missing_ok=True)
        _write_lines(output / f"{name}.txt", lines.lines)
        scores = task.score(lines, found, text)
        extra = {"system": name, "speed": speed, "decode": _decode_options(request, generator)}
        extra |= {**origin, **scores.extra, "precision": precision, "device": device_name(request.device)}
        extra |= {"long_inputs": long} if long else {}
        warnings = [*([long["warning"]] if long else []), *scores.warnings]
        scores = replace(scores, extra=extra, warnings=warnings)
        save_json(output / f"{name}.scores.json", scores.as_dict())
        results.append(SystemResult(name, output / f"{name}.txt", scores, speed))
    save_json(output / "scores.json", {"systems": {r.name: r.scores.as_dict() for r in results}})
    left = [name for name in removed if name not in systems]
    return Evaluated(results, run.weights.parent, sources, left)


def _give_way(output: Path, origin: Mapping[str, Any], text: PairText) -> list[str]:
    """Remove what an earlier evaluation of other weights or sentences has left; the names of its systems."""
    own, removed = {"sources.txt": text.sources, "references.txt": text.references or []}, []
    others = [output / name for name, lines in own.items() if _read_lines(output / name) != lines]
    for path in others:
        path.unlink(missing_ok=True)
    for path in output.glob("*.scores.json"):
        name = path.name.removesuffix(".scores.json")
        try:
            told = read_json(path)
        except (OSError, ValueError):
            continue
        # Other files of scores are none of ours.
        if told.get("system") == name and (others or not origin.items() <= told.items()):
            removed.append(name)
            (output / f"{name}.txt").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    return sorted(removed)


def load_checkpoint(request: EvalRequest) -> LoadedRun:
    """The model to evaluate, with the mean of its last checkpoints where that is asked for."""
    run, _ = load_mean(request.checkpoint, request.average, request.device)
    run.codec()
    prepare_for_inference(run.model, request.inference)
    return run


def load_mean(
    checkpoint: Path, average: int, device: torch.device | str | None
) -> tuple[LoadedRun, list[Path]]:
    """A run with the mean of its last checkpoints, and their files; 1: with the newest, or the one named.

    Raises:
        UsageError: a mean is wanted, but a single checkpoint is named.
        CheckpointError: no such run, or too few checkpoints to average.
    """
    run = load_run(checkpoint, None, device)
    if average == 1:
        return run, [run.weights]
    if not (model_path(checkpoint) / RUN_FILE).is_file():
        raise UsageError(
            f"--average {average} needs a run, but one of its checkpoints is named",
            str(checkpoint),
            f"give the run folder {run.folder}, or leave --average out",
        )
    paths = last_checkpoints(run.folder, average)
    load_weights(run.model, average_weights(paths), str(paths[-1]))
    return run, paths


def check_vocabulary(run: LoadedRun, data: Path) -> None:
    """Hold prepared data against the run's vocabulary.

    Raises:
        CheckpointError: it is of another one.
    """
    expected = Manifest.load(data).tokenizer_fingerprint
    own = getattr(run.text, "fingerprint", expected)
    if own != expected and not (run.folder / "tokenizer" / "dict.txt").is_file():
        raise CheckpointError(
            "the checkpoint is from another vocabulary than the data",
            f"{run.folder}: tokenizer {own[:12]}, {data}: {expected[:12]}",
            f"prepare the data with --tokenizer {run.folder / 'tokenizer'}",
        )


def systems_of(request: EvalRequest, run: LoadedRun) -> dict[str, Generator]:
    """A generator for each way of decoding, by name: ar, nar-0, nar-1, ...

    Raises:
        UsageError: an option was given that none of the run's modes uses.
    """
    modes = request.modes
    if not modes:
        modes = trained_modes(run.config.objective)
        refuse_unused(request.given, modes)
    judge = run.config.decode.rescore if "ar" in trained_modes(run.config.objective) else None
    systems = replace(request, decode={"rescore": judge, **request.decode}).systems(modes)
    return {
        name: Generator(run.model, run.text, with_decode(run.config, decode))
        for name, decode in systems.items()
    }


def _decode_options(request: EvalRequest, generator: Generator) -> dict[str, Any]:
    """What decides a system's outputs: what was asked for, and the dials of its mode."""
    decode, used = generator.config.decode, way_of(generator.config.decode).options
    told = [name for name in (*request.decode, "mode", *_DIALS) if name in used or name == "mode"]
    return {name: value for name in told if (value := getattr(decode, name)) is not None}


def encode_sources(
    run: LoadedRun, text: PairText, on_long: str = "cut"
) -> tuple[list[list[int]], dict[str, Any]]:
    """Token ids of the sources, without bos and eos, and what the scores' JSON says of those that are longer
    than what the model, or its task, reads: nothing if there are none.

    Raises:
        DataError: there are some, and `on_long` is stop.
    """
    positions = run.config.model.max_source_positions
    encoded, table = text.encoded(run.codec().encode, run.special, positions)
    rows, long = fit_sources(encoded, table, on_long)
    if long and on_long == "stop":
        raise too_long(len(encoded[long[0] - 1]), long[0], table)
    told = {"count": len(long), "action": on_long, "warning": long_warning(long, len(rows), table, on_long)}
    return rows, told if long else {}


def _decode(
    generator: Generator,
    sources: Sequence[Sequence[int]],
    request: EvalRequest,
    name: str,
    progress: Progress | None,
) -> tuple[list[Hypothesis], dict[str, float]]:
    """Outputs, sentences a second in batches, and milliseconds a sentence one by one."""
    show = None if progress is None else partial(progress, name)
    # Kernels, or layers, are compiled at the first call; for one sentence alone others than for batches.
    generator.generate_ids(timed_sources(sources, 2))
    start = time.perf_counter()
    found = [candidates[0] for candidates in generator.generate_ids(sources, show)]
    speed = {"sentences_per_second": len(sources) / max(time.perf_counter() - start, 1e-9)}
    passes = [item.passes for item in found if item.passes]
    if passes:
        speed["decoder_passes"] = sum(passes) / len(passes)
    if passes and generator.config.decode.mode == "nar":
        # Rescoring adds a pass to those of mask-predict.
        judging = generator.config.decode.rescore is not None
        speed["iterations"] = speed["decoder_passes"] - 1 - judging
    alone = timed_sources(sources, request.latency_sentences)
    if alone:
        # With a warm-up: for a single sentence layers are compiled anew, and drafts are tried anew.
        system = {name: lambda ids: one_by_one(generator, ids)}
        times = measure(system, alone, request.device, rounds=1)
        speed["ms_per_sentence_batch_1"] = times[name].mean
    return found, speed


def one_by_one(generator: Generator, ids: Sequence[int]) -> int:
    """Decode one source; the number of tokens of the output."""
    return len(generator.generate_ids([ids])[0][0].tokens)


def _origin(run: LoadedRun, request: EvalRequest) -> dict[str, Any]:
    told: dict[str, Any] = {"run": run.config.name, "objective": run.config.objective.preset}
    told |= {"checkpoint": run.weights.parent.name, "average": request.average}
    # Another run, or this one as it goes on, may put other weights into a folder of this name.
    return {**told, "weights_sha256": run.weights_sha256}


def _read_lines(path: Path) -> list[str]:
    # As they were written: a text may have other line ends within, and a damaged file is of no sentences.
    return path.read_bytes().decode(errors="replace").split("\n")[:-1] if path.is_file() else []


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def results_table(results: Sequence[SystemResult], columns: Sequence[str]) -> str:
    """One line a system: the metrics asked for, sentences a second, and ms a sentence where measured."""
    timed = any("ms_per_sentence_batch_1" in result.speed for result in results)
    counted = any("decoder_passes" in result.speed for result in results)
    further = (("ms/sent.",) if timed else ()) + (("passes",) if counted else ())
    rows = [("system", *(METRIC_TITLES[name][1] for name in columns), "sent./s", *further)]
    for result in results:
        metrics = result.scores.metrics
        cells = [f"{metrics[name]:.2f}" if name in metrics else "-" for name in columns]
        cells.append(f"{result.speed['sentences_per_second']:.1f}")
        for name in (*["ms_per_sentence_batch_1"] * timed, *["decoder_passes"] * counted):
            cells.append(f"{result.speed[name]:.1f}" if name in result.speed else "-")
        rows.append((result.name, *cells))
    return table(rows)
