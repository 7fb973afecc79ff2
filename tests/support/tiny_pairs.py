"""A small language pair made by rule: the target says the source's words in other words and order."""

from __future__ import annotations

import random
from pathlib import Path

from janus_ds.data.prepare.pair_files import PairFiles
from janus_ds.data.prepare.pairs import prepare_pairs
from janus_ds.data.prepare.settings import Languages, PairSettings
from janus_ds.data.prepare.writing import PrepareReport

TINY_PAIR_RECIPE = """
name: tiny_pairs
model: {d_model: 32, encoder_layers: 1, decoder_layers: 2, ffn_dim: 64, heads: 2, vocab_multiple: 8,
  max_source_positions: 48, max_target_positions: 48, dropout: 0.0, attention_dropout: 0.0}
data: {task: pair, batch: tokens, block_tokens: 40, workers: 0, shuffle_window: 64, pad_multiple: 4}
optim: {lr: 5.0e-3, warmup_steps: 10}
train: {batch_tokens: 320, batch_groups: 2, max_steps: 30, valid_every: 10, valid_samples: 20, save_every: 10,
  keep_last: 3, valid_bleu: "ar,nar", valid_bleu_samples: 12, keep_best: ar}
decode: {iterations: 1, length_beam: 2, beam: 2, max_length: 12}
"""

_WHO = {"der mann": "the man", "ein kind": "a child", "die frau": "the woman", "mein freund": "my friend"}
_DID = {"sieht": "sees", "hört": "hears", "kennt": "knows", "sucht": "looks for"}
_WHAT = {
    "den fluss": "the river",
    "eine lampe": "a lamp",
    "drei briefe": "three letters",
    "nichts": "nothing",
}
_WHEN = {"heute": "today", "nachts": "at night", "oft": "often", "": ""}


def tiny_lines(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Pairs such as "heute sieht der mann den fluss ." and "the man sees the river today ."."""
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        who, did, what, when = (draw.choice(list(table)) for table in (_WHO, _DID, _WHAT, _WHEN))
        source = " ".join([when, did, who, what, "."]).strip()
        target = " ".join([_WHO[who], _DID[did], _WHAT[what], _WHEN[when], "."]).replace("  ", " ")
        pairs.append((source, target))
    return pairs


def make_tiny_pairs(folder: Path, count: int = 200) -> dict[str, list[PairFiles]]:
    """Write train, valid and test files; the same bytes every time."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for seed, (split, size) in enumerate({"train": count, "valid": 24, "test": 16}.items()):
        lines = tiny_lines(size, seed)
        pair = PairFiles(folder / f"{split}.de", folder / f"{split}.en")
        for path, side in ((pair.source, 0), (pair.target, 1)):
            path.write_text("".join(f"{line[side]}\n" for line in lines), encoding="utf-8")
        files[split] = [pair]
    return files


def prepare_tiny(folder: Path, count: int = 200) -> PrepareReport:
    """The data directory `folder`/data of these files."""
    settings = PairSettings(Languages("de", "en"), vocab_size=60, max_tokens=40, duplicates="keep")
    return prepare_pairs(make_tiny_pairs(folder / "text", count), folder / "data", settings)
