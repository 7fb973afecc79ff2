"""The JANUS objective: named sums over global counts (equations 1 to 5 of the paper).

    total = sum_g w_g LS_g / N_g + sum_gh w_gh K_gh / M + w_length CE_length / B

N_g counts the tokens that stream g predicts, M the masked tokens, B the samples, each in the whole step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ds.batch import BatchCounts, PredictedRows, TwoStreamBatch
from janus_ds.config.schema import KL_PAIRS, STREAMS, ObjectiveConfig
from janus_ds.objective.chunk_math import Terms
from janus_ds.objective.fused_head import HeadPlan, RowGroup, fused_head
from janus_ds.parallel.tensor_parallel import ParallelLayers

_PAIRS = tuple((first, second) for first, second in KL_PAIRS if first != second)
_SAME_STREAM = tuple(f"kl_{name}_{name}" for name in STREAMS)
_TERMS = (*STREAMS, "length", *(f"kl_{first}_{second}" for first, second in KL_PAIRS))


@dataclass(frozen=True)
class LossReport:
    """What a micro-batch adds to the losses of its step.

    Attributes:
        total: the weighted loss, with gradient, 0-dim.
        terms: "ar", "nar", "aux" (label-smoothed), "ar_nll", "nar_nll", "aux_nll", "length",
            "kl_ar_nar", "kl_ar_aux", "kl_nar_aux", and between two dropout draws "kl_ar_ar", "kl_nar_nar",
            "kl_aux_aux". In training "length" and those with a weight; in evaluation also the losses of
            all streams that have rows. In nats, unweighted, without gradient, float64, each divided by its
            own global count: the sum over micro-batches and ranks is the mean over the step.
    """

    total: Tensor
    terms: dict[str, Tensor]


class JanusObjective(nn.Module):
    """Turns hidden rows into the losses of one micro-batch.

    Under ZeRO-3 the output table must be gathered while this module runs: register it as an external
    parameter of the module that calls model and objective. The backward pass does not need it.

    Args:
        config: resolved objective (no field is None).
        vocab_size: symbols; further rows of the output table are padding and take no part.

    Attributes:
        compiled_head: whether training compiles the mathematics of the losses.
    """

    def __init__(self, config: ObjectiveConfig, vocab_size: int, parallel: ParallelLayers) -> None:
        super().__init__()
        self.compiled_head = False
        self._vocab_size = vocab_size
        self._parallel = parallel
        self._smoothing = float(config.label_smoothing or 0.0)
        self._by_target_tokens = config.normalise == "target_tokens"
        self._weight = {term: float(getattr(config, f"weight_{term}") or 0.0) for term in _TERMS}
        self._trained = config.streams

    def forward(
        self,
        rows: PredictedRows,
        batch: TwoStreamBatch,
        counts: BatchCounts,
        factors: Mapping[str, float] | None = None,
    ) -> LossReport:
        """Losses of `batch`, whose sums are divided by `counts` of the whole step.

        Args:
            counts: over all micro-batches and data-parallel ranks of the step.
            factors: what weights are multiplied by at this step (:func:`ramp_factors`); absent ones are 1.
        """
        hidden = self._hidden(rows)
        scales = self._scales(counts, factors or {})
        groups = self._groups(batch, tuple(hidden), scales)
        plan = HeadPlan(groups, self._vocab_size, self._parallel, compiled=self.compiled_head)
        total, sums = fused_head(hidden, rows.output_weight, plan)
        if rows.length_logits_BK is not None:
            length = length_cross_entropy(rows.length_logits_BK, batch.length_target_B).sum()
            sums["length"] = length.detach().double()
            total = total + scales["length"] * length
        terms = {name: value / max(1, _own_count(name, counts)) for name, value in sums.items()}
        return LossReport(total, terms)

    def _hidden(self, rows: PredictedRows) -> dict[str, Tensor]:
        """Hidden rows by stream, (B * rows, D); in training, without streams that no weight asks for."""
        streams = {"ar": rows.ar_BAD, "nar": rows.nar_BMD, "aux": rows.aux_BMD}
        everything = not torch.is_grad_enabled()
        return {
            name: hidden.flatten(0, 1)
            for name, hidden in streams.items()
            if hidden is not None and (everything or name in self._trained)
        }

    def _groups(
        self, batch: TwoStreamBatch, names: tuple[str, ...], scales: Mapping[str, float]
    ) -> tuple[RowGroup, ...]:
        """The masked tokens, which all streams predict, and the unmasked ones, which AR alone predicts."""
        groups = []
        masked = any(name != "ar" for name in names)
        if masked:
            rows = {"ar": batch.ar_masked_T, "nar": batch.masked_T, "aux": batch.masked_T}
            target_T = batch.masked_target_BM.flatten()[batch.masked_T]
            groups.append(self._group(names, rows, target_T, batch.draws, scales))
        if "ar" in names:
            ar_rows = batch.ar_unmasked_U
            if not masked:
                # All tokens of AR, sample by sample: the halves are the two draws.
                ar_rows = torch.cat([ar_rows, batch.ar_masked_T]).sort().values
            target_U = batch.ar_target_BA.flatten()[ar_rows]
            groups.append(self._group(("ar",), {"ar": ar_rows}, target_U, batch.draws, scales))
        return tuple(groups)

    def _group(
        self,
        names: tuple[str, ...],
        index: dict[str, Tensor],
        target_n: Tensor,
        draws: int,
        scales: Mapping[str, float],
    ) -> RowGroup:
        """Rows of all draws; KL terms pair streams inside a draw, and a stream with itself over two."""
        streams = names * draws
        pairs = []
        for first, second in _PAIRS:
            coefficient = scales[f"kl_{first}_{second}"]
            if first in names and second in names and coefficient:
                places = (names.index(first), names.index(second))
                starts = range(0, len(streams), len(names))
                pairs += [(start + places[0], start + places[1], coefficient) for start in starts]
        if draws == 2:
            for place, name in enumerate(names):
                if scales[f"kl_{name}_{name}"]:
                    pairs.append((place, place + len(names), scales[f"kl_{name}_{name}"]))
        terms = Terms(tuple(scales[name] for name in streams), tuple(pairs), self._smoothing)
        rows = tuple(index[name].tensor_split(draws)[draw] for draw in range(draws) for name in names)
        return RowGroup(streams, rows, target_n.tensor_split(draws)[0], terms)

    def _scales(self, counts: BatchCounts, factors: Mapping[str, float]) -> dict[str, float]:
        """Weight of each sum in the total; `released` pretraining divides all by the target tokens."""
        scales = {}
        for name, weight in self._weight.items():
            divisor = float(max(1, _own_count(name, counts)))
            if self._by_target_tokens:
                # A pair of draws stands for both.
                divisor = max(1, counts.target_tokens) / (2 if name in _SAME_STREAM else 1)
            scales[name] = weight * factors.get(name, 1.0) / divisor
        return scales


def _own_count(name: str, counts: BatchCounts) -> int:
    """Global count of the tokens (or samples) that a term sums over."""
    if name == "length":
        return counts.samples
    if name in _SAME_STREAM:
        # A pair of draws counts once.
        return _own_count(name.split("_")[1], counts) // 2
    return counts.ar_tokens if name in ("ar", "ar_nll") else counts.masked_tokens


def length_cross_entropy(logits_BK: Tensor, class_B: Tensor) -> Tensor:
    """Cross-entropy of the length head, without smoothing; shape (B,)."""
    return F.cross_entropy(
        logits_BK if logits_BK.dtype == torch.float64 else logits_BK.float(), class_B, reduction="none"
    )


def ramp_factors(config: ObjectiveConfig, step: int) -> dict[str, float]:
    """Factors between 0 and 1 by loss term, for update `step`, counted from 0; terms without a ramp are 1.

    Before `ramp_start` a ramped term has factor 0; the first update of a ramp of n has 1/n, the n-th 1.
    """
    steps = {
        "nar": config.ramp_nar_steps,
        "aux": config.ramp_aux_steps,
        **{f"kl_{first}_{second}": config.ramp_kl_steps for first, second in KL_PAIRS},
    }
    done = max(step + 1 - config.ramp_start, 0)
    return {term: min(done / length, 1.0) for term, length in steps.items() if length}
