"""`python -m benchmarks train`: a JANUS step against a plain AR step at the same tokens.

Forward and backward of one batch in one process, by the same implementation and on the same weights: the
presets `paper` and `ar`, and what `--also` names. `authors` is a step built like the released code
(:mod:`benchmarks.authors`). Dropout is the shape's; attention dropout is an option.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from benchmarks.authors import AuthorsLikeStep
from benchmarks.common import cells, choices, forward_backward, measure, positives, share
from benchmarks.outsiders import OUTSIDERS, outsider_step
from benchmarks.shapes import SHAPES, BenchShape, make_batch, special_tokens, step_job
from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.errors import UsageError
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.progress import table
from janus_ds.train.reporting import device_peak_flops, step_flops

OBJECTIVES: dict[str, dict[str, Any]] = {
    "ar": {"preset": "ar"},
    "janus": {"preset": "paper"},
    "janus_2enc": {"preset": "paper", "encoder_passes": 2},
    "ar_query": {"preset": "ar_query"},
    "ar_rdrop": {"preset": "ar_rdrop"},
    "cmlm": {"preset": "cmlm"},
    "released_finetune": {"preset": "released_finetune"},
}
"""Objectives by the names that `--also` knows; `ar` and `janus` are always measured."""
AXES = {"vocabulary": "symbols", "length": "tokens, source and target each"}
_AUTHORS = "authors"
_LABELS = {"ar": "plain AR", "janus": "JANUS"}


SHARED, ROUNDS = ("device", "precision", "threads"), None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="iwslt", help="default: iwslt")
    add("--masked-share", type=share, help="masked tokens of the target (default: .5)")
    add("--attention-dropout", type=share, default=0.0, help="of all steps (default: 0)")
    further = [*(name for name in OBJECTIVES if name not in _LABELS), _AUTHORS, *OUTSIDERS]
    for name, text in AXES.items():
        about = f"measure with several numbers of {text}, and fit time ~ number ^ exponent"
        add(f"--{name}", type=positives, default=(), help=about)
    add("--also", type=choices(further), default=(), help=f"of {', '.join(further)}")


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape; with `--vocabulary` or `--length`: `cases` of several, and `exponents`.

    Raises:
        UsageError: both axes at once, or one number of an axis.
    """
    shape = SHAPES[options.shape]
    if options.masked_share is not None:
        shape = replace(shape, masked_tokens=round(options.masked_share * shape.target_tokens))
    shape = replace(shape, rounds=options.rounds or shape.rounds)
    if options.vocabulary and options.length:
        raise UsageError("two axes at once", "--vocabulary --length", "measure one after the other")
    numbers = options.vocabulary or options.length
    if len(set(numbers)) == 1:
        raise UsageError("one number has no exponent", "--vocabulary or --length", "give several, as 64,128")
    masked = shape.masked_tokens / shape.target_tokens
    shapes = [replace(shape, vocab_size=size) for size in options.vocabulary]
    shapes += [
        replace(shape, source_tokens=n, target_tokens=n, masked_tokens=round(n * masked))
        for n in options.length
    ]
    if not shapes:
        return bench_shape(options, shape)
    cases = [bench_shape(options, case) for case in shapes]
    return {"bench": "train", "cases": cases, "exponents": exponents(cases, numbers)}


def exponents(cases: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> dict[str, float]:
    """Slopes of log median time over log number, of AR, JANUS and their ratio, by least squares."""
    medians = {name: [case["milliseconds"][name]["median"] for case in cases] for name in ("ar", "janus")}
    medians["janus_over_ar"] = [case["ratios"]["janus_over_ar"]["median"] for case in cases]
    return {name: float(np.polyfit(np.log(numbers), np.log(found), 1)[0]) for name, found in medians.items()}


def bench_shape(options: argparse.Namespace, shape: BenchShape) -> dict[str, Any]:
    """Measure forward and backward of the steps in interleaved rounds.

    Returns:
        `ratios.janus_over_ar`, for each further step `NAME_over_ar`, for authors `authors_over_janus` too,
        for steps of other libraries `janus_over_NAME`;
        `milliseconds` with median, min and max; the shape, the decoder rows, hardware and versions. On a
        GPU `launches` of each step, and `mfu` of ours where the device's peak is known.
    """
    names = dict.fromkeys(["ar", "janus", *(name for name in options.also if name in OBJECTIVES)])
    runs = {name: _run(shape, name, options.attention_dropout) for name in names}
    steps, rows = _steps(shape, runs, options)
    ratios = {f"{name}_over_ar": (name, "ar") for name in steps if name != "ar"}
    ratios |= {"authors_over_janus": (_AUTHORS, "janus")}
    ratios |= {f"janus_over_{name}": ("janus", name) for name in OUTSIDERS}
    measured = measure(steps, shape.rounds, options, ratios)
    return {
        "bench": "train",
        "shape": {"name": options.shape, **asdict(shape)},
        "attention_dropout": options.attention_dropout,
        "decoder_rows": rows,
        "mfu": _utilisation(shape, runs, measured["milliseconds"], options),
        **measured,
    }


def _run(shape: BenchShape, objective: str, attention_dropout: float) -> RunConfig:
    sizes = {**MODEL_PRESETS[shape.preset], "attention_dropout": attention_dropout}
    model = ModelConfig(preset=shape.preset, **sizes)
    most = max(model.max_source_positions, shape.source_tokens, shape.target_tokens)
    model = replace(
        model, max_source_positions=most, max_target_positions=max(most, model.max_target_positions)
    )
    goal = ObjectiveConfig(**OBJECTIVES[objective])
    return resolve(RunConfig(model=model, data=DataConfig(task=shape.task), objective=goal))


def _steps(
    shape: BenchShape, runs: Mapping[str, RunConfig], options: argparse.Namespace
) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """Forward and backward of all steps on one model, and the decoder rows of ours."""
    torch.manual_seed(1)
    model = JanusModel(runs["janus"].model, special_tokens(shape), ParallelLayers())
    model = model.to(options.device, getattr(torch, options.precision))
    steps, rows = {}, {}

    def add(name: str, run: RunConfig) -> None:
        batch = make_batch(shape, run).to(options.device)
        if name == _AUTHORS:
            authors = AuthorsLikeStep(model, run.objective)
            steps[name] = forward_backward(model, lambda: authors(batch))
        else:
            rows[name] = batch.row_token_BR.numel()
            steps[name] = step_job(model, run.objective, batch)

    for name, run in runs.items():
        add(name, run)
    if _AUTHORS in options.also:
        add(_AUTHORS, runs["janus"])
    smoothing, dtype = float(runs["ar"].objective.label_smoothing or 0.0), getattr(torch, options.precision)
    for name in (name for name in OUTSIDERS if name in options.also):
        steps[name] = outsider_step(name, shape, runs["ar"].model, smoothing, options.device, dtype)
    return steps, rows


def _utilisation(
    shape: BenchShape,
    runs: Mapping[str, RunConfig],
    milliseconds: Mapping[str, Mapping[str, float]],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Model FLOP/s of our steps as shares of the device's peak; nothing where that is not known."""
    peak = device_peak_flops(torch.device(options.device), getattr(torch, options.precision))
    if peak is None:
        return {}
    shares = {}
    for name, run in runs.items():
        counts = make_batch(shape, run).counts
        flops = step_flops(run.model, run.objective, shape.vocab_size, counts)
        shares[name] = flops / (milliseconds[name]["median"] / 1e3) / peak
    return shares


def describe(result: dict[str, Any]) -> str:
    """A table of the result, or of each case and of the exponents."""
    if "cases" in result:
        rows = [[_LABELS.get(name, name), f"{value:.2f}"] for name, value in result["exponents"].items()]
        fitted = table([["time ~ number ^", "exponent"], *rows])
        return "\n".join([*map(describe, result["cases"]), fitted])
    shape = result["shape"]
    head = (
        f"{shape['name']}: {shape['samples']} samples of {shape['source_tokens']} source and "
        f"{shape['target_tokens']} target tokens, {shape['masked_tokens']} masked; vocabulary "
        f"{shape['vocab_size']:,}; attention dropout {result['attention_dropout']}; "
        f"forward + backward, {result['precision']}, {result['device']}, "
        f"{result['threads']} thread(s), {result['clock']} time, {shape['rounds']} rounds"
    )
    rows = [["step", "decoder rows", "median", "min", "max"]]
    for name, ms in result["milliseconds"].items():
        rows.append(
            [f"{_LABELS.get(name, name)} (ms)", str(result["decoder_rows"].get(name, "")), *cells(ms)]
        )
    for name, ratio in result["ratios"].items():
        label = " / ".join(_LABELS.get(part, part).removeprefix("plain ") for part in name.split("_over_"))
        rows.append([label, "", *cells(ratio, 2)])
    for name, used in result["mfu"].items():
        rows.append([f"{_LABELS.get(name, name)}, share of the peak", "", f"{used:.3f}", "", ""])
    for name, calls in result["launches"].items():
        words = ", ".join(f"{count:,} {kind}" for kind, count in calls.items())
        rows.append([f"{_LABELS.get(name, name)}: {words}", "", "", "", ""])
    return f"{head}\n{table(rows)}"
