"""A step of one pass over all rows against separate naive passes: total, terms and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from janus_ds.batch import BatchCounts
from janus_ds.config.schema import ModelConfig
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.naive_step import assert_same_gradients, collated, naive_step
from tests.support.packed_data import run_config
from tests.support.tiny_model import SAMPLES, TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY, Sample

TOLERANCE = 1e-12
SOME = [*SAMPLES, Sample([0, 9, 5, 2], [0, 12, 13, 14, 2], [1, 3])]
EVERY_KL = {"weight_kl_ar_nar": 0.7}
CASES: dict[str, tuple[str, str, ModelConfig, dict[str, Any]]] = {
    "paper": ("paper", "pair", TINY, EVERY_KL),
    "bart": ("paper", "denoise", TINY, {}),
    "released": ("released", "pair", TINY_NMT, {}),
    "released-bart": ("released", "denoise", TINY_NMT, EVERY_KL),
    "cmlm": ("cmlm", "pair", TINY_NMT, {}),
    "ar_query": ("ar_query", "pair", TINY, {}),
    "ar": ("ar", "pair", TINY_NMT, {}),
}


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["dense", "grouped"])
@pytest.mark.parametrize("case", CASES)
def test_the_training_step_equals_separate_passes(case: str, backend: str, packs: bool) -> None:
    """Two micro-batches over common counts."""
    preset, task, config, changes = CASES[case]
    config = replace(config, length_classes=12)
    objective = replace(run_config(preset, task).objective, label_smoothing=0.1, **changes)
    model = tiny_model(config)
    model.attention_backend = backend
    batches = [collated(samples, objective, 12, packs) for samples in (SOME[:3], SOME[3:])]
    counts = sum((batch.counts for batch in batches), BatchCounts())
    head = JanusObjective(objective, TOY.vocab_size, ParallelLayers())
    reports = [head(model(batch), batch, counts) for batch in batches]
    total = sum((report.total for report in reports), torch.zeros((), dtype=torch.float64))
    total.backward()
    expected, gradients, terms = naive_step(model, objective, SOME)
    assert abs(float(total.detach() - expected)) < TOLERANCE
    # Every micro-batch reports every term, so that ranks can add them up.
    assert reports[0].terms.keys() == reports[1].terms.keys()
    for term, value in terms.items():
        assert abs(float(sum(report.terms[term] for report in reports)) - value) < TOLERANCE, term
    assert_same_gradients(model, gradients, TOLERANCE)
