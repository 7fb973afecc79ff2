"""A model for decoding: whole weights of a `weights.safetensors`, on one device, in evaluation mode."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError
from janus_ds.model.janus import JanusModel
from janus_ds.model.weights import load_weights
from janus_ds.parallel.layers import DenseLayers

__all__ = ["model_from_file"]


def model_from_file(
    config: ModelConfig, special: SpecialTokens, path: Path, device: torch.device | str = "cpu"
) -> JanusModel:
    """Build a model of a shape and fill it from a file.

    Args:
        config: shape.
        special: special symbols and vocabulary size.
        path: a safetensors file with whole matrices under our names.
        device: where the model is wanted.

    Raises:
        CheckpointError: the file cannot be read, is of another shape, or holds values that are not finite.
    """
    try:
        weights = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights cannot be read ({error})", str(path), "take another checkpoint of the run"
        ) from error
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(
            f"{len(broken)} weights are not finite, first {broken[0]}: training had diverged",
            str(path),
            "take an earlier checkpoint of the run",
        )
    model = JanusModel(config, special, DenseLayers())
    load_weights(model, weights, str(path))
    return model.to(device).eval()
