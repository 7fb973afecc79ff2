"""A split of packed shards written from plain rows of tokens, without a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from janus_ds.batch import Ragged, SpecialTokens
from janus_ds.config.presets import resolve
from janus_ds.config.schema import (
    DataConfig,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
    TrainConfig,
)
from janus_ds.data.stream.index import INDEX_NAME, SplitIndex, SplitTotals
from janus_ds.data.stream.shards import ShardFormat, shard_name, write_shard
from janus_ds.io import sha256_of_file

SPECIAL = SpecialTokens(bos=0, pad=1, eos=2, unk=3, mask=4, vocab_size=500)
"""Every id from 5 on is an ordinary token."""


def random_rows(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Rows of 1 .. longest ordinary tokens."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, longest + 1, count)
    return [draw.integers(5, SPECIAL.vocab_size, n).tolist() for n in lengths]


def write_split(
    folder: Path,
    streams: dict[str, Sequence[Sequence[int]]],
    per_shard: int = 20,
    per_member: int = 4,
    stream_dtype: str = "uint16",
) -> Path:
    """Write shards and index of one split into `folder`; returns it."""
    folder.mkdir(parents=True)
    packing = ShardFormat(stream_dtype, samples_per_member=per_member)
    total = len(next(iter(streams.values())))
    entries, key = [], 0
    for number, start in enumerate(range(0, total, per_shard)):
        part = {name: Ragged.from_rows(rows[start : start + per_shard]) for name, rows in streams.items()}
        entries.append(write_shard(folder / shard_name(number), part, packing, key))
        key += len(entries[-1].members)
    SplitIndex(stream_dtype, tuple(sorted(streams)), tuple(entries)).save(folder)
    return folder


def totals(folder: Path) -> SplitTotals:
    """What a manifest says of a split."""
    index = SplitIndex.load(folder)
    return SplitTotals(len(index.shards), index.samples, index.tokens, sha256_of_file(folder / INDEX_NAME))


def flip(path: Path, place: int, bit: int = 1) -> None:
    """Change one bit of a byte; places before 0 count from the end."""
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(bytes(data))


def run_config(
    preset: str = "paper",
    task: str = "denoise",
    data: DataConfig | None = None,
    masking: MaskingConfig | None = None,
) -> RunConfig:
    """A resolved run for these data."""
    return resolve(
        RunConfig(
            model=ModelConfig(max_source_positions=64, max_target_positions=64),
            data=data or DataConfig(task=task, block_tokens=40, workers=0, shuffle_window=2, pad_multiple=4),
            objective=ObjectiveConfig(preset=preset),
            train=TrainConfig(global_batch=12, seed=3),
            masking=masking or MaskingConfig(),
        )
    )
