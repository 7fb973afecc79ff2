"""fairseq files in and out: NMT JANUS and BART (method section 7).

Nothing in a file is executed: it is read with `torch.load(weights_only=True)`, which admits tensors and
plain containers, and beside them the inert `argparse.Namespace` in which fairseq keeps its arguments.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.weights import check_weights, load_weights, padded_vocab, parameter_shapes

__all__ = ["ConversionReport", "load_fairseq", "load_weights", "to_fairseq"]

_TOP = {
    "encoder.embed_tokens.weight": "embedding.weight",
    "encoder.embed_positions.weight": "encoder.positions.weight",
    "encoder.layernorm_embedding.weight": "encoder.embedding_norm.weight",
    "encoder.layernorm_embedding.bias": "encoder.embedding_norm.bias",
    "decoder.embed_positions.weight": "decoder.positions.weight",
    "decoder.layernorm_embedding.weight": "decoder.embedding_norm.weight",
    "decoder.layernorm_embedding.bias": "decoder.embedding_norm.bias",
    "decoder.embed_length.weight": "length_head.weight",
}
_TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")
_POSITIONS = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
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
_PAD, _UNK = 1, 3
_OFFSET = _PAD + 1
"""fairseq's position tables start with rows that no position uses: position p is row p + pad + 1."""
_BART_HEAD_WIDTH = 64


@dataclass(frozen=True)
class ConversionReport:
    """What became of a file's weights."""

    used: tuple[str, ...]
    """Names in the file whose values were taken."""
    ignored: tuple[str, ...]
    """Names in the file that the model has no place for."""
    added: tuple[str, ...]
    """Our names that the file lacks, filled with fresh values."""
    notes: tuple[str, ...]
    """What was assumed or filled up, in words."""


def load_fairseq(
    path: str | Path, heads: int | None = None
) -> tuple[ModelConfig, SpecialTokens, dict[str, Tensor], ConversionReport]:
    """Read a fairseq checkpoint of an NMT JANUS model or of BART.

    Args:
        path: the file: a dict with the state dict under `model`, or a bare state dict.
        heads: attention heads, for files without `args` or `cfg`.

    Returns:
        the model's shape, its special symbols, the weights under our names, and a report.

    Raises:
        CheckpointError: the file is missing, damaged, wants code to be run, or holds another kind of model.
    """
    where = str(path)
    state, settings = _read(Path(path))
    _refuse_other_kinds(state, settings, where)
    bart = "encoder.layernorm_embedding.weight" in state
    vocab_size = state["encoder.embed_tokens.weight"].shape[0]
    special = SpecialTokens(0, _PAD, 2, _UNK, vocab_size - 1 if bart else _UNK, vocab_size)
    notes: list[str] = []
    config = _shape(state, settings, heads or _heads(state, settings, where, notes))
    weights, used = _our_names(state)
    added = _fill_up(weights, config, vocab_size, notes)
    check_weights(weights, parameter_shapes(config, vocab_size), where)
    ignored = tuple(name for name in state if name not in used and name not in _TIED)
    return config, special, weights, ConversionReport(tuple(used), ignored, tuple(added), tuple(notes))


def to_fairseq(weights: Mapping[str, Tensor], special: SpecialTokens) -> dict[str, Tensor]:
    """The state dict that fairseq reads, from weights under our names.

    Rows that pad our embedding table are dropped; the unused first rows of fairseq's position tables are
    zeros.
    """
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        theirs = _fairseq_name(name)
        if theirs in _POSITIONS:
            value = torch.cat([value.new_zeros(_OFFSET, value.shape[1]), value])
        elif name == "embedding.weight":
            value = value[: special.vocab_size]
            state |= dict.fromkeys(_TIED, value)
        state[theirs] = value
    version = torch.tensor([3.0])
    return state | {"encoder.version": version, "decoder.version": version}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and model settings of a file, read without executing anything in it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("there is no such file", str(path), "check the path") from None
    except pickle.UnpicklingError as error:
        raise _refused(error, path) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"the file cannot be read: {reason}", str(path), "fetch or copy the file again"
        ) from None
    loaded = loaded if isinstance(loaded, dict) else {}
    state = loaded.get("model", loaded)
    state = {name: x for name, x in state.items() if isinstance(x, Tensor)} if isinstance(state, dict) else {}
    settings = _mapping(loaded.get("args")) or _mapping(_mapping(loaded.get("cfg")).get("model"))
    return state, settings


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        return vars(value)
    return dict(value) if isinstance(value, dict) else {}


def _refused(error: Exception, path: Path) -> CheckpointError:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    if found is None:
        return CheckpointError("the file is not a torch checkpoint", str(path), "fetch or copy it again")
    return CheckpointError(
        f"the file refers to {found[1]}, which would have to be imported and run",
        str(path),
        "on a machine where you trust the file, load it with fairseq, and save a dict of its `model` "
        "and of `args`, an argparse.Namespace with encoder_attention_heads and the like",
    )


def _refuse_other_kinds(state: dict[str, Tensor], settings: dict[str, Any], where: str) -> None:
    """Models that our layers cannot express."""
    needed = ("encoder.embed_tokens.weight", *_POSITIONS, "decoder.layers.0.encoder_attn.q_proj.weight")
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
    for name in _TIED:
        if name in state and not torch.equal(state[name], state["encoder.embed_tokens.weight"]):
            raise CheckpointError(f"{name} is not tied to encoder.embed_tokens.weight", where, fix)


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
    if "encoder.layernorm_embedding.weight" not in state:
        raise CheckpointError(
            "the file does not say how many attention heads the model has",
            f"{where}: args.encoder_attention_heads",
            "give the number of heads (convert --heads N)",
        )
    heads = state["encoder.embed_tokens.weight"].shape[1] // _BART_HEAD_WIDTH
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
        d_model=state["encoder.embed_tokens.weight"].shape[1],
        encoder_layers=layers["encoder"],
        decoder_layers=layers["decoder"],
        ffn_dim=state["encoder.layers.0.fc1.weight"].shape[0],
        heads=heads,
        activation=str(settings.get("activation_fn", "gelu" if bart else "relu")),
        max_source_positions=state[_POSITIONS[0]].shape[0] - _OFFSET,
        max_target_positions=state[_POSITIONS[1]].shape[0] - _OFFSET,
        layernorm_embedding=bart,
        scale_embedding=not settings.get("no_scale_embedding", bart),
        dropout=dropout,
        attention_dropout=float(settings.get("attention_dropout", dropout if bart else 0.0)),
        activation_dropout=float(settings.get("activation_dropout", 0.0)),
        length_classes=None if length is None else length.shape[0],
    )


def _our_names(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under our names, and the names in the file that they came from."""
    weights, used = {}, []
    for name, value in state.items():
        ours = _TOP.get(name) or _layer_name(name)
        if ours is None:
            continue
        rows = value[_OFFSET:] if name in _POSITIONS else value
        weights[ours] = rows.float().clone()
        used.append(name)
    return weights, used


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


def _fill_up(weights: dict[str, Tensor], config: ModelConfig, vocab_size: int, notes: list[str]) -> list[str]:
    """Add what the file lacks and our model has; gives the names that were added."""
    table = weights["embedding.weight"]
    rows = padded_vocab(config, vocab_size) - vocab_size
    if rows:
        weights["embedding.weight"] = torch.cat([table, table.new_zeros(rows, table.shape[1])])
        notes.append(f"embedding.weight: {rows} rows of zeros beyond the vocabulary of {vocab_size}")
    if "length_head.weight" in weights:
        return []
    generator = torch.Generator().manual_seed(0)
    fresh = torch.empty(config.max_target_positions, config.d_model)
    weights["length_head.weight"] = fresh.normal_(0.0, config.init_std, generator=generator)
    notes.append("length_head.weight: drawn at random, to be trained (BART files have none)")
    return ["length_head.weight"]
