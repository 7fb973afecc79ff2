"""Pairs of token rows as one split of a data directory: what `prepare_pairs` and `prepare_glge` share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from janus_ds.data.counter_rng import Stream, keys, shuffled
from janus_ds.data.index import SplitTotals
from janus_ds.data.prepare_journal import SplitState
from janus_ds.data.prepare_splits import SplitWriter
from janus_ds.data.ragged import Ragged
from janus_ds.data.shards import Packing, token_dtype

__all__ = ["STREAMS", "EncodedPairs", "PairPacking", "joined", "paired", "write_split"]

STREAMS = ("source", "target")
"""The two sides of a sample, in the order in which pairs hold them."""


@dataclass(frozen=True)
class EncodedPairs:
    """A portion of pairs as token rows, and what was counted on the way."""

    samples: dict[str, Ragged]
    counts: Counter[str]


@dataclass(frozen=True)
class PairPacking:
    """How many samples go where, and the vocabulary that decides how wide a token is stored."""

    samples_per_member: int
    members_per_shard: int
    vocab_size: int


def paired(sides: Sequence[Sequence[list[int]]], kept: Sequence[int], vocab_size: int) -> dict[str, Ragged]:
    """The pairs with these numbers, of a row of tokens for each pair on each side."""
    dtype = np.dtype(token_dtype(vocab_size))
    return {
        name: Ragged.from_rows([rows[i] for i in kept], dtype)
        for name, rows in zip(STREAMS, sides, strict=True)
    }


def joined(parts: Sequence[dict[str, Ragged]]) -> dict[str, Ragged]:
    """Portions put together."""
    return {name: Ragged.concatenate([part[name] for part in parts]) for name in STREAMS}


def write_split(folder: Path, samples: dict[str, Ragged], packing: PairPacking) -> SplitTotals:
    """Write shards and index; training pairs are shuffled once, so that neighbours have nothing in common.

    Args:
        folder: of the split; its name is the split's.
        samples: as :func:`joined` gives them.
        packing: how.
    """
    if folder.name == "train":
        order = shuffled(keys(0, 0, 0, Stream.MEMBER_ORDER), len(samples["target"]))
        samples = {name: rows.take(order) for name, rows in samples.items()}
    form = Packing(token_dtype(packing.vocab_size), packing.samples_per_member, packing.members_per_shard)
    writer = SplitWriter(folder, form, SplitState())
    writer.add(samples)
    index, sha256 = writer.finish(STREAMS)
    return SplitTotals(len(index.shards), index.samples, index.tokens, sha256)
