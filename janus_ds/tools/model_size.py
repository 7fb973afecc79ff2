"""How large a model and its training states are, by arithmetic: no tensor is made.

A unit test holds the counts against the real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from janus_ds.config.schema import ModelConfig

__all__ = ["PartSize", "checkpoint_bytes", "model_parts", "state_bytes"]

_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MASTER_BYTES, _ADAM_BYTES = 4, 8


@dataclass(frozen=True)
class PartSize:
    """Parameters of one part: those that tensor parallelism shards, and those on every rank."""

    name: str
    sharded: int
    replicated: int

    @property
    def total(self) -> int:
        """Parameters of the part in the whole model."""
        return self.sharded + self.replicated

    def on_rank(self, tensor_size: int) -> int:
        """Parameters of the part on one tensor-parallel rank."""
        return self.sharded // tensor_size + self.replicated


def model_parts(config: ModelConfig, vocab_size: int) -> list[PartSize]:
    """The parts of a model with their numbers of parameters."""
    width, norm = config.d_model, 2 * config.d_model
    rows = -(-vocab_size // config.vocab_multiple) * config.vocab_multiple
    # Column layers (q, k, v, fc1) shard weight and bias; row layers (out, fc2) only the weight.
    attention = (4 * width**2 + 3 * width, width + norm)
    feed_forward = (2 * width * config.ffn_dim + config.ffn_dim, width + norm)
    encoder = [n * config.encoder_layers for n in _sum(attention, feed_forward)]
    decoder = [n * config.decoder_layers for n in _sum(attention, attention, feed_forward)]
    positions = (config.max_source_positions + config.max_target_positions) * width
    norms = 2 * norm if config.layernorm_embedding else 0
    classes = config.length_classes or config.max_target_positions
    return [
        PartSize("token embedding (tied)", rows * width, 0),
        PartSize("positions", 0, positions + norms),
        PartSize("encoder layers", *encoder),
        PartSize("decoder layers", *decoder),
        PartSize("length head", 0, classes * width),
    ]


def _sum(*parts: tuple[int, int]) -> tuple[int, int]:
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def state_bytes(parameters: int, stage: int, precision: str, data_size: int) -> float | None:
    """Bytes of weights, gradients and AdamW states on one rank; None where it is not supported.

    DeepSpeed keeps an fp32 copy of the weights beside Adam's two moments from stage 1 on, in fp32
    as well. Stage 1 shares out these 12 bytes a parameter, stage 2 gradients too, stage 3 weights too.

    Args:
        parameters: on one tensor-parallel rank.
        stage: ZeRO stage.
        precision: fp32, bf16 or fp16.
        data_size: data-parallel ranks.
    """
    weight = _WEIGHT_BYTES[precision]
    if stage == 0:
        return parameters * (2 * weight + _ADAM_BYTES) if precision == "fp32" else None
    states = _MASTER_BYTES + _ADAM_BYTES
    shared = {1: states, 2: states + weight, 3: states + 2 * weight}[stage]
    whole = 2 * weight + states - shared
    return parameters * (whole + shared / data_size)


def checkpoint_bytes(parameters: int) -> int:
    """Bytes of one checkpoint on any ranks, in any stage and precision: weights and moments in fp32."""
    return parameters * (_MASTER_BYTES + _ADAM_BYTES)
