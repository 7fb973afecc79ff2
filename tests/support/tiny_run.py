"""A run folder for pairs with random weights, as training leaves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from janus_ds.checkpoint.manifest import write_manifest
from janus_ds.checkpoint.tensors import write_tensors
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, DecodeConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.data.text.tokenizer import Tokenizer, load_tokenizer
from janus_ds.model.janus import JanusModel
from janus_ds.observe import write_run_record
from janus_ds.parallel.tensor_parallel import ParallelLayers


def make_run(folder: Path, data: Path, preset: str, positions: int = 48) -> Path:
    """Two checkpoints of different weights, with the tokenizer of some data."""
    model = ModelConfig(
        d_model=16,
        heads=2,
        ffn_dim=16,
        max_source_positions=positions,
        max_target_positions=48,
        init_std=0.4,
    )
    config = RunConfig(
        name="tiny",
        model=model,
        data=DataConfig(task="pair", block_tokens=40),
        objective=ObjectiveConfig(preset),
    )
    config = resolve(replace(config, decode=DecodeConfig(mode="ar", beam=2, max_length=9)))
    return write_run(folder, data, config, 1.1)


def write_run(folder: Path, data: Path, config: RunConfig, scale: float) -> Path:
    """The same of a resolved run; weights are `scale` x step times those that are drawn."""
    tokenizer = load_tokenizer(data / "tokenizer")
    torch.manual_seed(3)
    weights = JanusModel(config.model, tokenizer.special, ParallelLayers()).state_dict()
    tokenizer.save(folder / "tokenizer")
    write_run_record(folder, config, tokenizer.special, tokenizer.fingerprint, {}, 0)
    for step in (5, 10):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        write_tensors(checkpoint / "weights.safetensors", {k: v * scale * step for k, v in weights.items()})
        write_manifest(checkpoint)
    return folder


def make_random_run(
    folder: Path, objective: ObjectiveConfig, tokenizer: Tokenizer, model: ModelConfig
) -> Path:
    """A run folder without checkpoints, as `convert` makes one."""
    decode = DecodeConfig(mode="ar", beam=3, max_length=14, beam_stop="transformers")
    data = DataConfig(task="pair", block_tokens=40)
    run = resolve(RunConfig(name="random", model=model, data=data, objective=objective, decode=decode))
    torch.manual_seed(3)
    weights = JanusModel(run.model, tokenizer.special, ParallelLayers()).state_dict()
    tokenizer.save(folder / "tokenizer")
    write_run_record(folder, run, tokenizer.special, tokenizer.fingerprint, {}, 0)
    write_tensors(folder / "weights.safetensors", weights)
    return folder
