"""Plain loss terms against literal figures and their definitions (equations 1 to 5)."""

from __future__ import annotations

import pytest
import torch

from janus_ds.objective.janus_objective import length_cross_entropy
from tests.support.literal_losses import (
    AR,
    AR_TARGET,
    AUX,
    LENGTH,
    LENGTH_TARGET,
    MASKED_TARGET,
    NAR,
    PRINTED,
)
from tests.support.plain_losses import label_smoothed_cross_entropy, symmetric_kl


def mean(values: torch.Tensor) -> float:
    return float(values.mean())


@pytest.mark.parametrize(
    ("stream", "logits", "target"),
    [("ar", AR, AR_TARGET), ("nar", NAR, MASKED_TARGET), ("aux", AUX, MASKED_TARGET)],
)
def test_cross_entropies_of_the_literal_table(
    stream: str, logits: torch.Tensor, target: torch.Tensor
) -> None:
    smoothed, nll = label_smoothed_cross_entropy(logits, target, 0.1)
    assert mean(smoothed) == pytest.approx(PRINTED[stream], abs=5e-7)
    assert mean(nll) == pytest.approx(PRINTED[f"{stream}_nll"], abs=5e-7)


def test_kl_and_length_of_the_literal_table() -> None:
    assert mean(symmetric_kl(AR[1:], NAR)) == pytest.approx(PRINTED["kl_ar_nar"], abs=5e-7)
    assert mean(symmetric_kl(NAR, AUX)) == pytest.approx(PRINTED["kl_nar_aux"], abs=5e-7)
    assert mean(symmetric_kl(AR[1:], AUX)) == pytest.approx(PRINTED["kl_ar_aux"], abs=5e-7)
    assert mean(length_cross_entropy(LENGTH, LENGTH_TARGET)) == pytest.approx(PRINTED["length"], abs=5e-7)


def test_smoothing_follows_its_definition() -> None:
    smoothed, nll = label_smoothed_cross_entropy(AR, AR_TARGET, 0.3)
    uniform = -AR.log_softmax(-1).mean(-1)
    torch.testing.assert_close(smoothed, 0.7 * nll + 0.3 * uniform, rtol=0, atol=1e-14)
    torch.testing.assert_close(label_smoothed_cross_entropy(AR, AR_TARGET, 0.0)[0], nll, rtol=0, atol=0)


def test_kl_is_symmetric_non_negative_and_zero_for_equal_rows() -> None:
    a, b = torch.randn(2, 50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    forward = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    backward = (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(symmetric_kl(a, b), (forward + backward) / 2)
    torch.testing.assert_close(symmetric_kl(a, b), symmetric_kl(b, a))
    assert (symmetric_kl(a, b) > 0).all()
    assert symmetric_kl(a, a + 5.0).abs().max() < 1e-14


def test_sixteen_bit_logits_are_computed_in_float32() -> None:
    smoothed, nll = label_smoothed_cross_entropy(AR.bfloat16(), AR_TARGET, 0.1)
    assert smoothed.dtype == nll.dtype == torch.float32
    assert symmetric_kl(AR[1:].half(), NAR.half()).dtype == torch.float32
    assert mean(nll) == pytest.approx(PRINTED["ar_nll"], abs=1e-6)
