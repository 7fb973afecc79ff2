"""Which validation was the best one, its weights, and whether to wait for a better one."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ds.checkpoint.best import save_best
from janus_ds.config.schema import TrainConfig
from janus_ds.errors import ResourceError
from janus_ds.metrics.validation import VALIDATION_METRICS
from janus_ds.parallel.topology import Topology
from janus_ds.train.guards import together
from janus_ds.train.state import Meters

__all__ = ["BestWeights"]

logger = logging.getLogger(__name__)


class BestWeights:
    """Follows `train.keep_best` from validation to validation; all ranks together.

    Args:
        train: what is kept, and how long to wait for a better one.
        meters: the best so far; brought up to date here.
        root: RUN/checkpoints.
        topology: the ranks that agree.
    """

    def __init__(self, train: TrainConfig, meters: Meters, root: Path, topology: Topology) -> None:
        self._train = train
        self._meters = meters
        self._root = root
        self._topology = topology

    def judge(
        self,
        step: int,
        losses: Mapping[str, float],
        scores: Mapping[str, float],
        weights: Callable[[], Mapping[str, Tensor] | None],
    ) -> None:
        """Take a validation into account.

        Args:
            step: updates done.
            losses: held-out losses, equal on all ranks.
            scores: by mode, equal on all ranks.
            weights: gives all weights on rank 0; collective.
        """
        meters, kind = self._meters, self._train.keep_best
        if kind == "loss":
            better = losses["loss"] < (meters.best_loss if meters.best_step else math.inf)
        elif kind in scores:
            better = scores[kind] > meters.best_bleu
        else:
            return
        name = f"valid_{VALIDATION_METRICS[self._train.valid_task].name}"
        risen = {mode: score for mode, score in scores.items() if score > meters.best_scores.get(mode, -1.0)}
        meters.best_scores |= risen
        if not better:
            meters.stale_validations = 0 if risen else meters.stale_validations + 1
        elif self._keep(step, weights(), {"valid_loss": losses["loss"], name: dict(scores)}):
            meters.best_step, meters.stale_validations = step, 0
            meters.best_bleu, meters.best_loss = scores.get(kind, -1.0), losses["loss"]
        meters.finished = 0 < self._train.patience <= meters.stale_validations

    def _keep(self, step: int, weights: Mapping[str, Tensor] | None, figures: dict[str, Any]) -> bool:
        record = {"step": step, **figures, "mode": self._train.keep_best}
        try:
            together(
                self._topology,
                lambda: save_best(self._root, weights, record) if weights is not None else None,
            )
        except ResourceError as error:
            if self._topology.is_main:
                logger.warning(
                    "%s; training goes on\n  where: %s\n  to do: %s",
                    error.what,
                    error.where,
                    "free disk space",
                )
            return False
        return True
