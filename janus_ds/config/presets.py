"""Values of fields that a recipe leaves open: from presets of objectives and shapes, and from `init`.

Each preset sets loss weights, masking, AR query position, decoder start, length convention and mask
symbol; any field given in the recipe overrides it alone. `released` has one bundle for pretraining
(task denoise) and one for translation (task pair).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from janus_ds.config.locations import model_path, parse_locations
from janus_ds.config.schema import (
    FIELDS,
    KL_PAIRS,
    RUN_FILE,
    MaskingConfig,
    ModelConfig,
    ObjectiveConfig,
    RunConfig,
)
from janus_ds.errors import JanusError
from janus_ds.io import mapping, read_json

_MOST_BYTES = 1 << 24
"""Of a run.json or manifest.json; a longer one is taken for none."""

_BUNDLED_BLOCK_TOKENS = 30
"""Longest block of the bundled corpus, where nothing else is asked for."""

_BART = {
    "activation": "gelu",
    "layernorm_embedding": True,
    "scale_embedding": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}
_NMT = {"activation": "relu", "layernorm_embedding": False, "scale_embedding": True, "attention_dropout": 0.0}


def _shape(layers: int, d_model: int, ffn_dim: int, heads: int) -> dict[str, Any]:
    depth = {"encoder_layers": layers, "decoder_layers": layers}
    return {**depth, "d_model": d_model, "ffn_dim": ffn_dim, "heads": heads}


MODEL_PRESETS: dict[str, dict[str, Any]] = {
    "quickstart": _shape(2, 128, 512, 4) | _BART | {"max_source_positions": 256, "max_target_positions": 256},
    "iwslt": _shape(6, 512, 1024, 4) | _NMT | {"dropout": 0.3},
    "wmt": _shape(6, 512, 2048, 8) | _NMT | {"dropout": 0.2},
    "bart_base": _shape(6, 768, 3072, 12) | _BART,
    "bart_large": _shape(12, 1024, 4096, 16) | _BART,
    "1b": _shape(24, 1280, 5120, 20) | _BART,
}


def _objective(ar: float, nar: float, aux: float, length: float, **kl: float) -> dict[str, Any]:
    """Weights of the four losses and, as `PAIR=weight`, of KL terms; with the paper's conventions."""
    terms = {f"kl_{pair}": kl.get(pair, 0) for pair in map("_".join, KL_PAIRS)}
    weights = {"ar": ar, "nar": nar, "aux": aux, "length": length, **terms}
    return {
        **{f"weight_{name}": float(weight) for name, weight in weights.items()},
        "label_smoothing": 0.1,
        "normalise": "per_term",
        "ar_stream": "query",
        "ar_query_position": "predicted",
        "length_convention": "inner",
        "mask_symbol": "mask",
    }


_CONTENT = {"ar_stream": "content"}

OBJECTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "paper": _objective(1, 1, 1, 0.1, ar_aux=2, nar_aux=2),
    "released/pair": _objective(1, 0.5, 0.5, 0.1, ar_nar=1, ar_aux=3, nar_aux=1)
    | {"ar_query_position": "previous", "length_convention": "with_specials", "mask_symbol": "unk"},
    "released/denoise": _objective(0.5, 0.5, 0.5, 0, ar_aux=0.5, nar_aux=0.5)
    | {"normalise": "target_tokens", "length_convention": "with_specials", "label_smoothing": 0.0},
    "released_finetune": _objective(0, 1, 1, 0.1, nar_nar=1, aux_aux=1),
    "cmlm": _objective(0, 1, 0, 0.1),
    "ar": _objective(1, 0, 0, 0) | _CONTENT,
    "ar_query": _objective(1, 0, 0, 0),
    # Cross-entropies of both draws added up, as the R-Drop code does; see the text of weight_kl_ar_ar.
    "ar_rdrop": _objective(2, 0, 0, 0, ar_ar=5) | _CONTENT,
    "ar_query_rdrop": _objective(2, 0, 0, 0, ar_ar=5),
}


def _masking(target: str, target_share: float, **others: Any) -> dict[str, Any]:
    return {
        "target": target,
        "target_share": target_share,
        "source_share": 0.0,
        "poisson": 2.0,
        "rotate_share": 0.0,
        "aux_order": "left_to_right",
        **others,
    }


MASKING_PRESETS: dict[str, dict[str, Any]] = {
    "paper/denoise": _masking("infilling", 0.5, source_share=0.3),
    "paper/pair": _masking("span_union", 0.7),
    "released/denoise": _masking("infilling_released", 0.3, source_share=0.3, poisson=3.0, rotate_share=0.5),
    "released/pair": _masking("span_overlap", 0.7),
    "released_finetune/pair": _masking("uniform", 0.0, aux_order="random"),
    "cmlm/pair": _masking("uniform", 0.0),
}


def _fill(config: Any, values: dict[str, Any]) -> Any:
    missing = {f.name for f in fields(config) if getattr(config, f.name) is None}
    return replace(config, **{name: value for name, value in values.items() if name in missing})


def resolve(config: RunConfig) -> RunConfig:
    """The same run with every preset written out: no field of objective or masking is None."""
    preset, task = config.objective.preset, config.data.task
    start = {"decoder_start": "eos_bos" if task == "denoise" else "bos"}
    bundle = OBJECTIVE_PRESETS.get(preset) or OBJECTIVE_PRESETS[f"{preset}/{task}"]
    objective: ObjectiveConfig = _fill(config.objective, bundle | start)
    masking: MaskingConfig = _fill(
        config.masking, MASKING_PRESETS.get(f"{preset}/{task}") or MASKING_PRESETS[f"paper/{task}"]
    )
    model: ModelConfig = config.model
    if model.length_classes is None:
        released = objective.length_convention == "with_specials"
        model = replace(model, length_classes=256 if released else model.max_target_positions)
    decode = _fill(config.decode, {"nar_score": "released" if preset == "released" else "paper"})
    most = max(1, model.max_target_positions - 2)
    bundled = task == "denoise" and config.data.path is None
    block = config.data.block_tokens or (min(most, _BUNDLED_BLOCK_TOKENS) if bundled else most)
    data = replace(config.data, block_tokens=block)
    return replace(config, objective=objective, masking=masking, model=model, decode=decode, data=data)


def follow_data(run: RunConfig, fixed: Collection[str], notes: list[str]) -> RunConfig:
    """The run with the lengths that its data was prepared with, where `data.block_tokens` is left open.

    Position tables grow to hold them, which a note says, but not those that `fixed` names, nor those of
    weights from `init`.
    Of distant data, and of a damaged manifest, nothing is known here.
    """
    if run.data.block_tokens or run.data.path is None:
        return run
    try:
        lengths = [_prepared_lengths(place.location) for place in parse_locations(run.data.path)]
    except (JanusError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return run
    longest = dict(zip(("source", "target"), map(max, *lengths, (0, 0)), strict=True))
    grown: list[str] = []
    model = run.model
    for side, tokens in longest.items() if run.init is None else ():
        name, needed = f"max_{side}_positions", tokens + 2
        if needed > getattr(model, name) and f"model.{name}" not in fixed:
            grown.append(f"{side} {needed}, not {getattr(model, name)}")
            model = replace(model, **{name: needed})
    if grown:
        notes.append(f"the model gets the positions that the data was prepared for: {'; '.join(grown)}")
    return replace(run, model=model, data=replace(run.data, block_tokens=longest["target"]))


def _prepared_lengths(folder: str) -> tuple[int, int]:
    """Most tokens of source and target, as the manifest of a local data directory tells them."""
    request = read_json(Path(folder) / "manifest.json", _MOST_BYTES)["settings"]["request"]
    settings = request.get("prepared", request)["settings"]
    target = settings.get("block_tokens") or settings.get("max_tokens")
    limits = settings.get("limits") or {"source": target, "target": target}
    return min(int(limits["source"]), 10**9), min(int(limits["target"]), 10**9)


CONVENTIONS = ("decoder_start", "ar_query_position", "mask_symbol")
"""Fields of the objective that a run takes over from its `init`: what the weights were trained with."""


def follow_init(run: RunConfig, given: Collection[str] = (), notes: list[str] | None = None) -> RunConfig:
    """The run with the conventions of `init`, where its own recipe leaves them open.

    The decoder's start decides at which positions tokens stand, so weights that were trained with `eos_bos`
    (BART, and all pretraining) are fine-tuned with it too, on pairs as well. A preset that the recipe
    chooses says how AR queries and MASK rows are made; where `init` has it otherwise, a note tells so.

    Args:
        given: keys that the recipe has.
    """
    names = [name for name in CONVENTIONS if getattr(run.objective, name) is None]
    if run.init is None or not names:
        return run
    recipe = record_of(Path(run.init)).get("recipe")
    followed = with_conventions(run, recipe, names)
    if "objective.preset" not in given:
        return followed
    preset = resolve(run).objective
    kept = {name: getattr(preset, name) for name in names if name != "decoder_start"}
    for name, own in kept.items():
        other = getattr(followed.objective, name)
        if notes is not None and other not in (None, own):
            notes.append(f"objective.{name} is {own}, as of preset {preset.preset}; {run.init} has {other}")
    return replace(followed, objective=replace(followed.objective, **kept))


def with_conventions(run: RunConfig, recipe: Any, names: Collection[str]) -> RunConfig:
    """The run with these fields of its objective as a recorded recipe has them, where that has them."""
    recorded = mapping(mapping(recipe).get("objective"))
    choices = {name: FIELDS[f"objective.{name}"].choices for name in names}
    found = {name: recorded[name] for name in names if recorded.get(name) in choices[name]}
    return replace(run, objective=replace(run.objective, **found))


def record_of(source: Path) -> dict[str, Any]:
    """`run.json` of a run folder, of a checkpoint in it, or of the folder of a weights file.

    Empty where there is none: weights may come as a file alone. That there are weights at all is
    looked at when they are read.
    """
    for folder in _folders(source):
        try:
            return read_json(folder / RUN_FILE, _MOST_BYTES)
        except (OSError, ValueError):
            continue
    return {}


def init_tokenizer(init: str) -> Path | None:
    """The tokenizer folder of the run that `init` means; None where it has none."""
    folders = (folder / "tokenizer" for folder in _folders(Path(init)))
    return next((folder for folder in folders if folder.is_dir()), None)


def _folders(source: Path) -> tuple[Path, ...]:
    source = model_path(source)
    return (source, source.parent, source.parent.parent, *source.parents[2:3])
