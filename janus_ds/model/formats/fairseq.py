"""fairseq files of NMT JANUS and BART in and out; its names of weights, which Hugging Face's BART has, too.

Without the prefix `model.`, Hugging Face's BART has fairseq's names, but for the embedding table
(`shared.weight`) and its tied copies. Both begin their position tables with two rows that no position
uses.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.formats.foreign_files import read_torch_file, refuse_expanded, unknown_forms
from janus_ds.model.weights import check_weights, padded_vocab, parameter_shapes, refuse_too_many_layers

TABLE = "encoder.embed_tokens.weight"
_TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
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
_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LENGTH_HEAD = "length_head.weight"
_PAD, _UNK = 1, 3
_BART_HEAD_WIDTH = 64
_MOST_MADE_UP = 1024


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


def load_fairseq(
    path: str | Path, heads: int | None = None, vocab_size: int | None = None
) -> tuple[ModelConfig, SpecialTokens, dict[str, Tensor], ConversionReport]:
    """Read a fairseq checkpoint of an NMT JANUS model or of BART.

    Args:
        path: the file: a dict with the state dict under `model`, or a bare state dict.
        heads: attention heads, for files without `args` or `cfg`.
        vocab_size: symbols of the model's tokenizer, where it is known.

    Returns:
        the model's shape, its special symbols, the weights under our names, and a report.
    """
    where, notes = str(path), list[str]()
    with unknown_forms(where):
        state, settings = _read(Path(path))
        _refuse_other_kinds(state, settings, where)
        bart = "encoder.layernorm_embedding.weight" in state
        if bart and vocab_size is not None:
            _leave_out_made_up(state, vocab_size, notes)
        rows = state[TABLE].shape[0]
        # A fine-tuned BART may end just before <mask>, which its tokenizer has all the same.
        symbols = rows + 1 if bart and vocab_size == rows + 1 else rows
        special = SpecialTokens(0, _PAD, 2, _UNK, symbols - 1 if bart else _UNK, symbols)
        config = _shape(state, settings, _heads(state, settings, heads, where, notes))
        refuse_too_many_layers(config, len(state), where)
        weights, used = our_names(state)
        added = fill_up(weights, config, special, notes)
        check_weights(weights, parameter_shapes(config, special.vocab_size), where)
    ignored = tuple(name for name in state if name not in used and name not in _TIED)
    missing = tuple(name for name in _TIED if name not in state)
    report = ConversionReport(tuple(used), ignored, tuple(added), tuple(notes), missing)
    return config, special, weights, report


def to_fairseq(weights: Mapping[str, Tensor], special: SpecialTokens) -> dict[str, Tensor]:
    """The state dict that fairseq reads, from weights under our names.

    Rows that pad our embedding table are dropped; the unused first rows of fairseq's position tables are
    zeros.
    """
    state = their_names(weights, special.vocab_size)
    version = torch.tensor([3.0])
    return (
        state | dict.fromkeys(_TIED, state[TABLE]) | {"encoder.version": version, "decoder.version": version}
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and model settings of a file."""
    loaded = read_torch_file(path)
    loaded = loaded if isinstance(loaded, dict) else {}
    state = loaded.get("model", loaded)
    state = state if isinstance(state, dict) else {}
    state = {name: x for name, x in state.items() if isinstance(name, str) and isinstance(x, Tensor)}
    refuse_expanded(state, path)
    settings = _mapping(loaded.get("args")) or _mapping(_mapping(loaded.get("cfg")).get("model"))
    return state, settings


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return dict(value) if isinstance(value, dict) else {}


def _refuse_other_kinds(state: dict[str, Tensor], settings: dict[str, Any], where: str) -> None:
    """Models that our layers cannot express."""
    needed = (TABLE, *POSITION_TABLES, "decoder.layers.0.encoder_attn.q_proj.weight")
    missing = [name for name in needed if name not in state]
    fix = "convert files of NMT JANUS or of BART; others have no counterpart here"
    if missing:
        raise CheckpointError(
            f"this is no fairseq encoder-decoder with learned positions: {', '.join(missing)} not in it",
            where,
            fix,
        )
    if "encoder.layer_norm.weight" in state or settings.get("encoder_normalize_before"):
        raise CheckpointError("the model is pre-norm; JANUS and BART are post-norm", where, fix)
    refuse_untied(state, _TIED, TABLE, where, fix)


def _leave_out_made_up(state: dict[str, Tensor], vocab_size: int, notes: list[str]) -> None:
    """Cut the table to the tokenizer, <mask> last: fairseq's dictionaries go on with words without a meaning,
    that of bart.base with 936 of them, before <mask>."""
    table = state[TABLE]
    made_up = len(table) - vocab_size
    if 0 < made_up <= _MOST_MADE_UP:
        state[TABLE] = torch.cat([table[: vocab_size - 1], table[-1:]])
        notes.append(f"{TABLE}: {made_up} rows before <mask>, of words that the tokenizer lacks, left out")


def _heads(
    state: dict[str, Tensor], settings: dict[str, Any], given: int | None, where: str, notes: list[str]
) -> int:
    """Attention heads, which no shape tells; `given` where the file does not tell either."""
    found = {settings[k] for k in ("encoder_attention_heads", "decoder_attention_heads") if k in settings}
    if len(found) > 1:
        raise CheckpointError(
            f"encoder and decoder have different numbers of heads: {sorted(found)}",
            where,
            "only models with equal numbers can be converted",
        )
    if found and given not in (None, *found):
        raise CheckpointError(
            f"the file says that the model has {found.pop()} attention heads, not {given}",
            f"--heads {given}, {where}",
            "leave --heads out",
        )
    if found or given is not None:
        return int(given or found.pop())
    bart, width = "encoder.layernorm_embedding.weight" in state, state[TABLE].shape[1]
    if not bart or width % _BART_HEAD_WIDTH:
        odd = f", and its width {width} is no multiple of {_BART_HEAD_WIDTH}, as every BART's is"
        raise CheckpointError(
            f"the file does not say how many attention heads the model has{odd if bart else ''}",
            f"{where}: args.encoder_attention_heads",
            "give the number of heads (convert --heads N)",
        )
    heads = width // _BART_HEAD_WIDTH
    notes.append(f"heads: {heads} assumed (width / {_BART_HEAD_WIDTH}, as in every BART)")
    return heads


def _shape(state: dict[str, Tensor], settings: dict[str, Any], heads: int) -> ModelConfig:
    """The model section, from shapes, and from the settings where shapes do not tell."""
    bart = "encoder.layernorm_embedding.weight" in state
    layers = {"encoder": 0, "decoder": 0}
    for name in state:
        if match := _LAYER.fullmatch(name):
            layers[match[1]] = max(layers[match[1]], int(match[2]) + 1)
    dropout = float(settings.get("dropout", 0.1))
    length = state.get("decoder.embed_length.weight")
    return ModelConfig(
        d_model=state[TABLE].shape[1],
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        ffn_dim=state["encoder.layers.0.fc1.weight"].shape[0],
        heads=heads,
        activation=str(settings.get("activation_fn", "gelu" if bart else "relu")),
        max_source_positions=state[POSITION_TABLES[0]].shape[0] - POSITION_OFFSET,
        max_target_positions=state[POSITION_TABLES[1]].shape[0] - POSITION_OFFSET,
        layernorm_embedding=bart,
        scale_embedding=not settings.get("no_scale_embedding", bart),
        dropout=dropout,
        attention_dropout=float(settings.get("attention_dropout", dropout if bart else 0.0)),
        activation_dropout=float(settings.get("activation_dropout", 0.0)),
        length_classes=None if length is None else length.shape[0],
    )


# Names, and what files lack: for Hugging Face's as well


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
    match = _LAYER.fullmatch(name)
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
