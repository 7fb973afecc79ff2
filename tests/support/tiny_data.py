"""A data directory of a few hundred short sentences, made in a second, for runs of a few steps."""

from __future__ import annotations

import random
from pathlib import Path

from janus_ds.data.prepare.train_tokenizer import train_sentencepiece
from janus_ds.data.stream.index import Manifest
from tests.support.packed_data import totals, write_split

TINY_RECIPE = """
name: tiny
model: {d_model: 32, encoder_layers: 1, decoder_layers: 2, ffn_dim: 64, heads: 2, vocab_multiple: 8,
  max_source_positions: 64, max_target_positions: 64}
data: {block_tokens: 48, workers: 0, shuffle_window: 2}
optim: {lr: 2.0e-3, warmup_steps: 5}
train: {global_batch: 8, max_steps: 20, valid_every: 10, valid_samples: 11, save_every: 10, keep_last: 2}
decode: {iterations: 1, length_beam: 2, beam: 2, max_length: 12}
"""
"""A model of 40,000 parameters, dropout on."""

_WHO = ["the old man", "a small child", "my friend", "the captain", "nobody", "her sister"]
_DID = ["saw", "followed", "heard", "remembered", "lost", "carried"]
_WHAT = ["the river", "a lamp", "the long road", "an open door", "three letters", "the sea"]
_WHEN = ["at night", "in the morning", "before the war", "with great care", "again", "for a year"]


def make_tiny_data(folder: Path, samples: int = 300, train_shards: int = 2) -> Path:
    """Write train and valid splits and a tokenizer into `folder`; the same bytes every time."""
    texts = sentences(samples)
    tokenizer = train_sentencepiece(texts, "unigram", 60)
    tokenizer.save(folder / "tokenizer")
    rows = tokenizer.encode_batch(texts)
    held_out = samples // 10
    splits = {}
    for name, part, shards in (("train", rows[held_out:], train_shards), ("valid", rows[:held_out], 1)):
        split = write_split(folder / name, {"target": part}, -(-len(part) // shards), per_member=32)
        splits[name] = totals(split)
    settings = {"block_tokens": 48}
    Manifest("denoise", tokenizer.fingerprint, tokenizer.special.vocab_size, settings, splits).save(folder)
    return folder


def sentences(count: int) -> list[str]:
    """Short sentences, the same every time."""
    draw = random.Random(7)
    return [_sentence(draw) for _ in range(count)]


def _sentence(draw: random.Random) -> str:
    parts = [draw.choice(words) for words in (_WHO, _DID, _WHAT, _WHEN)]
    return " ".join(parts[: draw.choice((3, 4))]) + " ."
