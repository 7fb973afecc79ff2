"""What fairseq and Hugging Face call the weights of an encoder-decoder, and what we call them.

Without the prefix `model.`, Hugging Face's BART has fairseq's names, but for the embedding table
(`shared.weight`) and its tied copies. Both begin their position tables with two rows that no position
uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.weights import padded_vocab

TABLE = "encoder.embed_tokens.weight"
TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
"""Copies of the embedding table in fairseq's names."""
POSITION_TABLES = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
POSITION_OFFSET = 2
"""Position p is row p + 2 of a position table (fairseq: p + pad + 1)."""
_TOP = {
    TABLE: "embedding.weight",
    POSITION_TABLES[0]: "encoder.positions.weight",
    "encoder.layernorm_embedding.weight": "encoder.embedding_norm.weight",
    "encoder.layernorm_embedding.bias": "encoder.embedding_norm.bias",
    POSITION_TABLES[1]: "decoder.positions.weight",
    "decoder.layernorm_embedding.weight": "decoder.embedding_norm.weight",
    "decoder.layernorm_embedding.bias": "decoder.embedding_norm.bias",
    "decoder.embed_length.weight": "length_head.weight",
}
_IN_LAYER = {
    **{f"self_attn.{x}_proj": f"self_attention.{x}" for x in ("q", "k", "v", "out")},
    **{f"encoder_attn.{x}_proj": f"cross_attention.{x}" for x in ("q", "k", "v", "out")},
    "self_attn_layer_norm": "self_attention_norm",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "fc1": "fc1",
    "fc2": "fc2",
    "final_layer_norm": "ffn_norm",
}
LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LENGTH_HEAD = "length_head.weight"


@dataclass(frozen=True)
class ConversionReport:
    """What became of a file's weights."""

    used: tuple[str, ...]
    """Names in the file whose values were taken."""
    ignored: tuple[str, ...]
    """Names in the file that have no place in the result."""
    added: tuple[str, ...]
    """Names of the result that the file lacks, filled with fresh values."""
    notes: tuple[str, ...]
    """What was assumed or filled up, in words."""
    missing: tuple[str, ...] = ()
    """Names that files of this kind have and this one lacks, without harm: copies of a tied table."""

    def lines(self) -> list[str]:
        """The report for people; names that were used are only counted."""
        return [
            f"used      {len(self.used)} tensors of the file",
            *(f"ignored   {name}" for name in self.ignored),
            *(f"missing   {name}" for name in self.missing),
            *(f"added     {name}" for name in self.added),
            *(f"note      {note}" for note in self.notes),
        ]


def our_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names as fp32, and the names in the file that they came from."""
    weights, used = {}, []
    for name, value in state.items():
        ours = _TOP.get(name) or _layer_name(name)
        if ours is None:
            continue
        rows = value[POSITION_OFFSET:] if name in POSITION_TABLES else value
        weights[ours] = rows.float().clone()
        used.append(name)
    return weights, used


def their_names(weights: Mapping[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Weights under fairseq's names, without copies of the table.

    Rows that pad our embedding table are dropped; the unused first rows of position tables are zeros.
    """
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        theirs = _fairseq_name(name)
        if theirs in POSITION_TABLES:
            value = torch.cat([value.new_zeros(POSITION_OFFSET, value.shape[1]), value])
        state[theirs] = value[:vocab_size] if theirs == TABLE else value
    return state


def refuse_untied(
    state: Mapping[str, Tensor], names: Iterable[str], table: str, where: str, fix: str
) -> None:
    """Refuse a model whose output layer or decoder embedding is not the embedding table.

    Raises:
        CheckpointError: one of the names holds other values than the table.
    """
    for name in names:
        if name in state and not torch.equal(state[name], state[table]):
            raise CheckpointError(f"{name} is not tied to {table}", where, fix)


def fill_up(
    weights: dict[str, Tensor], config: ModelConfig, special: SpecialTokens, notes: list[str]
) -> list[str]:
    """Add what a file lacks and our model has, in place; gives the names that were added.

    That is a row for `<mask>` where the table ends just before it, rows that pad the table, and the
    length head.
    """
    added = []
    generator = torch.Generator().manual_seed(0)
    table = weights["embedding.weight"]
    if table.shape[0] + 1 == special.vocab_size and special.mask == table.shape[0]:
        fresh = torch.empty(1, table.shape[1]).normal_(0.0, config.init_std, generator=generator)
        table = torch.cat([table, fresh])
        added.append(f"embedding.weight[{special.mask}] (<mask>)")
        notes.append(f"<mask> has id {special.mask}; its row is drawn at random, to be trained")
    rows = padded_vocab(config, special.vocab_size) - table.shape[0]
    if rows:
        notes.append(f"embedding.weight: {rows} rows of zeros beyond the vocabulary of {special.vocab_size}")
    weights["embedding.weight"] = torch.cat([table, table.new_zeros(rows, table.shape[1])])
    if _LENGTH_HEAD not in weights:
        classes = config.length_classes or config.max_target_positions
        fresh = torch.empty(classes, config.d_model)
        weights[_LENGTH_HEAD] = fresh.normal_(0.0, config.init_std, generator=generator)
        added.append(_LENGTH_HEAD)
        notes.append(f"{_LENGTH_HEAD}: drawn at random, to be trained (BART files have none)")
    return added


def _layer_name(name: str) -> str | None:
    match = LAYER.fullmatch(name)
    ours = _IN_LAYER.get(match[3]) if match else None
    return f"{match[1]}.layers.{match[2]}.{ours}.{match[4]}" if match and ours else None


def _fairseq_name(name: str) -> str:
    """The fairseq name of one of ours."""
    for theirs, ours in _TOP.items():
        if ours == name:
            return theirs
    side, layers, number, *middle, kind = name.split(".")
    theirs = {ours: theirs for theirs, ours in _IN_LAYER.items()}[".".join(middle)]
    return f"{side}.{layers}.{number}.{theirs}.{kind}"
