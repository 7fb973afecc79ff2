"""Compiled chunk mathematics: the values of the eager head, and no compilation anew when numbers change."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from janus_ds.objective import chunk_math
from janus_ds.objective.chunk_math import Terms, VocabSlice, chunk_losses, compiler_is_at_hand, logit_gradient
from janus_ds.objective.fused_head import fused_head
from janus_ds.parallel.layers import ParallelLayers
from tests.support.head_cases import CASES, HeadCase, gradients, make_inputs, make_plan, reference

NEEDS_COMPILER = pytest.mark.skipif(
    not compiler_is_at_hand(torch.device("cpu")), reason="no C++ compiler at hand"
)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions as they are written, without a compiler."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(chunk_math, "_compiled", lru_cache(chunk_math._compiled.__wrapped__))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_compiled_equals_autograd_of_the_plain_losses(case: HeadCase, chunk_rows: int | None) -> None:
    inputs = make_inputs(case)
    plan = make_plan(case, inputs, ParallelLayers(), chunk_rows, compiled=True)
    total, sums = fused_head(inputs.hidden, inputs.weight_VD, plan)
    expected, expected_sums = reference(case, inputs)
    assert abs(float(total - expected)) < 1e-12
    for name, value in expected_sums.items():
        assert abs(float(sums[name] - value)) < 1e-12, name
    found, wanted = gradients(total, inputs), gradients(expected, inputs)
    for name, gradient in wanted.items():
        difference = found[name][:29] - gradient[:29] if name == "weight" else found[name] - gradient
        assert float(difference.abs().max()) < 1e-12, name


def test_a_compiler_that_fails_is_told_and_the_head_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        raise torch._dynamo.exc.TorchDynamoException("file too short")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    monkeypatch.setattr(chunk_math, "_compiled", lru_cache(chunk_math._compiled.__wrapped__))
    inputs = make_inputs(CASES[0])
    plan = make_plan(CASES[0], inputs, ParallelLayers(), 4, compiled=True)
    total, _ = fused_head(inputs.hidden, inputs.weight_VD, plan)
    assert abs(float(total - reference(CASES[0], inputs)[0])) < 1e-12
    assert caplog.text.count("runs uncompiled: file too short") == 2, "once for each function"


@pytest.mark.heavy
@NEEDS_COMPILER
def test_the_compiled_chunk_equals_the_eager_one_and_is_compiled_once() -> None:
    torch.manual_seed(0)
    terms = Terms((0.5, 0.25, 1.0), ((0, 2, 2.0), (1, 2, 0.5)), 0.1)
    vocab = VocabSlice(50, 0, 50, ParallelLayers())
    torch._dynamo.utils.counters.clear()
    for number, tokens in enumerate((7, 5, 12)):
        z_GnV = torch.randn(3, tokens, 50, dtype=torch.float64)
        target_n = torch.randint(0, 50, (tokens,))
        # Other coefficients and another number of rows: what changes from step to step.
        now = replace(terms, ce=(0.5 + number, 0.25, 1.0))
        expected_z = z_GnV.clone()
        result = chunk_losses(expected_z, target_n, now, vocab, torch.empty_like(z_GnV))
        expected = logit_gradient(expected_z, result, now, vocab)
        sums = chunk_math.chunk_gradient(z_GnV, target_n, now, vocab)
        assert float((sums - result.sums).abs().max()) < 1e-12
        assert float((z_GnV - expected).abs().max()) < 1e-12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
