"""Values of fields that a recipe leaves open: from presets of objectives and shapes, and from `init`.

Each preset sets loss weights, masking, AR query position, decoder start, length convention and mask
symbol; any field given in the recipe overrides it alone. `released` has one bundle for pretraining
(task denoise) and one for translation (task pair).
"""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from janus_ds.config.schema import MaskingConfig, ModelConfig, ObjectiveConfig, RunConfig

__all__ = ["MODEL_PRESETS", "OBJECTIVE_PRESETS", "follow_init", "record_of", "resolve"]

_BART = {
    "activation": "gelu",
    "layernorm_embedding": True,
    "scale_embedding": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
_NMT = {
    "activation": "relu",
    "layernorm_embedding": False,
    "scale_embedding": True,
    "attention_dropout": 0.0,
}


def _shape(layers: int, d_model: int, ffn_dim: int, heads: int) -> dict[str, int]:
    return {
        "encoder_layers": layers,
        "decoder_layers": layers,
        "d_model": d_model,
        "ffn_dim": ffn_dim,
        "heads": heads,
    }


MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": {
        **_shape(2, 128, 512, 4),
        **_BART,
        "max_source_positions": 256,
        "max_target_positions": 256,
    },
    "iwslt": {**_shape(6, 512, 1024, 4), **_NMT, "dropout": 0.3},
    "wmt": {**_shape(6, 512, 2048, 8), **_NMT, "dropout": 0.2},
    "bart_base": {**_shape(6, 768, 3072, 12), **_BART},
    "bart_large": {**_shape(12, 1024, 4096, 16), **_BART},
    "1b": {**_shape(24, 1280, 5120, 20), **_BART},
}

_CONVENTIONS = {
    "paper": {
        "normalise": "per_term",
        "ar_stream": "query",
        "ar_query_position": "predicted",
        "length_convention": "inner",
        "mask_symbol": "mask",
    },
    "released": {
        "normalise": "per_term",
        "ar_stream": "query",
        "ar_query_position": "previous",
        "length_convention": "with_specials",
        "mask_symbol": "unk",
    },
}
_NO_KL = {"weight_kl_ar_nar": 0.0, "weight_kl_ar_aux": 0.0, "weight_kl_nar_aux": 0.0}
_ONE_DRAW = {"weight_kl_ar_ar": 0.0, "weight_kl_nar_nar": 0.0, "weight_kl_aux_aux": 0.0}
# Cross-entropies of both draws added up, as the R-Drop code does; see the docstring of weight_kl_ar_ar.
_R_DROP = {"weight_ar": 2.0, "weight_kl_ar_ar": 5.0}
_AR_ONLY = {"weight_ar": 1.0, "weight_nar": 0.0, "weight_aux": 0.0, "weight_length": 0.0, **_NO_KL}

OBJECTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        **_CONVENTIONS["paper"],
        "weight_ar": 1.0,
        "weight_nar": 1.0,
        "weight_aux": 1.0,
        "weight_length": 0.1,
        "weight_kl_ar_nar": 0.0,
        "weight_kl_ar_aux": 2.0,
        "weight_kl_nar_aux": 2.0,
        "label_smoothing": 0.1,
    },
    "released/pair": {
        **_CONVENTIONS["released"],
        "weight_ar": 1.0,
        "weight_nar": 0.5,
        "weight_aux": 0.5,
        "weight_length": 0.1,
        "weight_kl_ar_nar": 1.0,
        "weight_kl_ar_aux": 3.0,
        "weight_kl_nar_aux": 1.0,
        "label_smoothing": 0.1,
    },
    "released/denoise": {
        **_CONVENTIONS["released"],
        "ar_query_position": "predicted",
        "mask_symbol": "mask",
        "normalise": "target_tokens",
        "weight_ar": 0.5,
        "weight_nar": 0.5,
        "weight_aux": 0.5,
        "weight_length": 0.0,
        "weight_kl_ar_nar": 0.0,
        "weight_kl_ar_aux": 0.5,
        "weight_kl_nar_aux": 0.5,
        "label_smoothing": 0.0,
    },
    "ar": {**_CONVENTIONS["paper"], **_AR_ONLY, "ar_stream": "content", "label_smoothing": 0.1},
    "ar_query": {**_CONVENTIONS["paper"], **_AR_ONLY, "label_smoothing": 0.1},
    "ar_rdrop": {
        **_CONVENTIONS["paper"],
        **_AR_ONLY,
        **_R_DROP,
        "ar_stream": "content",
        "label_smoothing": 0.1,
    },
    "ar_query_rdrop": {**_CONVENTIONS["paper"], **_AR_ONLY, **_R_DROP, "label_smoothing": 0.1},
    "released_finetune": {
        **_CONVENTIONS["paper"],
        **_NO_KL,
        "weight_ar": 0.0,
        "weight_nar": 1.0,
        "weight_aux": 1.0,
        "weight_length": 0.1,
        "weight_kl_nar_nar": 1.0,
        "weight_kl_aux_aux": 1.0,
        "label_smoothing": 0.1,
    },
    "cmlm": {
        **_CONVENTIONS["paper"],
        **_NO_KL,
        "weight_ar": 0.0,
        "weight_nar": 1.0,
        "weight_aux": 0.0,
        "weight_length": 0.1,
        "label_smoothing": 0.1,
    },
}

_MASKING = {
    "paper/denoise": {
        "target": "infilling",
        "target_share": 0.5,
        "source_share": 0.3,
        "poisson": 2.0,
        "rotate_share": 0.0,
    },
    "paper/pair": {
        "target": "span_union",
        "target_share": 0.7,
        "source_share": 0.0,
        "poisson": 2.0,
        "rotate_share": 0.0,
    },
    "released/denoise": {
        "target": "infilling_released",
        "target_share": 0.3,
        "source_share": 0.3,
        "poisson": 3.0,
        "rotate_share": 0.5,
    },
    "released/pair": {
        "target": "span_overlap",
        "target_share": 0.7,
        "source_share": 0.0,
        "poisson": 2.0,
        "rotate_share": 0.0,
    },
    "cmlm/pair": {
        "target": "uniform",
        "target_share": 0.0,
        "source_share": 0.0,
        "poisson": 2.0,
        "rotate_share": 0.0,
    },
    "released_finetune/pair": {
        "target": "uniform",
        "target_share": 0.0,
        "source_share": 0.0,
        "poisson": 2.0,
        "rotate_share": 0.0,
        "aux_order": "random",
    },
}


def _fill(config: Any, values: dict[str, Any]) -> Any:
    missing = {f.name for f in fields(config) if getattr(config, f.name) is None}
    return replace(config, **{name: value for name, value in values.items() if name in missing})


def resolve(config: RunConfig) -> RunConfig:
    """The same run with every preset written out: no field of objective or masking is None."""
    preset, task = config.objective.preset, config.data.task
    start = {"decoder_start": "eos_bos" if task == "denoise" else "bos"}
    bundle = OBJECTIVE_PRESETS.get(preset) or OBJECTIVE_PRESETS[f"{preset}/{task}"]
    objective: ObjectiveConfig = _fill(config.objective, {**_ONE_DRAW, **bundle, **start})
    masking_values = _MASKING.get(f"{preset}/{task}", _MASKING[f"paper/{task}"])
    masking: MaskingConfig = _fill(config.masking, {"aux_order": "left_to_right", **masking_values})
    model: ModelConfig = config.model
    if model.length_classes is None:
        released = objective.length_convention == "with_specials"
        model = replace(model, length_classes=256 if released else model.max_target_positions)
    decode = _fill(config.decode, {"nar_score": "released" if preset == "released" else "paper"})
    return replace(config, objective=objective, masking=masking, model=model, decode=decode)


def follow_init(run: RunConfig) -> RunConfig:
    """The run with the decoder's start of `init`, where its own recipe leaves it open.

    The start decides at which positions tokens stand, so weights that were trained with `eos_bos`
    (BART, and all pretraining) are fine-tuned with it too, on pairs as well.
    """
    if run.init is None or run.objective.decoder_start is not None:
        return run
    recipe = record_of(Path(run.init)).get("recipe")
    objective = recipe.get("objective") if isinstance(recipe, dict) else None
    start = objective.get("decoder_start") if isinstance(objective, dict) else None
    if start not in ("bos", "eos_bos"):
        return run
    return replace(run, objective=replace(run.objective, decoder_start=start))


def record_of(source: Path) -> dict[str, Any]:
    """`run.json` of a run folder, of a checkpoint in it, or of the folder of a weights file.

    Empty where there is none: weights may come as a file alone. That there are weights at all is
    looked at when they are read.
    """
    for folder in (source, source.parent, source.parent.parent, *source.parents[2:3]):
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        return record if isinstance(record, dict) else {}
    return {}
