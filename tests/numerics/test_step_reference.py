"""A step of two micro-batches against the naive reference: total, terms and gradients of all parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.data.masking.collate import Collator
from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.masking.views import Views
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.layers import ParallelLayers
from tests.support.naive_reference import NaiveJanus, NaiveShape, nll, smoothed, symmetric_kl
from tests.support.packed_data import run_config
from tests.support.tiny_model import SAMPLES, TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY, Conventions, Sample, ar_rows

TOLERANCE = 1e-12
SOME = [*SAMPLES, Sample([0, 9, 5, 2], [0, 12, 13, 14, 2], [1, 3])]


def goal(preset: str, task: str, **changes: object) -> ObjectiveConfig:
    # Smoothing and all KL weights, so that no term is left out whatever the preset.
    return replace(run_config(preset, task).objective, label_smoothing=0.1, weight_kl_ar_nar=0.7, **changes)


def collated(samples: list[Sample], objective: ObjectiveConfig, packs: bool) -> TwoStreamBatch:
    target = Ragged.from_rows([s.target for s in samples])
    masked = np.zeros(len(target.values), dtype=bool)
    for start, sample in zip(target.offsets, samples, strict=False):
        masked[start + np.array(sample.masked, dtype=np.int64)] = True
    views = Views(Ragged.from_rows([s.source for s in samples]), target, masked)
    return Collator(TOY, objective, 12, pad_multiple=3, packs_rows=packs)(views, np.arange(len(samples)))


def reference(
    model: JanusModel, samples: list[Sample], objective: ObjectiveConfig
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Total, gradients and terms, one sample and one stream at a time."""
    config = model.config
    leaves = {n: p.detach().clone() for n, p in model.named_parameters()}
    leaves["embedding.weight"] = leaves["embedding.weight"][: TOY.vocab_size].clone()
    leaves = {n: p.requires_grad_() for n, p in leaves.items()}
    scale = config.d_model**0.5 if config.scale_embedding else 1.0
    shape = NaiveShape(config.heads, config.encoder_layers, config.decoder_layers, config.activation, scale)
    naive = NaiveJanus(leaves, shape)
    how = Conventions(
        query_position=objective.ar_query_position,
        start=objective.decoder_start,
        mask=TOY.unk if objective.mask_symbol == "unk" else TOY.mask,
    )
    shift = 1 if how.start == "bos" else 0
    zero = torch.zeros((), dtype=torch.float64)
    sums = dict.fromkeys(("ar", "nar", "aux", "length", "kl_ar_nar", "kl_ar_aux", "kl_nar_aux"), zero)
    counts = dict.fromkeys(("ar", "masked", "samples", "target"), 0)
    for sample in samples:
        target, masked = sample.target, sample.masked
        gold = [target[p] for p in masked]
        content, predicted, at, query_at = ar_rows(target, how)
        query = [(how.mask, p) for p in query_at]
        ar = naive.ar(sample.source, list(zip(content, at, strict=True)), query)
        on_masked = ar[[p - shift for p in masked]]
        sums["ar"] = sums["ar"] + smoothed(ar, predicted, 0.1)
        nar = naive.nar(sample.source, target, masked, how.mask)
        sums["nar"] = sums["nar"] + smoothed(nar, gold, 0.1)
        aux = naive.aux(sample.source, target, masked, how.mask)
        sums["aux"] = sums["aux"] + smoothed(aux, gold, 0.1)
        for pair, a, b in (("ar_nar", on_masked, nar), ("ar_aux", on_masked, aux), ("nar_aux", nar, aux)):
            sums[f"kl_{pair}"] = sums[f"kl_{pair}"] + symmetric_kl(a, b)
        inner = len(target) - (0 if objective.length_convention == "with_specials" else 2)
        sums["length"] = sums["length"] + nll(naive.length(sample.source)[None], [min(inner, 11)])
        for name, more in (("ar", predicted), ("masked", masked), ("samples", [0]), ("target", target)):
            counts[name] += len(more)
    own = {"ar": "ar", "length": "samples"}
    total, terms = zero, {}
    for name, value in sums.items():
        count = counts[own.get(name, "masked")]
        terms[name] = float(value / count)
        divisor = counts["target"] if objective.normalise == "target_tokens" else count
        total = total + getattr(objective, f"weight_{name}") * value / divisor
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(leaves.items(), gradients, strict=True)
    }
    return total.detach(), named, terms


PRESETS = [("paper", "pair", TINY), ("released", "denoise", replace(TINY_NMT, length_classes=12))]


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["dense", "grouped"])
@pytest.mark.parametrize("preset", PRESETS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_the_step_equals_the_reference(
    preset: tuple[str, str, ModelConfig], backend: str, packs: bool
) -> None:
    """Two micro-batches over common counts."""
    name, task, config = preset
    config = replace(config, length_classes=12)
    objective = goal(name, task)
    model = tiny_model(config)
    model.attention_backend = backend
    batches = [collated(samples, objective, packs) for samples in (SOME[:3], SOME[3:])]
    counts = sum((batch.counts for batch in batches), BatchCounts())
    head = JanusObjective(objective, TOY.vocab_size, ParallelLayers())
    reports = [head(model(batch), batch, counts) for batch in batches]
    total = sum((report.total for report in reports), torch.zeros((), dtype=torch.float64))
    total.backward()
    expected, gradients, terms = reference(model, SOME, objective)
    assert abs(float(total.detach() - expected)) < TOLERANCE
    # Every micro-batch reports every term, so that ranks can add them up.
    assert reports[0].terms.keys() == reports[1].terms.keys()
    for term, value in terms.items():
        assert abs(float(sum(report.terms[term] for report in reports)) - value) < TOLERANCE, term
    for parameter, gradient in gradients.items():
        found = dict(model.named_parameters())[parameter].grad
        found = torch.zeros_like(gradient) if found is None else found[: len(gradient)]
        assert float((found - gradient).abs().max()) < TOLERANCE, parameter
