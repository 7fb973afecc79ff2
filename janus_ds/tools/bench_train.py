"""`python -m janus_ds bench train`: a JANUS step against a plain AR step at the same tokens.

Both are forward and backward of one batch in one process, by the same implementation and on the same
weights: the presets `paper` and `ar`. Float32; dropout as the shape has it; attention dropout as asked,
for both alike. `--estimator` trains JANUS's losses from fewer rows (`objective.ar_loss`,
`objective.aux_share`): another estimator, and named so in the result.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from janus_ds.config.estimator import estimator_name
from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.errors import UsageError
from janus_ds.tools.bench_common import hardware, interleave, ratio_summary, summary, versions, write_json
from janus_ds.tools.bench_device import (
    PRECISIONS,
    add_device_argument,
    check_device,
    device_clock,
    dtype_of,
    launches,
)
from janus_ds.tools.bench_shapes import ESTIMATORS, SHAPES, BenchShape, make_batch, special_tokens
from janus_ds.tools.bench_threads import cpu_threads, positive
from janus_ds.tools.common import new_parser, table

if TYPE_CHECKING:
    from torch import Tensor

    from janus_ds.batch import TwoStreamBatch
    from janus_ds.model.janus import JanusModel

__all__ = ["Rival", "TrainBench", "bench_train", "describe", "main", "parse"]

Rival = Callable[["JanusModel", ObjectiveConfig, "TwoStreamBatch"], "Callable[[], Tensor]"]
"""Makes another way to the loss of the JANUS batch, from the same weights."""


@dataclass(frozen=True)
class TrainBench:
    """What is measured."""

    shape: str = "iwslt"
    """A key of `bench_shapes.SHAPES`."""
    masked_share: float | None = None
    """M / N, of the target with bos and eos; None: as the shape says, .5."""
    attention_dropout: float = 0.0
    """Of AR and JANUS alike."""
    rounds: int | None = None
    """Measurements of each step; None: as the shape says."""
    threads: int = 1
    """CPU threads. With one, CPU time is taken, else time on the wall."""
    device: str = "cpu"
    """cpu or cuda."""
    estimator: str = "full"
    """Of JANUS's losses: a key of `bench_shapes.ESTIMATORS`."""
    precision: str = "float32"
    """Of weights and rows: float32 or bfloat16."""
    aux_share: float = 0.5
    """`objective.aux_share` of the estimators `part` and `both`."""

    def goal(self, estimator: str) -> ObjectiveConfig:
        """The objective of JANUS."""
        options = dict(ESTIMATORS[estimator])
        if "aux_share" in options:
            options["aux_share"] = self.aux_share
        return ObjectiveConfig(preset="paper", **options)

    def setting(self) -> BenchShape:
        """The shape with the masked tokens and rounds asked for."""
        shape = SHAPES[self.shape]
        if self.masked_share is not None:
            shape = replace(shape, masked_tokens=round(self.masked_share * shape.target_tokens))
        # Some of the sentences have AUX rows under `part` and `both`, and some have none.
        least = math.ceil(1 / self.aux_share) if "aux_share" in ESTIMATORS[self.estimator] else 1
        return replace(shape, rounds=self.rounds or shape.rounds, samples=max(shape.samples, least))


def main(arguments: Sequence[str]) -> int:
    """Measure one shape, print a table, write JSON if asked."""
    bench, file = parse("bench train", "A JANUS step against a plain AR step at the same tokens.", arguments)
    result = bench_train(bench)
    print(describe(result))
    if file is not None:
        write_json(file, result)
    return 0


def parse(program: str, text: str, arguments: Sequence[str]) -> tuple[TrainBench, Path | None]:
    """The settings on a command line, and the file for the result."""
    parser = new_parser(program, text)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="iwslt", help="model and batch to measure")
    parser.add_argument("--masked-share", type=_share, help="masked tokens of the target (default: .5)")
    parser.add_argument("--attention-dropout", type=_share, default=0.0, help="of all steps (default: 0)")
    parser.add_argument("--rounds", type=positive, help="measurements of each step (default: by shape)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads (default: 1)")
    add_device_argument(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    goals = {name: TrainBench().goal(name) for name in ESTIMATORS}
    names = ", ".join(f"{name}: {estimator_name(goal)}" for name, goal in goals.items()).replace("%", "%%")
    parser.add_argument("--estimator", choices=sorted(ESTIMATORS), default="full", help=f"of JANUS; {names}")
    parser.add_argument(
        "--aux-share", type=_positive_share, default=0.5, help="sentences with AUX rows of part and both (.5)"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = vars(parser.parse_args(arguments))
    file = parsed.pop("json")
    return TrainBench(**parsed), file


def bench_train(bench: TrainBench, rivals: Mapping[str, Rival] | None = None) -> dict[str, Any]:
    """Measure forward and backward of the steps in interleaved rounds.

    Args:
        bench: what is measured.
        rivals: further ways to the loss of the JANUS batch, by name.

    Returns:
        `ratios.janus_over_ar`, for each rival `ratios.NAME_over_janus` and `NAME_over_ar`, and
        `milliseconds` with median, min and max; the shape, the decoder rows, hardware and versions. On a
        GPU `launches` of each step, and `mfu` of ours where its peak is known.

    Raises:
        UsageError: there is no such device, or rivals are to be measured against another estimator.
    """
    check_device(bench.device)
    if rivals and bench.estimator != "full":
        raise UsageError(
            "the rivals compute the whole objective, and would be measured against a part of it",
            f"--estimator {bench.estimator}",
            "leave --estimator out",
        )
    setting = bench.setting()
    with cpu_threads(bench.threads):
        steps, rows = _steps(bench, setting, rivals or {})
        clock_name, clock = device_clock(bench.device, bench.threads)
        seconds = interleave(steps, setting.rounds, clock)
        on_device = {name: launches(step) for name, step in steps.items()} if bench.device == "cuda" else {}
    ratios = {"janus_over_ar": ratio_summary(seconds["janus"], seconds["ar"])}
    for name in rivals or {}:
        for other in ("janus", "ar"):
            ratios[f"{name}_over_{other}"] = ratio_summary(seconds[name], seconds[other])
    return {
        "bench": "train",
        "shape": {"name": bench.shape, **asdict(setting)},
        "attention_dropout": bench.attention_dropout,
        "estimator": estimator_name(bench.goal(bench.estimator)),
        "decoder_rows": rows,
        "ratios": ratios,
        "milliseconds": {name: summary([1e3 * s for s in taken]) for name, taken in seconds.items()},
        "launches": on_device,
        "mfu": _utilisation(bench, setting, seconds),
        "clock": clock_name,
        "precision": bench.precision,
        "threads": bench.threads,
        "device": bench.device,
        "hardware": hardware(),
        "versions": versions(),
    }


def _steps(
    bench: TrainBench, setting: BenchShape, rivals: Mapping[str, Rival]
) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """Forward and backward of all steps on one model, and the decoder rows of ours."""
    import torch

    from janus_ds.model.janus import JanusModel
    from janus_ds.parallel.tensor_parallel import make_layers

    torch.manual_seed(1)
    shape = {**MODEL_PRESETS[setting.preset], "attention_dropout": bench.attention_dropout}
    config = ModelConfig(preset=setting.preset, **shape)
    model = JanusModel(config, special_tokens(setting), make_layers(1))
    model = model.to(bench.device, dtype_of(bench.precision))
    steps, rows = {}, {}
    goals = {"ar": ObjectiveConfig(preset="ar"), "janus": bench.goal(bench.estimator)}
    for name, goal in goals.items():
        data = DataConfig(task=setting.task)
        run = resolve(RunConfig(model=model.config, data=data, objective=goal))
        batch = make_batch(setting, run).to(bench.device)
        rows[name] = batch.row_token_BR.numel()
        steps[name] = _forward_backward(model, _ours(model, run.objective, batch))
    for name, rival in rivals.items():
        steps[name] = _forward_backward(model, rival(model, run.objective, batch))
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
    for name, goal in (("ar", ObjectiveConfig(preset="ar")), ("janus", bench.goal(bench.estimator))):
        config = ModelConfig(preset=setting.preset, **MODEL_PRESETS[setting.preset])
        run = resolve(RunConfig(model=config, data=DataConfig(task=setting.task), objective=goal))
        counts = make_batch(setting, run).counts
        flops = step_flops(run.model, run.objective, setting.vocab_size, counts)
        shares[name] = flops / median(seconds[name]) / peak
    return shares


def _ours(model: JanusModel, objective: ObjectiveConfig, batch: TwoStreamBatch) -> Callable[[], Tensor]:
    from janus_ds.objective.janus_objective import JanusObjective
    from janus_ds.parallel.tensor_parallel import make_layers
    from janus_ds.train.loop.step import TrainingStep

    head = JanusObjective(objective, model.special.vocab_size, make_layers(1))
    step = TrainingStep(model, head).train()
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


def _positive_share(text: str) -> float:
    value = _share(text)
    if not value:
        raise argparse.ArgumentTypeError("give a share above 0 and below 1")
    return value


def describe(result: dict[str, Any]) -> str:
    """A table of the result."""
    shape = result["shape"]
    head = (
        f"{shape['name']}: {shape['samples']} samples of {shape['source_tokens']} source and "
        f"{shape['target_tokens']} target tokens, {shape['masked_tokens']} masked; vocabulary "
        f"{shape['vocab_size']:,}; attention dropout {result['attention_dropout']}; estimator of "
        f"JANUS: {result['estimator']}; forward + backward, {result['precision']}, {result['device']}, "
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
