"""`python -m benchmarks data`: how fast one core makes batches, from the shards to tensors.

Documents are random tokens in shards as `launch/prepare_data.py` writes them. Measured is the loader's own
path (order, read with checksums, mask, collate) in one process, as a worker runs it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import cpu_threads, place, summary
from janus_ds.batch import Ragged, SpecialTokens
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import SampleSchedule
from janus_ds.data.stream.shards import ShardFormat, shard_name, write_shard
from janus_ds.errors import UsageError

_SPECIAL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=50264, vocab_size=50265)
SHAPES: dict[str, dict[str, Any]] = {
    "documents": {"task": "denoise", "tokens": 490, "batch": 64},
    # About 4,096 tokens of a side an update, as the NMT recipes have; --batch 30 is 800 tokens.
    "pairs": {"task": "pair", "tokens": 25, "batch": 150},
}
"""Defaults of the other options by `--shape`; lengths vary by a tenth."""


SHARED, ROUNDS = (), 7


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    add = parser.add_argument
    add("--shape", choices=sorted(SHAPES), default="documents", help="default: documents")
    add("--task", choices=("denoise", "pair"), help="documents or pairs")
    add("--tokens", type=_up_to(900), help="mean length of a document, or of each side")
    add("--preset", default="paper", help="objective preset (default: paper)")
    add("--batch", type=_up_to(4096), help="samples a step")
    add("--samples", type=_up_to(4096), default=4096, help="in a round (default: 4096)")


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Documents (or pairs) a second and core through read, mask and collate, by CPU time.

    Returns:
        the settings, `documents_per_second_per_core` with median, min and max over the rounds,
        `microseconds_per_document` by stage, and the wall-clock rate; hardware and versions.

    Raises:
        UsageError: the samples of a round do not make one step.
    """
    given = {name: getattr(options, name) or value for name, value in SHAPES[options.shape].items()}
    tokens, batch = given["tokens"], given["batch"]
    if options.samples < batch:
        what = f"{options.samples} samples do not make a step of {batch}"
        raise UsageError(what, "--samples, --batch", "give more samples, or a smaller batch")
    spread, draw = max(tokens // 10, 1), np.random.default_rng(1)
    lengths = {
        stream: np.maximum(draw.integers(tokens - spread, tokens + spread + 1, options.samples), 1)
        for stream in (("source", "target") if given["task"] == "pair" else ("target",))
    }
    with cpu_threads(1), tempfile.TemporaryDirectory() as folder:
        split = write_split(Path(folder), _SPECIAL, lengths)
        run = _run(DataConfig(task=given["task"], block_tokens=1022), options.preset, global_batch=batch)
        maker = BatchMaker(split, run, _SPECIAL)
        rounds = [_round(maker, options.samples // batch, epoch) for epoch in range(options.rounds + 1)][1:]
    measured = options.samples // batch * batch
    return {
        "task": given["task"],
        "preset": options.preset,
        "tokens": tokens,
        "samples_a_step": batch,
        "documents_per_second_per_core": _rates(measured, rounds, "total"),
        "documents_per_second_wall": _rates(measured, rounds, "wall"),
        "microseconds_per_document": {
            stage: round(summary([r[stage] for r in rounds], 1e6 / measured)["median"], 1)
            for stage in ("order", "read", "mask", "collate")
        },
        **{name: found for name, found in place(options).items() if name in ("hardware", "versions")},
    }


def describe(result: dict[str, Any]) -> str:
    """The result in three lines."""
    rate, stages = result["documents_per_second_per_core"], result["microseconds_per_document"]
    head = f"{result['preset']} / {result['task']}, about {result['tokens']} tokens"
    return (
        f"{head}, {result['samples_a_step']} a step\n"
        f"documents/s/core: median {rate['median']:,} (min {rate['min']:,}, max {rate['max']:,})\n"
        "microseconds a document: " + ", ".join(f"{name} {value}" for name, value in stages.items())
    )


def _rates(measured: int, rounds: Sequence[Mapping[str, float]], clock: str) -> dict[str, int]:
    return {name: round(value) for name, value in summary([measured / r[clock] for r in rounds]).items()}


def _round(maker: BatchMaker, steps: int, epoch: int) -> dict[str, float]:
    """CPU seconds of one epoch by stage, in all (`total`), and wall-clock seconds (`wall`)."""
    sizes, window = maker.source.parts[0].member_sizes, maker.config.data.shuffle_window
    schedule, batch = SampleSchedule(1, sizes, window), int(maker.config.train.global_batch)
    stages: dict[str, Callable[[dict[str, Any]], Any]] = {
        "order": lambda made: {**made, "parts": [schedule.between(made["begin"], made["begin"] + batch)]},
        "read": lambda made: maker.check(maker.read(made)),
        "mask": maker.mask,
        "collate": maker.collate,
    }
    spent = dict.fromkeys(stages, 0.0)
    wall, start = time.perf_counter(), time.process_time()
    for step in range(epoch * steps, (epoch + 1) * steps):
        made: Any = {"__key__": "bench", "step": step, "begin": step * batch}
        for stage, work in stages.items():
            before = time.process_time()
            made = work(made)
            spent[stage] += time.process_time() - before
    return {**spent, "total": time.process_time() - start, "wall": time.perf_counter() - wall}


def _run(data: DataConfig, preset: str, **train: Any) -> RunConfig:
    """A resolved run for sequences of up to 1,022 tokens."""
    model = ModelConfig(max_source_positions=1024, max_target_positions=1024)
    objective = ObjectiveConfig(preset=preset)
    return resolve(RunConfig(model=model, data=data, objective=objective, train=TrainConfig(**train)))


def write_split(folder: Path, special: SpecialTokens, lengths: Mapping[str, NDArray[np.int64]]) -> Path:
    """A split of random tokens in one shard: of each stream, samples of these lengths, (N,)."""
    draw = np.random.default_rng(2)
    samples = {}
    for stream, lengths_N in lengths.items():
        values = draw.integers(5, special.mask, int(lengths_N.sum())).astype(np.uint16)
        samples[stream] = Ragged.from_lengths(values, lengths_N)
    shard = write_shard(folder / shard_name(0), samples, ShardFormat("uint16"), 0)
    SplitIndex("uint16", tuple(lengths), (shard,)).save(folder)
    return folder


def _up_to(highest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= highest:
            raise argparse.ArgumentTypeError(f"give a number from 1 to {highest}")
        return int(text)

    return number
