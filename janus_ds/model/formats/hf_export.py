"""A run as `BartForConditionalGeneration`: its configuration, search settings and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import DecodeConfig, ModelConfig, RunConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.decoding.cache import ArStream, ArSymbols
from janus_ds.model.formats.fairseq import POSITION_OFFSET, POSITION_TABLES, TABLE, their_names
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
        **_symbols(run, special),
        "forced_eos_token_id": special.eos,
        "dtype": "float32",
        "use_cache": True,
    }


def export_generation(run: RunConfig, special: SpecialTokens) -> dict[str, Any]:
    """`generation_config.json` that searches as our own beam search.

    The rule `fairseq` becomes `early_stopping: true`, which finds the same best hypothesis, but for those
    that end at the length limit.
    """
    decode, symbols = run.decode, ArSymbols.of(run, special)
    rules = {
        "min_length": (decode.min_length + symbols.lead + 1, decode.min_length),
        "no_repeat_ngram_size": (decode.no_repeat_ngram_size, decode.no_repeat_ngram_size),
        "repetition_penalty": (decode.repetition_penalty, decode.repetition_penalty != 1),
        "forced_bos_token_id": (symbols.first, symbols.first is not None),
        "forced_eos_token_id": (symbols.last, symbols.last is not None),
        "bad_words_ids": ([[token] for token in symbols.forbidden], symbols.forbidden),
    }
    return {
        **_symbols(run, special),
        "num_beams": decode.beam,
        "length_penalty": decode.length_penalty,
        "early_stopping": "never"
        if decode.beam_stop == "never"
        else decode.early_stopping or decode.beam_stop == "fairseq",
        # Theirs counts the start token as well.
        "max_length": symbols.most_steps(run) + 1,
        **{name: value for name, (value, used) in rules.items() if used},
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


def export_janus(
    run: RunConfig, special: SpecialTokens, weights: Mapping[str, Tensor], modes: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`config.json` and weights of a folder that `hf_modeling.py` loads."""
    model, stream = run.model, ArStream.of(run.objective, special)
    shape = ("d_model", "encoder_layers", "decoder_layers", "heads", "ffn_dim", "activation", "init_std")
    more = ("max_source_positions", "max_target_positions", "layernorm_embedding", "scale_embedding")
    rows, longest = model.max_target_positions, run.decode.max_length
    config = {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "auto_map": {
            "AutoConfig": "modeling_janus.JanusConfig",
            "AutoModelForSeq2SeqLM": "modeling_janus.JanusForConditionalGeneration",
        },
        "vocab_size": special.vocab_size,
        **{name: getattr(model, name) for name in (*shape, *more)},
        "length_classes": weights["length_head.weight"].shape[0],
        "modes": list(modes),
        "two_stream": stream.two_stream,
        "query_offset": stream.query_offset,
        "query_token_id": stream.query_token,
        "special_token_ids": sorted(special.ids),
        "length_specials": 0 if run.objective.length_convention == "with_specials" else 2,
        "nar_score": run.decode.nar_score or "paper",
        "iterations": DecodeConfig.iterations if run.decode.iterations is None else run.decode.iterations,
        "length_beam": run.decode.length_beam,
        "longest": min(rows, longest + 2) if longest else rows,
        **_symbols(run, special),
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    state = {name: value.contiguous() for name, value in weights.items() if name != "embedding.weight"}
    return config, {**state, "encoder.embedding.weight": weights["embedding.weight"][: special.vocab_size]}


def _positions(model: ModelConfig) -> int:
    return max(model.max_source_positions, model.max_target_positions)


def _symbols(run: RunConfig, special: SpecialTokens) -> dict[str, Any]:
    return {
        "bos_token_id": special.bos,
        "pad_token_id": special.pad,
        "eos_token_id": special.eos,
        "decoder_start_token_id": ArSymbols.of(run, special).start,
    }
