"""`python -m benchmarks data`: how fast one core makes batches, from the shards to tensors.

Documents are random tokens, packed as launch/prepare_data.py packs them; what is measured is the loader's
own path (order, read with checksums, mask, collate) in one process, as a worker runs it. For pairs it also
counts which share of the rows of the translation recipes' batches is padding, over sentences of drawn or,
with `--data`, of real lengths.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import cpu_threads
from benchmarks.padding import PaddingBench, padding_shares, write_sentences
from janus_ds.batch import SpecialTokens
from janus_ds.cli.arguments import new_parser
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.stream.batch_maker import BatchMaker
from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.data.stream.schedule import SampleSchedule
from janus_ds.data.stream.shards import Packing, shard_name, write_shard
from janus_ds.data.stream.step_plan import one_source

__all__ = ["DataBench", "bench_data", "main"]

_SPECIAL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=50264, vocab_size=50265)


@dataclass(frozen=True)
class DataBench:
    """What is measured."""

    task: str = "denoise"
    """denoise (documents) or pair."""
    tokens: int = 490
    """Mean length of a document, or of each side of a pair; lengths vary by a tenth."""
    preset: str = "paper"
    """Objective preset: which rows are made, and by which law tokens are masked."""
    batch: int = 64
    """Samples a step."""
    rounds: int = 7
    """Measured rounds; the median counts."""
    samples: int = 4096
    """Samples in the shards, and in a round."""
    data: Path | None = None
    """Prepared pairs whose lengths are counted for `padding_share`; None: drawn lengths."""


SHAPES: dict[str, dict[str, Any]] = {
    "documents": {"task": "denoise", "tokens": 490, "batch": 64},
    # About 4,096 tokens of a side an update, as the NMT recipes have; --batch 30 is 800 tokens.
    "pairs": {"task": "pair", "tokens": 25, "batch": 150},
}
"""Settings by name, for `--shape`."""


def bench_data(bench: DataBench) -> dict[str, Any]:
    """Documents (or pairs) a second and core through read, mask and collate, by CPU time.

    Returns:
        the settings, `documents_per_second_per_core` with median, min and max over the rounds,
        `microseconds_per_document` by stage, and the wall-clock rate; for pairs `padding_share` as well.
    """
    with cpu_threads(1), tempfile.TemporaryDirectory() as folder:
        split = _write_split(Path(folder), bench)
        maker = BatchMaker(split, _run(bench), _SPECIAL)
        _round(maker, bench, epoch=0)
        rounds = [_round(maker, bench, epoch) for epoch in range(1, bench.rounds + 1)]
    measured = bench.samples // bench.batch * bench.batch
    padding = {"padding_share": _padding(bench)} if bench.task == "pair" else {}
    return {
        **padding,
        "task": bench.task,
        "preset": bench.preset,
        "tokens": bench.tokens,
        "samples_a_step": bench.batch,
        "documents_per_second_per_core": _spread([measured / r["total"] for r in rounds]),
        "documents_per_second_wall": _spread([measured / r["wall"] for r in rounds]),
        "microseconds_per_document": {
            stage: round(median(r[stage] for r in rounds) / measured * 1e6, 1)
            for stage in ("order", "read", "mask", "collate")
        },
    }


def _padding(bench: DataBench) -> dict[str, Any]:
    """Padding of batches of about 4,096 tokens, and whose lengths they are."""
    if bench.data is not None:
        place = open_data(str(bench.data), DataConfig())
        counted = PaddingBench(bench.data / "train", place.tokenizer.special, bench.preset)
        return {"lengths": bench.data.name, **padding_shares(counted)}
    with tempfile.TemporaryDirectory() as folder:
        split = write_sentences(Path(folder), _SPECIAL)
        return {"lengths": "log-normal", **padding_shares(PaddingBench(split, _SPECIAL, bench.preset))}


def _run(bench: DataBench) -> RunConfig:
    return resolve(
        RunConfig(
            model=ModelConfig(max_source_positions=1024, max_target_positions=1024),
            data=DataConfig(task=bench.task, block_tokens=1022),
            objective=ObjectiveConfig(preset=bench.preset),
            train=TrainConfig(global_batch=bench.batch),
        )
    )


def _write_split(folder: Path, bench: DataBench) -> Path:
    draw = np.random.default_rng(1)
    streams = ("source", "target") if bench.task == "pair" else ("target",)
    samples = {}
    for stream in streams:
        spread = max(bench.tokens // 10, 1)
        lengths = draw.integers(bench.tokens - spread, bench.tokens + spread + 1, bench.samples)
        values = draw.integers(5, _SPECIAL.mask, int(lengths.sum())).astype(np.uint16)
        samples[stream] = Ragged.from_lengths(values, np.maximum(lengths, 1))
    shard = write_shard(folder / shard_name(0), samples, Packing("uint16"), 0)
    SplitIndex("uint16", streams, (shard,)).save(folder)
    return folder


def _round(maker: BatchMaker, bench: DataBench, epoch: int) -> dict[str, float]:
    """CPU seconds of one epoch by stage, in all, and wall-clock seconds."""
    schedule = SampleSchedule(
        1, one_source(maker).member_sizes, maker.config.data.shuffle_window, bench.batch
    )
    steps = bench.samples // bench.batch
    spent = dict.fromkeys(("order", "read", "mask", "collate"), 0.0)
    wall, start = time.perf_counter(), time.process_time()
    for step in range(epoch * steps, (epoch + 1) * steps):
        marks = [time.process_time()]
        epochs, ids = schedule.ids(step)
        marks.append(time.process_time())
        samples = maker.read(ids)
        marks.append(time.process_time())
        views = maker.mask(epochs, ids, samples)
        marks.append(time.process_time())
        maker.collate(views, ids)
        marks.append(time.process_time())
        for stage, before, after in zip(spent, marks, marks[1:], strict=False):
            spent[stage] += after - before
    total = time.process_time() - start
    return {**spent, "total": total, "wall": time.perf_counter() - wall}


def _spread(values: Sequence[float]) -> dict[str, int]:
    return {"median": round(median(values)), "min": round(min(values)), "max": round(max(values))}


def main(arguments: Sequence[str]) -> int:
    """Measure and print; `--json` writes the figures to a file too."""
    parser = new_parser("bench data", "Documents a second and core: read, mask and collate.")
    default = DataBench()
    parser.add_argument("--shape", choices=sorted(SHAPES), help="pairs or documents: task, tokens and batch")
    parser.add_argument("--task", choices=("denoise", "pair"), default=default.task)
    parser.add_argument(
        "--tokens", type=_up_to(900), default=default.tokens, help="mean length (default: 490)"
    )
    parser.add_argument("--preset", default=default.preset, help="objective preset (default: paper)")
    parser.add_argument(
        "--batch", type=_up_to(default.samples), default=default.batch, help="samples a step (default: 64)"
    )
    parser.add_argument(
        "--rounds", type=_up_to(1000), default=default.rounds, help="measured rounds (default: 7)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared pairs whose padding is counted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parsed = parser.parse_args(arguments)
    if parsed.shape:
        # What the shape says is the default; options given beside it still count.
        parser.set_defaults(**SHAPES[parsed.shape])
        parsed = parser.parse_args(arguments)
    bench = DataBench(
        parsed.task, parsed.tokens, parsed.preset, parsed.batch, parsed.rounds, data=parsed.data
    )
    figures = bench_data(bench)
    rate, stages = figures["documents_per_second_per_core"], figures["microseconds_per_document"]
    print(f"{figures['preset']} / {figures['task']}, about {parsed.tokens} tokens, {parsed.batch} a step")
    print(f"documents/s/core: median {rate['median']:,} (min {rate['min']:,}, max {rate['max']:,})")
    print("microseconds a document: " + ", ".join(f"{name} {value}" for name, value in stages.items()))
    for name, shares in figures.get("padding_share", {}).items():
        if name != "lengths":
            print(
                f"padding, {name.replace('_', ' ')}: {shares['decoder_rows']:.1%} of the decoder rows, "
                f"{shares['source']:.1%} of the source"
            )
    if parsed.json:
        parsed.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def _up_to(highest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"give a number from 1 to {highest}")
        return int(text)

    return parse
