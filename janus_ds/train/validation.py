"""Losses on held-out samples, the same numbers on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from janus_ds.batch import BatchCounts
from janus_ds.data.loader import ValidationBatch
from janus_ds.objective.janus_objective import LossReport
from janus_ds.parallel.topology import Topology
from janus_ds.train.engine import TrainingEngine

__all__ = ["Validator", "add_terms", "global_counts", "global_terms"]


class Validator:
    """Evaluates a fixed set of batches.

    Args:
        batches: this rank's batches, as many as every other rank has; their masks never change.
        topology: the ranks that share the set.
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
            engine: the model.
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
