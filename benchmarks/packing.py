"""`python -m benchmarks packing`: a step with packed rows (`data.pack_rows`) against a padded one.

The same sentences, masked alike, by the same model: forward and backward of one micro-batch of about 2,048
tokens of a side. Lengths are drawn as those of sentences vary. Float32, no attention dropout.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import circumstances, cpu_threads, interleave, positive, ratio_summary, write_json
from benchmarks.padding import PaddingBench, write_sentences
from janus_ds.batch import SpecialTokens
from janus_ds.cli.arguments import new_parser
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.tables import table

if TYPE_CHECKING:
    from janus_ds.batch import TwoStreamBatch
    from janus_ds.train.loop.step import TrainingStep

__all__ = ["PackingBench", "bench_packing", "main"]

_SPECIAL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=10_151, vocab_size=10_152)
CASES = {
    "like_length_pad_multiple_8": ("tokens", 8),
    "like_length_pad_multiple_2": ("tokens", 2),
    "like_length_pad_multiple_1": ("tokens", 1),
    "as_they_come": ("samples", 1),
}
"""`data.batch` and `data.pad_multiple` by the names of the result."""


@dataclass(frozen=True)
class PackingBench:
    """What is measured."""

    model: str = "iwslt"
    """A key of `config.presets.MODEL_PRESETS`."""
    cases: tuple[str, ...] = tuple(CASES)
    """Keys of :data:`CASES`."""
    rounds: int = 5
    """Measurements of each step, interleaved."""
    samples: int = 16_384
    """Sentences that batches are made of."""


def bench_packing(bench: PackingBench) -> dict[str, Any]:
    """Measure each case.

    Returns:
        for each case `ratios.NAME_padded_over_packed` with median, min and max, and `rows.NAME`: decoder rows
        and source tokens that the padded and the packed step compute.
    """
    import time

    ratios, rows = {}, {}
    with cpu_threads(1), tempfile.TemporaryDirectory() as folder:
        split = write_sentences(Path(folder), _SPECIAL, bench.samples)
        step = _step(bench)
        for name in bench.cases:
            batches = {
                way: _batch(PaddingBench(split, _SPECIAL), *CASES[name], packs)
                for way, packs in (("padded", False), ("packed", True))
            }
            seconds = interleave(
                {way: _forward_backward(step, batch) for way, batch in batches.items()},
                bench.rounds,
                time.process_time,
            )
            ratios[f"{name}_padded_over_packed"] = ratio_summary(seconds["padded"], seconds["packed"])
            rows[name] = {
                way: {"decoder_rows": batch.row_token_BR.numel(), "source": batch.source_BS.numel()}
                for way, batch in batches.items()
            }
    return {
        "bench": "packing",
        "model": bench.model,
        "ratios": ratios,
        "rows": rows,
        "clock": "cpu",
        "precision": "float32",
        "threads": 1,
        **circumstances(),
    }


def _step(bench: PackingBench) -> TrainingStep:
    import torch

    from janus_ds.config.schema import ModelConfig
    from janus_ds.model.janus import JanusModel
    from janus_ds.objective.janus_objective import JanusObjective
    from janus_ds.parallel.tensor_parallel import make_layers
    from janus_ds.train.loop.step import TrainingStep

    torch.manual_seed(1)
    shape = {**MODEL_PRESETS[bench.model], "attention_dropout": 0.0}
    model = JanusModel(ModelConfig(preset=bench.model, **shape), _SPECIAL, make_layers(1))
    objective = PaddingBench(Path(), _SPECIAL).run("tokens", 1).objective
    return TrainingStep(model, JanusObjective(objective, _SPECIAL.vocab_size, make_layers(1))).train()


def _batch(bench: PaddingBench, batch: str, multiple: int, packs: bool) -> TwoStreamBatch:
    """The first micro-batch of the step in the middle of an epoch."""
    from janus_ds.data.stream.step_plan import RankShare, make_step_plan

    maker = bench.maker(batch, multiple, packs)
    plan = make_step_plan(maker, RankShare(0, 1, 80, 2))
    parts = plan.parts(int(plan.steps_per_epoch) // 2)
    return maker.micro_batches(parts)[0]


def _forward_backward(step: TrainingStep, batch: TwoStreamBatch) -> Callable[[], None]:
    import torch

    def run() -> None:
        step.zero_grad(set_to_none=True)
        torch.autograd.backward(step(batch, batch.counts)[0])

    return run


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, write JSON if asked."""
    parser = new_parser("bench packing", "A step with packed rows against a padded one.")
    parser.add_argument("--model", choices=sorted(MODEL_PRESETS), default="iwslt", help="default: iwslt")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements of each step (default: 5)")
    parser.add_argument(
        "--only", type=_cases, default=tuple(CASES), help=f"of {', '.join(CASES)}, joined by commas"
    )
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    result = bench_packing(PackingBench(parsed.model, parsed.only, parsed.rounds))
    print(describe(result))
    if parsed.json is not None:
        write_json(parsed.json, result)
    return 0


def _cases(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(CASES):
        raise argparse.ArgumentTypeError(f"give some of {', '.join(CASES)}")
    return names


def describe(result: dict[str, Any]) -> str:
    """A table of the result."""
    lines = [["batches", "rows padded", "packed", "source padded", "packed", "padded / packed", "min", "max"]]
    for name, rows in result["rows"].items():
        ratio = result["ratios"][f"{name}_padded_over_packed"]
        counts = [
            f"{rows[way][what]:,}" for what in ("decoder_rows", "source") for way in ("padded", "packed")
        ]
        lines.append(
            [name.replace("_", " "), *counts, *(f"{ratio[k]:.2f}" for k in ("median", "min", "max"))]
        )
    return f"{result['model']}, forward + backward, float32, 1 thread, CPU time\n{table(lines)}"
