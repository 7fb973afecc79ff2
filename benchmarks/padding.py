"""How much of the rows that a training step computes is padding: counted, not timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from janus_ds.batch import SpecialTokens, TwoStreamBatch
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig, TrainConfig
from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.stream.batch_maker import BatchMaker
from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.shards import Packing, shard_name, write_shard
from janus_ds.data.stream.step_plan import RankShare, make_step_plan
from janus_ds.stream_mask import Segment

__all__ = ["PaddingBench", "padding_share", "padding_shares", "write_sentences"]

_STEPS = 48
_MULTIPLES = (8, 4, 2, 1)


@dataclass(frozen=True)
class PaddingBench:
    """The pairs whose batches are counted."""

    split: Path
    """Folder of a prepared split of pairs, for example DATA/train."""
    special: SpecialTokens
    """Special symbols of its tokenizer."""
    preset: str = "paper"
    """Objective preset."""

    def run(self, batch: str, pad_multiple: int, pack_rows: bool = False) -> RunConfig:
        """Updates of 4,096 tokens in two groups of like length, or of 160 samples as they come; resolved."""
        data = DataConfig(
            task="pair",
            batch=batch,
            block_tokens=1022,
            pad_multiple=pad_multiple,
            pack_rows=pack_rows,
            shuffle_window=1024,
        )
        run = RunConfig(
            model=ModelConfig(max_source_positions=1024, max_target_positions=1024),
            data=data,
            objective=ObjectiveConfig(preset=self.preset),
            train=TrainConfig(batch_tokens=4096, batch_groups=2, global_batch=160),
        )
        return resolve(run)

    def maker(self, batch: str, pad_multiple: int, pack_rows: bool = False) -> BatchMaker:
        """Makes the batches of :meth:`run`."""
        return BatchMaker(self.split, self.run(batch, pad_multiple, pack_rows), self.special)


def padding_shares(bench: PaddingBench) -> dict[str, dict[str, float]]:
    """:func:`padding_share` of samples of like length by `data.pad_multiple`, and of samples as they come."""
    shares = {
        f"like_length_pad_multiple_{multiple}": padding_share(bench.maker("tokens", multiple), 2)
        for multiple in _MULTIPLES
    }
    return shares | {"as_they_come": padding_share(bench.maker("samples", min(_MULTIPLES)), 1)}


def padding_share(maker: BatchMaker, micro_batches: int) -> dict[str, float]:
    """Share of padding among decoder rows and source columns, over steps spread evenly over an epoch.

    Args:
        maker: of the batches.
        micro_batches: of a step, as the run would have.
    """
    plan = make_step_plan(maker, RankShare(0, 1, 80, micro_batches))
    steps = np.unique(np.linspace(0, max(plan.steps_per_epoch - 1, 0), _STEPS).astype(int))
    computed = needed = columns = tokens = 0
    for step in steps.tolist():
        for batch in maker.micro_batches(plan.parts(step)):
            computed += batch.row_token_BR.numel()
            needed += _real_rows(batch)
            columns += batch.source_BS.numel()
            tokens += batch.counts.source_tokens
    return {
        "decoder_rows": round(1 - needed / computed, 4),
        "source": round(1 - tokens / columns, 4),
        "steps": float(len(steps)),
    }


def _real_rows(batch: TwoStreamBatch) -> int:
    """Decoder rows that are no padding."""
    return sum(int(batch.row_length_B(s).sum()) for s in Segment if batch.layout.width(s))


def write_sentences(folder: Path, special: SpecialTokens, samples: int = 16_384) -> Path:
    """A split of random pairs whose lengths vary as those of sentences do: log-normal, median 21, sigma .55.

    The source's length is the target's, times a log-normal factor of sigma .2.
    """
    draw = np.random.default_rng(1)
    target_N = _clipped(21 * np.exp(draw.normal(0, 0.55, samples)))
    source_N = _clipped(target_N * np.exp(draw.normal(0, 0.2, samples)))
    rows = {}
    for stream, lengths_N in (("source", source_N), ("target", target_N)):
        values = draw.integers(5, special.mask, int(lengths_N.sum())).astype(np.uint16)
        rows[stream] = Ragged.from_lengths(values, lengths_N)
    shard = write_shard(folder / shard_name(0), rows, Packing("uint16"), 0)
    SplitIndex("uint16", ("source", "target"), (shard,)).save(folder)
    return folder


def _clipped(lengths_N: NDArray[Any]) -> NDArray[np.int64]:
    return np.clip(np.round(lengths_N), 1, 175).astype(np.int64)
