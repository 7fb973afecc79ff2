"""fairseq files in and out: NMT JANUS and BART."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.formats.bart_names import (
    LAYER,
    POSITION_OFFSET,
    POSITION_TABLES,
    TABLE,
    TIED,
    ConversionReport,
    fill_up,
    our_names,
    refuse_untied,
    their_names,
)
from janus_ds.model.formats.foreign_files import read_torch_file, refuse_expanded, unknown_forms
from janus_ds.model.weights import check_weights, parameter_shapes, refuse_too_many_layers

_PAD, _UNK = 1, 3
_BART_HEAD_WIDTH = 64


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
    with unknown_forms(str(path)):
        return _convert(Path(path), heads, vocab_size)


def _convert(
    path: Path, heads: int | None, vocab_size: int | None
) -> tuple[ModelConfig, SpecialTokens, dict[str, Tensor], ConversionReport]:
    where = str(path)
    state, settings = _read(path)
    _refuse_other_kinds(state, settings, where)
    bart = "encoder.layernorm_embedding.weight" in state
    rows = state[TABLE].shape[0]
    # A fine-tuned BART may end just before <mask>, which its tokenizer has all the same.
    symbols = rows + 1 if bart and vocab_size == rows + 1 else rows
    special = SpecialTokens(0, _PAD, 2, _UNK, symbols - 1 if bart else _UNK, symbols)
    notes: list[str] = []
    config = _shape(state, settings, heads or _heads(state, settings, where, notes))
    refuse_too_many_layers(config, len(state), where)
    weights, used = our_names(state)
    added = fill_up(weights, config, special, notes)
    check_weights(weights, parameter_shapes(config, special.vocab_size), where)
    ignored = tuple(name for name in state if name not in used and name not in TIED)
    missing = tuple(name for name in TIED if name not in state)
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
        state | dict.fromkeys(TIED, state[TABLE]) | {"encoder.version": version, "decoder.version": version}
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
    refuse_untied(state, TIED, TABLE, where, fix)


def _heads(state: dict[str, Tensor], settings: dict[str, Any], where: str, notes: list[str]) -> int:
    """Attention heads, which no shape tells."""
    found = {settings[k] for k in ("encoder_attention_heads", "decoder_attention_heads") if k in settings}
    if len(found) == 1:
        return int(found.pop())
    if found:
        raise CheckpointError(
            f"encoder and decoder have different numbers of heads: {sorted(found)}",
            where,
            "only models with equal numbers can be converted",
        )
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
        if match := LAYER.fullmatch(name):
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
