"""`python -m benchmarks train`: a JANUS step against a plain AR step at the same tokens.

Forward and backward of one batch in one process, by the same implementation and on the same weights: the
presets `paper` and `ar`, and what `--also` names. `authors` is a step built like the released code, on the
same weights. Dropout as the shape has it; attention dropout as asked, for all alike.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    PRECISIONS,
    add_device_argument,
    check_device,
    circumstances,
    cpu_threads,
    device_clock,
    dtype_of,
    interleave,
    launches,
    positive,
    ratio_summary,
    summary,
    write_json,
)
from benchmarks.shapes import SHAPES, BenchShape, make_batch, special_tokens
from janus_ds.cli.arguments import new_parser
from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.tables import table

if TYPE_CHECKING:
    from torch import Tensor

    from janus_ds.batch import TwoStreamBatch
    from janus_ds.model.janus import JanusModel

__all__ = ["OBJECTIVES", "TrainBench", "bench_train", "describe", "main"]

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
_AUTHORS = "authors"


@dataclass(frozen=True)
class TrainBench:
    """What is measured."""

    shape: str = "iwslt"
    """A key of `shapes.SHAPES`."""
    masked_share: float | None = None
    """M / N, of the target with bos and eos; None: as the shape says, .5."""
    attention_dropout: float = 0.0
    """Of all steps alike."""
    rounds: int | None = None
    """Measurements of each step; None: as the shape says."""
    threads: int = 1
    """CPU threads. With one, CPU time is taken, else time on the wall."""
    device: str = "cpu"
    """cpu or cuda."""
    precision: str = "float32"
    """Of weights and rows: float32 or bfloat16."""
    also: tuple[str, ...] = ()
    """Further steps: keys of :data:`OBJECTIVES`, or authors."""

    @property
    def objectives(self) -> list[str]:
        """Objectives of our own steps."""
        return list(dict.fromkeys(["ar", "janus", *(name for name in self.also if name != _AUTHORS)]))

    def setting(self) -> BenchShape:
        """The shape with the masked tokens and rounds asked for."""
        shape = SHAPES[self.shape]
        if self.masked_share is not None:
            shape = replace(shape, masked_tokens=round(self.masked_share * shape.target_tokens))
        return replace(shape, rounds=self.rounds or shape.rounds)

    def run(self, objective: str) -> RunConfig:
        """The resolved run of an objective, attention dropout as asked."""
        setting = self.setting()
        shape = {**MODEL_PRESETS[setting.preset], "attention_dropout": self.attention_dropout}
        model = ModelConfig(preset=setting.preset, **shape)
        goal = ObjectiveConfig(**OBJECTIVES[objective])
        return resolve(RunConfig(model=model, data=DataConfig(task=setting.task), objective=goal))


def main(arguments: Sequence[str]) -> int:
    """Measure one shape, print a table, write JSON if asked."""
    parser = new_parser("bench train", "A JANUS step against a plain AR step at the same tokens.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="iwslt", help="model and batch to measure")
    parser.add_argument("--masked-share", type=_share, help="masked tokens of the target (default: .5)")
    parser.add_argument("--attention-dropout", type=_share, default=0.0, help="of all steps (default: 0)")
    parser.add_argument("--rounds", type=positive, help="measurements of each step (default: by shape)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    add_device_argument(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    further = ", ".join([*(name for name in OBJECTIVES if name not in ("ar", "janus")), _AUTHORS])
    parser.add_argument("--also", type=_names, default=(), help=f"further steps, joined by commas: {further}")
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = vars(parser.parse_args(arguments))
    file = parsed.pop("json")
    result = bench_train(TrainBench(**parsed))
    print(describe(result))
    if file is not None:
        write_json(file, result)
    return 0


def bench_train(bench: TrainBench) -> dict[str, Any]:
    """Measure forward and backward of the steps in interleaved rounds.

    Returns:
        `ratios.janus_over_ar`, for each further step `NAME_over_ar`, for authors `authors_over_janus` too;
        `milliseconds` with median, min and max; the shape, the decoder rows, hardware and versions. On a
        GPU `launches` of each step, and `mfu` of ours where its peak is known.

    Raises:
        UsageError: there is no such device.
    """
    check_device(bench.device)
    setting = bench.setting()
    with cpu_threads(bench.threads):
        steps, rows = _steps(bench, setting)
        clock_name, clock = device_clock(bench.device, bench.threads)
        seconds = interleave(steps, setting.rounds, clock)
        on_device = {name: launches(step) for name, step in steps.items()} if bench.device == "cuda" else {}
    ratios = {f"{name}_over_ar": ratio_summary(taken, seconds["ar"]) for name, taken in seconds.items()}
    del ratios["ar_over_ar"]
    if _AUTHORS in seconds:
        ratios["authors_over_janus"] = ratio_summary(seconds[_AUTHORS], seconds["janus"])
    return {
        "bench": "train",
        "shape": {"name": bench.shape, **asdict(setting)},
        "attention_dropout": bench.attention_dropout,
        "decoder_rows": rows,
        "ratios": ratios,
        "milliseconds": {name: summary([1e3 * s for s in taken]) for name, taken in seconds.items()},
        "launches": on_device,
        "mfu": _utilisation(bench, setting, seconds),
        "clock": clock_name,
        "precision": bench.precision,
        "threads": bench.threads,
        "device": bench.device,
        **circumstances(),
    }


def _steps(bench: TrainBench, setting: BenchShape) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """Forward and backward of all steps on one model, and the decoder rows of ours."""
    import torch

    from benchmarks.authors import AuthorsLikeStep
    from janus_ds.model.janus import JanusModel
    from janus_ds.parallel.tensor_parallel import make_layers

    torch.manual_seed(1)
    model = JanusModel(bench.run("janus").model, special_tokens(setting), make_layers(1))
    model = model.to(bench.device, dtype_of(bench.precision))
    steps, rows = {}, {}
    for name in bench.objectives:
        run = bench.run(name)
        batch = make_batch(setting, run).to(bench.device)
        rows[name] = batch.row_token_BR.numel()
        steps[name] = _forward_backward(model, _ours(model, run.objective, batch))
    if _AUTHORS in bench.also:
        run = bench.run("janus")
        authors, batch = AuthorsLikeStep(model, run.objective), make_batch(setting, run).to(bench.device)
        steps[_AUTHORS] = _forward_backward(model, lambda: authors(batch))
    return steps, rows


def _utilisation(
    bench: TrainBench, setting: BenchShape, seconds: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Model FLOP/s of our steps as shares of the device's peak; nothing where that is not known."""
    import torch

    from janus_ds.observe.meters import device_peak_flops, step_flops

    peak = device_peak_flops(torch.device(bench.device), dtype_of(bench.precision))
    if peak is None:
        return {}
    shares = {}
    for name in bench.objectives:
        run = bench.run(name)
        counts = make_batch(setting, run).counts
        flops = step_flops(run.model, run.objective, setting.vocab_size, counts)
        shares[name] = flops / median(seconds[name]) / peak
    return shares


def _ours(model: JanusModel, objective: ObjectiveConfig, batch: TwoStreamBatch) -> Callable[[], Tensor]:
    from janus_ds.objective.janus_objective import JanusObjective
    from janus_ds.parallel.tensor_parallel import make_layers
    from janus_ds.train.loop.step import TrainingStep

    head = JanusObjective(objective, model.special.vocab_size, make_layers(1))
    step = TrainingStep(model, head, objective.encoder_passes).train()
    return lambda: step(batch, batch.counts)[0]


def _forward_backward(model: JanusModel, loss: Callable[[], Tensor]) -> Callable[[], None]:
    import torch

    def run() -> None:
        model.zero_grad(set_to_none=True)
        total = loss()
        torch.autograd.backward(total)

    return run


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("give a share of at least 0 and below 1")
    return value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= {*OBJECTIVES, _AUTHORS}:
        raise argparse.ArgumentTypeError(f"give some of {', '.join([*OBJECTIVES, _AUTHORS])}")
    return names


def describe(result: dict[str, Any]) -> str:
    """A table of the result."""
    shape = result["shape"]
    head = (
        f"{shape['name']}: {shape['samples']} samples of {shape['source_tokens']} source and "
        f"{shape['target_tokens']} target tokens, {shape['masked_tokens']} masked; vocabulary "
        f"{shape['vocab_size']:,}; attention dropout {result['attention_dropout']}; "
        f"forward + backward, {result['precision']}, {result['device']}, "
        f"{result['threads']} thread(s), {result['clock']} time, {shape['rounds']} rounds"
    )
    labels = {"ar": "plain AR", "janus": "JANUS"}
    rows = [["step", "decoder rows", "median", "min", "max"]]
    for name, ms in result["milliseconds"].items():
        count = str(result["decoder_rows"].get(name, ""))
        figures = [f"{ms[k]:.1f}" for k in ("median", "min", "max")]
        rows.append([f"{labels.get(name, name)} (ms)", count, *figures])
    for name, ratio in result["ratios"].items():
        label = " / ".join(labels.get(part, part).removeprefix("plain ") for part in name.split("_over_"))
        rows.append([label, "", *(f"{ratio[k]:.2f}" for k in ("median", "min", "max"))])
    for name, share in result["mfu"].items():
        rows.append([f"{labels.get(name, name)}, share of the peak", "", f"{share:.3f}", "", ""])
    for name, calls in result["launches"].items():
        words = ", ".join(f"{count:,} {kind}" for kind, count in calls.items())
        rows.append([f"{labels.get(name, name)}: {words}", "", "", "", ""])
    return f"{head}\n{table(rows)}"
