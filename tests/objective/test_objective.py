"""Which terms the objective takes, what it divides them by, and what it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from janus_ds.batch import BatchCounts, PredictedRows, RowLayout, TwoStreamBatch
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ObjectiveConfig, RunConfig
from janus_ds.objective.janus_objective import JanusObjective, LossReport
from janus_ds.parallel.tensor_parallel import make_layers
from tests.support import literal_losses as literal

COUNTS = BatchCounts(2, source_tokens=9, target_tokens=5, ar_tokens=3, masked_tokens=2)


def literal_batch() -> TwoStreamBatch:
    """Two samples: two AR rows, of which the second is masked; and one AR row, which is masked."""
    none = torch.zeros(2, 0, dtype=torch.int64)
    return TwoStreamBatch(
        layout=RowLayout(arc=2, vis=0, cmp=1, msk=1, arq=2, qry=1),
        counts=COUNTS,
        sample_id_B=torch.arange(2),
        source_BS=none,
        source_length_B=torch.tensor([5, 4]),
        row_token_BR=none,
        row_position_BR=none,
        ar_length_B=torch.tensor([2, 1]),
        visible_length_B=torch.tensor([2, 1]),
        masked_length_B=torch.tensor([1, 1]),
        ar_target_BA=torch.tensor([[0, 1], [2, 1]]),
        masked_target_BM=literal.MASKED_TARGET[:, None],
        length_target_B=literal.LENGTH_TARGET,
        ar_unmasked_U=torch.tensor([0]),
        ar_masked_T=torch.tensor([1, 2]),
        masked_T=torch.tensor([0, 1]),
    )


def literal_rows() -> PredictedRows:
    """Hidden rows that are the literal logits, since the output table is the identity."""
    padding = torch.full((1, 4), 99.0, dtype=torch.float64)
    # Two rows of padding below the vocabulary: they would win every softmax if they took part.
    table = torch.cat([torch.eye(4, dtype=torch.float64), torch.full((2, 4), 7.0, dtype=torch.float64)])
    return PredictedRows(
        ar_BAD=torch.cat([literal.AR, padding]).view(2, 2, 4).requires_grad_(),
        nar_BMD=literal.NAR[:, None].clone().requires_grad_(),
        aux_BMD=literal.AUX[:, None].clone().requires_grad_(),
        length_logits_BK=literal.LENGTH.clone().requires_grad_(),
        output_weight=table.requires_grad_(),
    )


def objective(task: str, **overrides: object) -> JanusObjective:
    run = RunConfig(data=DataConfig(task=task), objective=ObjectiveConfig(**overrides))  # type: ignore[arg-type]
    return JanusObjective(resolve(run).objective, 4, make_layers(1))


def report_of(
    module: JanusObjective, rows: PredictedRows | None = None, counts: BatchCounts = COUNTS
) -> LossReport:
    report: LossReport = module(rows or literal_rows(), literal_batch(), counts)
    return report


def test_literal_table_of_the_released_translation_preset() -> None:
    report = report_of(objective("pair", preset="released"))
    assert {name: float(value) for name, value in report.terms.items()} == pytest.approx(
        literal.PRINTED, abs=5e-7
    )
    # The printed figure came out of float32.
    assert float(report.total) == pytest.approx(literal.RELEASED_TRANSLATION, abs=1e-6)


def test_released_pretraining_divides_all_sums_by_the_target_tokens() -> None:
    report = report_of(objective("denoise", preset="released"))
    assert 5 * float(report.total) == pytest.approx(literal.RELEASED_PRETRAINING, abs=5e-6)
    # Terms stay means over their own tokens, so that they compare with ln V.
    assert float(report.terms["nar_nll"]) == pytest.approx(literal.PRINTED["nar_nll"], abs=5e-7)
    assert float(report.terms["ar"]) == float(report.terms["ar_nll"])
    assert "kl_ar_nar" not in report.terms


def test_paper_total_is_equation_5_and_the_length_term() -> None:
    p = literal.PRINTED
    wanted = p["ar"] + p["nar"] + p["aux"] + 2 * p["kl_ar_aux"] + 2 * p["kl_nar_aux"] + 0.1 * p["length"]
    assert float(report_of(objective("pair", preset="paper")).total) == pytest.approx(wanted, abs=3e-6)


def test_streams_without_a_weight_are_left_out_of_training_but_evaluated() -> None:
    module = objective("pair", preset="cmlm", weight_nar=0.0, weight_aux=1.0, weight_length=0.0)
    rows = replace(literal_rows(), ar_BAD=None)
    trained = report_of(module, rows)
    assert set(trained.terms) == {"aux", "aux_nll", "length"}
    assert float(trained.total.detach()) == pytest.approx(literal.PRINTED["aux"], abs=5e-7)
    with torch.no_grad():
        evaluated = report_of(module, rows)
    assert float(evaluated.terms["nar_nll"]) == pytest.approx(literal.PRINTED["nar_nll"], abs=5e-7)
    torch.testing.assert_close(evaluated.total, trained.total.detach(), rtol=0, atol=0)


def test_terms_carry_no_gradient_and_empty_counts_do_not_divide_by_zero() -> None:
    module = objective("pair", preset="paper")
    assert not any(value.requires_grad for value in report_of(module).terms.values())
    empty = report_of(module, counts=BatchCounts())
    assert all(torch.isfinite(value) for value in (empty.total, *empty.terms.values()))
