"""A run as `BartForConditionalGeneration`: its configuration, search settings and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig, RunConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.formats.bart_names import POSITION_OFFSET, POSITION_TABLES, TABLE, their_names
from janus_ds.model.formats.hf_import import BIAS, PREFIX, SHARED


def export_config(run: RunConfig, special: SpecialTokens) -> dict[str, Any]:
    """`config.json` of a run's model.

    Raises:
        CheckpointError: a shape that Hugging Face's BART cannot have.
    """
    model = run.model
    if not model.layernorm_embedding:
        raise CheckpointError(
            "the model has no layer norm after the embeddings; Hugging Face's BART always has one",
            "model.layernorm_embedding",
            "export models of BART's shape, or write a fairseq file (--to fairseq)",
        )
    return {
        "architectures": ["BartForConditionalGeneration"],
        "model_type": "bart",
        "activation_function": model.activation,
        "d_model": model.d_model,
        **{f"{side}_ffn_dim": model.ffn_dim for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": model.heads for side in ("encoder", "decoder")},
        "encoder_layers": model.encoder_layers,
        "decoder_layers": model.decoder_layers,
        "num_hidden_layers": model.encoder_layers,
        "dropout": model.dropout,
        "attention_dropout": model.attention_dropout,
        "activation_dropout": model.activation_dropout,
        "init_std": model.init_std,
        "max_position_embeddings": _positions(model),
        "scale_embedding": model.scale_embedding,
        # Tools that know older versions of transformers ask for these two (CTranslate2 does).
        "normalize_before": False,
        "normalize_embedding": True,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "vocab_size": special.vocab_size,
        "bos_token_id": special.bos,
        "pad_token_id": special.pad,
        "eos_token_id": special.eos,
        "decoder_start_token_id": _start_token(run, special),
        "forced_eos_token_id": special.eos,
        "dtype": "float32",
        "use_cache": True,
    }


def export_generation(run: RunConfig, special: SpecialTokens) -> dict[str, Any]:
    """`generation_config.json` that searches as our own beam search with `beam_stop: transformers`."""
    bart = run.objective.decoder_start == "eos_bos"
    # Ours counts inner tokens; theirs the start token, bos and eos as well.
    longest = run.model.max_target_positions + (1 if bart else 0)
    if run.decode.max_length:
        longest = min(longest, run.decode.max_length + (3 if bart else 2))
    return {
        "bos_token_id": special.bos,
        "pad_token_id": special.pad,
        "eos_token_id": special.eos,
        "decoder_start_token_id": _start_token(run, special),
        **({"forced_bos_token_id": special.bos} if bart else {}),
        "forced_eos_token_id": special.eos,
        # A trained model does not write them, an untrained one may.
        "bad_words_ids": [[token] for token in (special.bos, special.pad, special.unk, special.mask)],
        "num_beams": run.decode.beam,
        "length_penalty": run.decode.length_penalty,
        "early_stopping": run.decode.early_stopping,
        "max_length": longest,
    }


def export_weights(weights: Mapping[str, Tensor], model: ModelConfig, vocab_size: int) -> dict[str, Tensor]:
    """Weights as `BartForConditionalGeneration` saves them: the table once, since it is tied."""
    kept = {name: value for name, value in weights.items() if name != "length_head.weight"}
    state = {}
    for name, value in their_names(kept, vocab_size).items():
        if name in POSITION_TABLES:
            # Theirs has one size for both tables; positions that ours lacks are zeros.
            value = F.pad(value, (0, 0, 0, _positions(model) + POSITION_OFFSET - value.shape[0]))
        state[SHARED if name == TABLE else PREFIX + name] = value.contiguous()
    state[BIAS] = torch.zeros(1, vocab_size)
    return state


def _positions(model: ModelConfig) -> int:
    return max(model.max_source_positions, model.max_target_positions)


def _start_token(run: RunConfig, special: SpecialTokens) -> int:
    return special.eos if run.objective.decoder_start == "eos_bos" else special.bos
