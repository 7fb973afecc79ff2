"""Small double-precision models and samples for numerical tests."""

from __future__ import annotations

from typing import Any

import torch

from janus_ds.config.schema import DataConfig, DecodeConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.decode.generator import Generator
from janus_ds.model.janus import JanusModel
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.two_stream import TOY, Sample

TINY = ModelConfig(
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    ffn_dim=24,
    heads=2,
    max_source_positions=16,
    max_target_positions=16,
    dropout=0.0,
    attention_dropout=0.0,
    # Large weights, so that no difference hides behind a flat softmax.
    init_std=0.3,
)
TINY_NMT = ModelConfig(
    d_model=16,
    encoder_layers=1,
    decoder_layers=3,
    ffn_dim=24,
    heads=4,
    activation="relu",
    max_source_positions=16,
    max_target_positions=16,
    layernorm_embedding=False,
    scale_embedding=True,
    dropout=0.0,
    attention_dropout=0.0,
    length_classes=12,
    init_std=0.3,
)
SAMPLES = [
    Sample([0, 9, 8, 7, 6, 5, 2], [0, 11, 12, 13, 14, 15, 16, 2], [2, 3, 5]),
    Sample([0, 15, 14, 2], [0, 21, 22, 23, 2], [2]),
    Sample([0, 5, 6, 7, 8, 9, 10, 11, 2], [0, 25, 26, 27, 28, 2], [1, 2, 3, 4]),
]
"""Masked: some, one, and every inner token."""


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> JanusModel:
    """A model in double precision and eval mode, biases and norms away from their start values."""
    torch.manual_seed(seed)
    model = JanusModel(config, TOY, ParallelLayers()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_generator(
    model: JanusModel, objective: ObjectiveConfig, batch_sentences: int = 4, **decode: Any
) -> Generator:
    """Decodes token ids with a model; further arguments are fields of `DecodeConfig`."""
    run = RunConfig(
        model=model.config,
        data=DataConfig(block_tokens=12),
        objective=objective,
        decode=DecodeConfig(**decode),
    )
    return Generator(model, None, run, batch_sentences=batch_sentences)
