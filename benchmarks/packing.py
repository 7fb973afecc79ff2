"""`python -m benchmarks packing`: a step with packed rows (`data.pack_rows`) against a padded one.

The same sentences with the same masks through the same model: forward and backward of one micro-batch of
about 2,048 tokens of a side. Lengths are drawn as those of sentences vary. Float32, no attention dropout.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import cells, choices, measure, positive
from benchmarks.data import pairs_run, sentence_lengths, write_split
from benchmarks.shapes import step_job
from janus_ds.batch import SpecialTokens, TwoStreamBatch
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.config.schema import ModelConfig, RunConfig
from janus_ds.data.stream.loader import make_step_plan
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.model.janus import JanusModel
from janus_ds.observe.progress import table
from janus_ds.parallel.tensor_parallel import ParallelLayers

_SPECIAL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=10_151, vocab_size=10_152)
CASES = {
    "like_length_pad_multiple_8": ("tokens", 8),
    "like_length_pad_multiple_2": ("tokens", 2),
    "like_length_pad_multiple_1": ("tokens", 1),
    "as_they_come": ("samples", 1),
}
"""`data.batch` and `data.pad_multiple` by the names of the result."""


SHARED, ROUNDS = (), 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--model", choices=sorted(MODEL_PRESETS), default="iwslt", help="default: iwslt")
    add("--only", type=choices(CASES), default=tuple(CASES), help=f"of {', '.join(CASES)}")
    add("--samples", type=positive, default=16_384, help="sentences to make batches of")


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Measure each case.

    Returns:
        for each case `ratios.NAME_padded_over_packed` with median, min and max, and `rows.NAME`: decoder rows
        and source tokens that the padded and the packed step compute.
    """
    torch.manual_seed(1)
    sizes = {**MODEL_PRESETS[options.model], "attention_dropout": 0.0}
    model = JanusModel(ModelConfig(preset=options.model, **sizes), _SPECIAL, ParallelLayers())
    jobs: dict[str, Callable[[], None]] = {}
    rows: dict[str, dict[str, dict[str, int]]] = {name: {} for name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        split = write_split(Path(folder), _SPECIAL, sentence_lengths(options.samples))
        for name in options.only:
            for way in ("padded", "packed"):
                run = pairs_run(*CASES[name], way == "packed")
                batch = _batch(split, run)
                jobs[f"{name}_{way}"] = step_job(model, run.objective, batch)
                counts = {"decoder_rows": batch.row_token_BR.numel(), "source": batch.source_BS.numel()}
                rows[name][way] = counts
    ratios = {f"{name}_padded_over_packed": (f"{name}_padded", f"{name}_packed") for name in options.only}
    measured = measure(jobs, options.rounds, options, ratios)
    return {"bench": "packing", "model": options.model, "rows": rows, **measured}


def _batch(split: Path, run: RunConfig) -> TwoStreamBatch:
    """The first micro-batch of the step in the middle of an epoch."""
    maker = BatchMaker(split, run, _SPECIAL)
    plan = make_step_plan(maker, RankShare(0, 1, 80, 2))
    return maker.make(*plan.parts(int(plan.steps_per_epoch) // 2))["batches"][0]


def describe(result: dict[str, Any]) -> str:
    """A table of the result."""
    lines = [["batches", "rows padded", "packed", "source padded", "packed", "padded / packed", "min", "max"]]
    for name, rows in result["rows"].items():
        ratio = cells(result["ratios"][f"{name}_padded_over_packed"], 2)
        counts = [
            f"{rows[way][what]:,}" for what in ("decoder_rows", "source") for way in ("padded", "packed")
        ]
        lines.append([name.replace("_", " "), *counts, *ratio])
    return f"{result['model']}, forward + backward, float32, 1 thread, CPU time\n{table(lines)}"
