"""The model's parameters by name and shape, and how a set of whole weights gets into a model.

Names are canonical: the same at every tensor-parallel size, and those of `weights.safetensors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError
from janus_ds.parallel.tensor_parallel import ParallelLayers, shard_dims, take_shard

_NAMED_AT_MOST = 6


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn a fault in reading a file into words.

    Raises:
        CheckpointError: in place of the library's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the {what} cannot be read ({error})", str(path), "take another checkpoint of the run"
        ) from error


def padded_vocab(config: ModelConfig, vocab_size: int) -> int:
    """Rows of the embedding table: the vocabulary, padded to `model.vocab_multiple`."""
    return -(-vocab_size // config.vocab_multiple) * config.vocab_multiple


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every parameter of a model, without building it."""
    width, inner = config.d_model, config.ffn_dim
    norm: dict[str, tuple[int, ...]] = {"weight": (width,), "bias": (width,)}
    attention = {f"{x}.{k}": s for x in "qkv" for k, s in _linear(width, width).items()}
    attention |= {f"out.{k}": s for k, s in _linear(width, width).items()}
    encoder_layer = {
        **_under("fc1", _linear(width, inner)),
        **_under("fc2", _linear(inner, width)),
        **_under("ffn_norm", norm),
        **_under("self_attention", attention),
        **_under("self_attention_norm", norm),
    }
    decoder_layer = {
        **encoder_layer,
        **_under("cross_attention", attention),
        **_under("cross_attention_norm", norm),
    }
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (padded_vocab(config, vocab_size), width)}
    sides = (
        ("encoder", config.max_source_positions, config.encoder_layers, encoder_layer),
        ("decoder", config.max_target_positions, config.decoder_layers, decoder_layer),
    )
    for side, positions, layers, layer in sides:
        shapes[f"{side}.positions.weight"] = (positions, width)
        if config.layernorm_embedding:
            shapes |= _under(f"{side}.embedding_norm", norm)
        for number in range(layers):
            shapes |= _under(f"{side}.layers.{number}", layer)
    shapes["length_head.weight"] = (config.length_classes or config.max_target_positions, width)
    return shapes


def check_shapes(
    found: Mapping[str, tuple[int, ...]], config: ModelConfig, vocab_size: int, where: str
) -> None:
    """Hold a file's header against a model's sizes, before anything of either size is allocated."""
    refuse_too_many_layers(config, len(found), where)
    header = {name: torch.empty(shape, device="meta") for name, shape in found.items()}
    check_weights(header, parameter_shapes(config, vocab_size), where)


def refuse_too_many_layers(config: ModelConfig, tensors: int, where: str) -> None:
    """Refuse a model of more layers than a file has tensors, whose names alone could fill the memory.

    Raises:
        CheckpointError: that is so.
    """
    layers = config.encoder_layers + config.decoder_layers
    if layers > tensors:
        raise CheckpointError(
            f"the model has {layers:,} layers, the file {tensors:,} tensors",
            where,
            "take the model's sizes and the weights from one model",
        )


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Hold names and shapes of weights against those of a model.

    Raises:
        CheckpointError: they differ; the differences are named.
    """
    faults = weight_faults(weights, expected)
    if faults:
        raise CheckpointError(
            f"the weights do not fit the model: {faults}",
            where,
            "use the model section and the tokenizer that these weights were trained with",
        )


def weight_faults(weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> str:
    """In what names and shapes weights differ from a model's, the first few; empty where they do not."""
    faults = [f"{name} is missing" for name in expected if name not in weights]
    faults += [f"{name} is not part of the model" for name in weights if name not in expected]
    faults += [
        f"{name} has shape {tuple(weights[name].shape)}, the model {shape}"
        for name, shape in expected.items()
        if name in weights and tuple(weights[name].shape) != shape
    ]
    more = f"; and {len(faults) - _NAMED_AT_MOST} more" if len(faults) > _NAMED_AT_MOST else ""
    return "; ".join(faults[:_NAMED_AT_MOST]) + more


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    where: str = "weights",
    parallel: ParallelLayers | None = None,
) -> None:
    """Put whole weights into a model, each tensor-parallel rank taking its shard.

    Args:
        weights: whole tensors by canonical name; dtype and device of the model's parameters stay.
        parallel: the layers the model was built from; None: one process.
    """
    size, rank = (parallel.size, parallel.rank) if parallel else (1, 0)
    dims = shard_dims(model)
    expected = {}
    for name, parameter in model.named_parameters():
        dim = dims[name]
        expected[name] = tuple(n * size if axis == dim else n for axis, n in enumerate(parameter.shape))
    check_weights(weights, expected, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(take_shard(weights[name], dims[name], rank, size))


def _linear(fan_in: int, fan_out: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (fan_out, fan_in), "bias": (fan_out,)}


def _under(prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
