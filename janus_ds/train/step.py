"""One micro-batch as one module call, so that DeepSpeed's hooks see model and objective together."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective

__all__ = ["TrainingStep"]


class TrainingStep(nn.Module):
    """Model and objective: a batch in, named losses out.

    Args:
        model: hidden rows from a batch.
        objective: losses from hidden rows.
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
            batch: one micro-batch.
            counts: counts of the whole step, over all micro-batches and ranks.
            factors: ramps of loss weights at this step.
        """
        report = self.objective(self.model(batch, self._encoder_passes), batch, counts, factors)
        return report.total, {name: value.detach() for name, value in report.terms.items()}
