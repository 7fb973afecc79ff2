"""`python -m janus_ds inspect DIR --sample N`: a sample as the model sees it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from janus_ds.config.load import add_recipe_arguments, load_run_config
from janus_ds.data.stream.batch_maker import BatchMaker
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.data.stream.source import MixedSource
from janus_ds.data.text.tokenizer import Tokenizer
from janus_ds.data.views import Views
from janus_ds.errors import UsageError
from janus_ds.tools.common import new_parser, recipe_path
from janus_ds.tools.picture import picture_of

__all__ = ["describe_views", "main"]


def main(arguments: Sequence[str]) -> int:
    """Print tokens, both masked views and the rows of one sample."""
    parsed = _parser().parse_args(arguments)
    place = open_data(parsed.data, load_run_config(None, parsed.overrides).data)
    overrides = [f"data.task={place.manifest.task}"]
    blocks = [int(manifest.settings.get("block_tokens", 0)) for manifest in place.manifests]
    if parsed.recipe is None and all(blocks):
        overrides.append(f"data.block_tokens={max(blocks)}")
    overrides += parsed.overrides
    run = load_run_config(recipe_path(parsed.recipe), overrides)
    tokenizer = place.tokenizer
    maker = BatchMaker(place.split(parsed.split), run, tokenizer.special)
    if not maker.source.has(parsed.sample):
        last = int(maker.source.samples) - 1
        mixed = isinstance(maker.source, MixedSource)
        raise UsageError(
            f"there is no sample {parsed.sample}",
            maker.source.name,
            "give SOURCE x 2^40 + the number in that source" if mixed else f"give a number from 0 to {last}",
        )
    epochs, ids = np.array([[parsed.epoch]]), np.array([[parsed.sample]])
    views = maker.views(epochs[0], ids[0])
    batch = maker.batches(epochs, ids)[0]
    picture = picture_of(batch, parsed.positions)
    pieces = _Pieces(tokenizer)
    print(f"sample {parsed.sample} of {parsed.split}, epoch {parsed.epoch}, seed {run.train.seed}")
    print(f"from {maker.source.origin(parsed.sample)}")
    print(f"objective {run.objective.preset}, masking {run.masking.target}\n")
    print(describe_views(views, pieces))
    print(f"\nrows up to position {parsed.positions - 1}, of {batch.layout.rows} in all\n")
    print(picture.text(pieces))
    if parsed.png:
        picture.save_image(parsed.png)
        print(f"\nwritten: {parsed.png}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = new_parser("inspect", "A sample as the model sees it: tokens, masked views, who sees whom.")
    parser.add_argument("data", metavar="DIR", help="made by launch/prepare_data.py; or as data.path")
    parser.add_argument("--sample", type=int, required=True, metavar="N", help="number of the sample")
    parser.add_argument("--split", default="train", help="train, valid or test (default: train)")
    parser.add_argument("--epoch", type=int, default=0, help="masks differ from epoch to epoch (default: 0)")
    parser.add_argument("--positions", type=int, default=10, help="tokens in the picture (default: 10)")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the picture as an image too")
    add_recipe_arguments(parser)
    return parser


class _Pieces(dict[int, str]):
    """How tokens are written, decoded when first asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        special = tokenizer.special
        named = {special.bos: "<s>", special.pad: "<pad>", special.eos: "</s>", special.unk: "<unk>"}
        super().__init__(named | {special.mask: "<mask>"})
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        # Space and control characters would break the columns.
        text = self._tokenizer.decode([token]).strip()
        self[token] = text if text.isprintable() and text else f"#{token}"
        return self[token]


def describe_views(views: Views, pieces: dict[int, str]) -> str:
    """What the encoder gets, and the target with its masked tokens in brackets."""
    source, target = views.source.row(0).tolist(), views.target.row(0).tolist()
    shown = [f"[{pieces[t]}]" if m else pieces[t] for t, m in zip(target, views.masked, strict=True)]
    rows = [f"{p:>5} {t:>7}  {word}" for p, (t, word) in enumerate(zip(target, shown, strict=True))]
    masked = int(views.masked.sum())
    return "\n".join(
        [
            f"source, {len(source)} tokens:",
            "  " + " ".join(pieces[token] for token in source),
            f"target, {len(target)} tokens, {masked} of them masked (in brackets):",
            "  " + " ".join(shown),
            "position, token and piece of the target:",
            *rows,
        ]
    )
