"""Validation: held-out losses, equal on any number of ranks, and the best weights so far."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ds.batch import BatchCounts
from janus_ds.checkpoint.manager import save_best
from janus_ds.config.schema import TrainConfig
from janus_ds.data.stream.loader import ValidationBatch
from janus_ds.errors import ResourceError
from janus_ds.metrics.validation import VALIDATION_METRICS
from janus_ds.objective.janus_objective import LossReport
from janus_ds.parallel.topology import Topology, raise_on_all_ranks
from janus_ds.train.loop.engine import TrainingEngine
from janus_ds.train.loop.state import Meters


class Validator:
    """Evaluates a fixed set of batches.

    Args:
        batches: this rank's batches, as many as every other rank has; their masks never change.
    """

    def __init__(self, batches: Sequence[ValidationBatch], topology: Topology) -> None:
        self._batches = batches
        self._topology = topology
        own = sum((item.batch.counts for item in batches if item.counted), BatchCounts())
        self._counts = global_counts(own, topology)

    def losses(
        self, engine: TrainingEngine, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Each term as its mean over the whole set, and the weighted total as "loss".

        Args:
            stop: asked before each batch, on all ranks with one answer; true ends it with None.
        """
        sums: dict[str, Tensor] = {}
        with engine.evaluation():
            for item in self._batches:
                if stop():
                    return None
                report = engine.forward(item.batch, self._counts)
                add_terms(sums, report, 1.0 if item.counted else 0.0)
        return global_terms(sums, self._topology)


def add_terms(sums: dict[str, Tensor], report: LossReport, share: float = 1.0) -> None:
    """Add a micro-batch's parts to the sums of its step, its total under the name "loss"."""
    for name, value in {"loss": report.total, **report.terms}.items():
        part = value.detach().to(torch.float64) * share
        sums[name] = sums[name] + part if name in sums else part


def global_counts(counts: BatchCounts, topology: Topology) -> BatchCounts:
    """Counts over all data-parallel ranks: what losses are divided by."""
    return BatchCounts(*topology.sum_over_data(counts.values()))


def global_terms(terms: Mapping[str, Tensor], topology: Topology) -> dict[str, float]:
    """Sums of the ranks' parts of each term. One transfer, one wait for the device."""
    names = sorted(terms)
    if not names:
        return {}
    parts = torch.stack([terms[name] for name in names])
    return dict(zip(names, topology.sum_tensor_over_data(parts).tolist(), strict=True))


logger = logging.getLogger(__name__)


class BestWeights:
    """Follows `train.keep_best` from validation to validation; all ranks together.

    Args:
        meters: the best so far; brought up to date here.
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
            raise_on_all_ranks(
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
