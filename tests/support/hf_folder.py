"""A folder as Hugging Face's hub holds a BART, made without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.presets import resolve
from janus_ds.config.schema import ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.model.formats.hf_export import export_config, export_generation, export_weights
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.hf_models import letters_tokenizer

VOCAB_SIZE = 61
_MODEL = ModelConfig(
    d_model=16, encoder_layers=1, decoder_layers=2, ffn_dim=24, heads=2, max_source_positions=40,
    max_target_positions=40,
)  # fmt: skip
_SPECIAL = SpecialTokens(0, 1, 2, 3, VOCAB_SIZE - 1, VOCAB_SIZE)
_RUN = resolve(RunConfig(model=_MODEL, objective=ObjectiveConfig(preset="ar")))


def hub_state() -> dict[str, Tensor]:
    """Random weights under Hugging Face's names."""
    torch.manual_seed(3)
    weights = JanusModel(_RUN.model, _SPECIAL, ParallelLayers()).state_dict()
    return {name: value.clone() for name, value in export_weights(weights, _MODEL, VOCAB_SIZE).items()}


def hub_folder(
    folder: Path,
    state: dict[str, Tensor] | None = None,
    changes: dict[str, Any] | None = None,
    tokenizer: int | None = VOCAB_SIZE,
) -> Path:
    """Write the folder; `changes` are made to `config.json`, `tokenizer` is the size of its vocabulary."""
    folder.mkdir(parents=True)
    config = {**export_config(_RUN, _SPECIAL), **(changes or {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(export_generation(_RUN, _SPECIAL)))
    save_file(hub_state() if state is None else state, folder / "model.safetensors")
    if tokenizer is not None:
        letters_tokenizer(folder, tokenizer)
    return folder
