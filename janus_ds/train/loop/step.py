"""One micro-batch as one module call, and what of it is compiled (`train.compile`).

DeepSpeed's hooks see model and objective together. `head` compiles the chunk mathematics of the loss
(`objective.chunk_math`). `model` compiles forward and backward of encoder and decoder as well; shapes
come in buckets (`data.pad_multiple`), and the compiler takes them as unknown from the second one on, so
their number does not matter. None of this changes what is computed but for rounding, and dropout, which
compiled code draws by another rule.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.errors import ConfigError
from janus_ds.model.janus import JanusModel
from janus_ds.objective.chunk_math import compiler_is_at_hand
from janus_ds.objective.janus_objective import JanusObjective


class TrainingStep(nn.Module):
    """Model and objective: a batch in, named losses out.

    Args:
        encoder_passes: dropout draws of the encoder (`objective.encoder_passes`).
    """

    def __init__(self, model: JanusModel, objective: JanusObjective, encoder_passes: int = 1) -> None:
        super().__init__()
        self._encoder_passes = encoder_passes
        self.model = model
        self.objective = objective

    def forward(
        self, batch: TwoStreamBatch, counts: BatchCounts, factors: Mapping[str, float] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted total of a micro-batch and its terms without gradient.

        Plain containers, not a dataclass: DeepSpeed looks for tensors in tuples and dicts only,
        and misses its hooks on anything else.

        Args:
            counts: counts of the whole step, over all micro-batches and ranks.
            factors: ramps of loss weights at this step.
        """
        report = self.objective(self.model(batch, self._encoder_passes), batch, counts, factors)
        return report.total, {name: value.detach() for name, value in report.terms.items()}


logger = logging.getLogger(__name__)

_SHAPES = 64
"""Compiled variants that one function may have before it runs uncompiled."""


def compile_step(
    step: TrainingStep, what: str, device: torch.device, sharded: bool = False, backend: str = "inductor"
) -> None:
    """Make `step` compile at its first call; without a compiler, say so and leave it as it is.

    Args:
        sharded: weights are gathered layer by layer (ZeRO-3) or sharded (tensor parallelism).

    Raises:
        ConfigError: a compiled model whose weights are sharded.
    """
    if what == "none":
        return
    if what != "head" and sharded:
        raise ConfigError(
            "train.compile 'model' cannot be used with ZeRO-3 or tensor parallelism, which exchange "
            "weights and activations inside of the model",
            "train.compile",
            "use train.compile head, or ZeRO stage 2 with --tensor-parallel 1",
        )
    if not compiler_is_at_hand(device):
        logger.warning(
            "train.compile is %s, but there is no compiler for %s here (g++, or Triton on a GPU): "
            "the step runs uncompiled",
            what,
            device.type,
        )
        return
    step.objective.compiled_head = True
    if what == "head":
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _SHAPES)
    # Not the model as a whole: it hands out its tied table, whose gradient would come in two ways.
    for part in (step.model.encoder, step.model.decoder):
        part.compile(backend=backend)
