"""`python -m janus_ds bench train`: a JANUS step against a plain AR step at the same tokens.

Both are forward and backward of one batch in one process, by the same implementation and on the same
weights: the presets `paper` and `ar`. Float32; dropout as the shape has it, without attention dropout.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.errors import UsageError
from janus_ds.tools.bench_common import hardware, interleave, ratio_summary, summary, versions, write_json
from janus_ds.tools.common import new_parser, table

if TYPE_CHECKING:
    from janus_ds.batch import SpecialTokens, TwoStreamBatch
    from janus_ds.model.janus import JanusModel

__all__ = ["SHAPES", "BenchShape", "bench_train", "main"]


@dataclass(frozen=True)
class BenchShape:
    """A model preset and the batch it is measured on; tokens count bos and eos."""

    preset: str
    task: str
    samples: int
    source_tokens: int
    target_tokens: int
    masked_tokens: int
    vocab_size: int
    rounds: int


SHAPES: dict[str, BenchShape] = {
    "small": BenchShape("quickstart", "denoise", 8, 64, 64, 32, 4000, 7),
    "iwslt": BenchShape("iwslt", "pair", 12, 26, 26, 13, 10152, 7),
    "bart_base": BenchShape("bart_base", "denoise", 1, 512, 512, 256, 50265, 3),
}


def main(arguments: Sequence[str]) -> int:
    """Measure one shape, print a table, write JSON if asked."""
    parser = new_parser("bench train", "A JANUS step against a plain AR step at the same tokens.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="iwslt", help="model and batch to measure")
    parser.add_argument("--rounds", type=_positive, help="measurements of each step (default: by shape)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    result = bench_train(parsed.shape, parsed.rounds, parsed.threads, parsed.device)
    print(_describe(result))
    if parsed.json is not None:
        write_json(parsed.json, result)
    return 0


def bench_train(
    shape: str, rounds: int | None = None, threads: int = 1, device: str = "cpu"
) -> dict[str, Any]:
    """Measure forward and backward of both steps in interleaved rounds.

    Args:
        shape: a key of :data:`SHAPES`.
        rounds: measurements of each step; None: as the shape says.
        threads: CPU threads. With one, CPU time is taken, else time on the wall.
        device: cpu or cuda.

    Returns:
        `ratios.janus_over_ar` and `milliseconds.{ar,janus}` with median, min and max, the shape, the
        decoder rows, hardware and versions.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here", "--device cuda", "measure with --device cpu")
    setting = SHAPES[shape]
    with _threads(threads):
        steps, rows = _steps(setting, device)
        cpu_time = device == "cpu" and threads == 1
        clock = time.process_time if cpu_time else time.perf_counter
        seconds = interleave(steps, rounds or setting.rounds, clock)
    return {
        "bench": "train",
        "shape": {"name": shape, **asdict(setting), "rounds": len(seconds["ar"])},
        "decoder_rows": rows,
        "ratios": {"janus_over_ar": ratio_summary(seconds["janus"], seconds["ar"])},
        "milliseconds": {name: summary([1e3 * s for s in taken]) for name, taken in seconds.items()},
        "clock": "cpu" if cpu_time else "wall",
        "precision": "float32",
        "threads": threads,
        "device": device,
        "hardware": hardware(),
        "versions": versions(),
    }


def _steps(setting: BenchShape, device: str) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """Forward and backward of both objectives on one model, and the decoder rows of each."""
    import torch

    from janus_ds.batch import SpecialTokens
    from janus_ds.model.janus import JanusModel
    from janus_ds.parallel.tensor_parallel import make_layers

    special = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4, vocab_size=setting.vocab_size)
    torch.manual_seed(1)
    shape = {**MODEL_PRESETS[setting.preset], "attention_dropout": 0.0}
    model = JanusModel(ModelConfig(preset=setting.preset, **shape), special, make_layers(1)).to(device)
    steps, rows = {}, {}
    for name, objective in {"ar": "ar", "janus": "paper"}.items():
        run = RunConfig(
            model=model.config,
            data=DataConfig(task=setting.task),
            objective=ObjectiveConfig(preset=objective),
        )
        batch = _batch(setting, resolve(run), special).to(device)
        rows[name] = batch.layout.rows * setting.samples
        steps[name] = _step(model, resolve(run).objective, batch)
    return steps, rows


def _step(model: JanusModel, objective: ObjectiveConfig, batch: TwoStreamBatch) -> Callable[[], None]:
    import torch

    from janus_ds.objective.janus_objective import JanusObjective
    from janus_ds.parallel.tensor_parallel import make_layers
    from janus_ds.train.step import TrainingStep

    head = JanusObjective(objective, model.special.vocab_size, make_layers(1))
    step = TrainingStep(model, head).train()

    def run() -> None:
        step.zero_grad(set_to_none=True)
        total, _ = step(batch, batch.counts)
        torch.autograd.backward(total)
        if total.is_cuda:
            torch.cuda.synchronize()

    return run


def _batch(setting: BenchShape, run: RunConfig, special: SpecialTokens) -> TwoStreamBatch:
    """Random sentences of one length, masked at random; nothing is padded."""
    import numpy as np

    from janus_ds.data.collate import Collator
    from janus_ds.data.ragged import Ragged
    from janus_ds.data.views import Views

    draw = np.random.default_rng(1)

    def sentences(tokens: int) -> Ragged:
        inner = draw.integers(special.mask + 1, special.vocab_size, (setting.samples, tokens - 2))
        return Ragged.from_rows([[special.bos, *row, special.eos] for row in inner])

    masked = np.zeros((setting.samples, setting.target_tokens), dtype=bool)
    for row in masked:
        row[1 + draw.permutation(setting.target_tokens - 2)[: setting.masked_tokens]] = True
    views = Views(sentences(setting.source_tokens), sentences(setting.target_tokens), masked.reshape(-1))
    classes = run.model.length_classes or run.model.max_target_positions
    return Collator(special, run.objective, classes, pad_multiple=1)(views, np.arange(setting.samples))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("give a whole number above 0")
    return value


def _describe(result: dict[str, Any]) -> str:
    shape, ratio = result["shape"], result["ratios"]["janus_over_ar"]
    head = (
        f"{shape['name']}: {shape['samples']} samples of {shape['source_tokens']} source and "
        f"{shape['target_tokens']} target tokens, {shape['masked_tokens']} masked; vocabulary "
        f"{shape['vocab_size']:,}; forward + backward, {result['precision']}, {result['device']}, "
        f"{result['threads']} thread(s), {result['clock']} time, {shape['rounds']} rounds"
    )
    rows = [["step", "decoder rows", "median", "min", "max"]]
    for name, label in {"ar": "plain AR (ms)", "janus": "JANUS (ms)"}.items():
        ms = result["milliseconds"][name]
        rows.append(
            [label, str(result["decoder_rows"][name]), *(f"{ms[k]:.1f}" for k in ("median", "min", "max"))]
        )
    rows.append(["JANUS / AR", "", *(f"{ratio[k]:.2f}" for k in ("median", "min", "max"))])
    return f"{head}\n{table(rows)}"
