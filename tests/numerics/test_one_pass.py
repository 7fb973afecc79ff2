"""One pass over all rows against separate passes written from the paper: losses and every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from janus_ds.batch import PredictedRows, TwoStreamBatch
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.layers import ParallelLayers
from tests.support.naive_reference import NaiveJanus, NaiveShape, nll, smoothed, symmetric_kl
from tests.support.tiny_model import SAMPLES, TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY, Conventions, ar_rows, make_batch

TOLERANCE = 1e-12
EPS = 0.1
TERMS = ("ar", "nar", "aux", "length", "kl_ar_nar", "kl_ar_aux", "kl_nar_aux")


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    how: Conventions
    weights: dict[str, float]
    backend: str = "dense"


def weights(*values: float) -> dict[str, float]:
    return dict(zip(TERMS, values, strict=True))


PAPER = weights(1, 1, 1, 0.1, 0, 2, 2)
RELEASED = weights(1, 0.5, 0.5, 0.1, 1, 3, 1)
CASES = [
    Case("paper", TINY, Conventions(), PAPER),
    Case("paper-grouped", TINY, Conventions(), PAPER, "grouped"),
    Case("released", TINY_NMT, Conventions(query_position="previous", mask=TOY.unk), RELEASED),
    Case("bart", TINY, Conventions(start="eos_bos", extra_padding=3), PAPER, "grouped"),
    Case("cmlm", TINY_NMT, Conventions(rows=frozenset({"vis", "msk"})), weights(0, 1, 0, 0.1, 0, 0, 0)),
    Case("ar_query", TINY, Conventions(rows=frozenset({"arc", "arq"})), weights(1, 0, 0, 0, 0, 0, 0)),
    Case("ar", TINY_NMT, Conventions(rows=frozenset({"arc"})), weights(1, 0, 0, 0, 0, 0, 0)),
]


def naive_losses(model: JanusModel, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss and the gradient of every parameter, from the reference."""
    config, how = case.config, case.how
    leaves = {n: p.detach().clone() for n, p in model.named_parameters()}
    leaves["embedding.weight"] = leaves["embedding.weight"][: TOY.vocab_size].clone()
    leaves = {n: p.requires_grad_() for n, p in leaves.items()}
    scale = config.d_model**0.5 if config.scale_embedding else 1.0
    naive = NaiveJanus(
        leaves,
        NaiveShape(config.heads, config.encoder_layers, config.decoder_layers, config.activation, scale),
    )
    sums = {term: torch.zeros((), dtype=torch.float64) for term in TERMS}
    counts = dict.fromkeys(("ar", "masked", "length"), 0)
    shift = 1 if how.start == "bos" else 0
    for sample in SAMPLES:
        target, masked = sample.target, sample.masked
        gold = [target[p] for p in masked]
        content, predicted, at, query_at = ar_rows(target, how)
        ar = nar = aux = None
        if "arc" in how.rows:
            query = [(how.mask, p) for p in query_at] if "arq" in how.rows else []
            ar = naive.ar(sample.source, list(zip(content, at, strict=True)), query)
            sums["ar"] = sums["ar"] + smoothed(ar, predicted, EPS)
            counts["ar"] += len(predicted)
            ar = ar[[p - shift for p in masked]]
        if "msk" in how.rows:
            nar = naive.nar(sample.source, target, masked, how.mask)
            sums["nar"] = sums["nar"] + smoothed(nar, gold, EPS)
            counts["masked"] += len(masked)
        if "qry" in how.rows:
            aux = naive.aux(sample.source, target, masked, how.mask)
            sums["aux"] = sums["aux"] + smoothed(aux, gold, EPS)
        for pair, a, b in (("ar_nar", ar, nar), ("ar_aux", ar, aux), ("nar_aux", nar, aux)):
            if a is not None and b is not None:
                sums[f"kl_{pair}"] = sums[f"kl_{pair}"] + symmetric_kl(a, b)
        sums["length"] = sums["length"] + nll(naive.length(sample.source)[None], [len(target) - 2])
        counts["length"] += 1
    total = torch.zeros((), dtype=torch.float64)
    for term, value in sums.items():
        count = counts[term if term in counts else "masked"]
        total = total + case.weights[term] * value / max(count, 1)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return total.detach(), {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(leaves.items(), gradients, strict=True)
    }


def plain_total(rows: PredictedRows, batch: TwoStreamBatch, case: Case) -> Tensor:
    """The same total from the model's hidden rows, with autograd losses."""
    table = rows.output_weight[: TOY.vocab_size]

    def picked(hidden: Tensor | None, index: Tensor) -> Tensor | None:
        return None if hidden is None else hidden.flatten(0, 1)[index] @ table.T

    counts, w = batch.counts, case.weights
    gold = batch.masked_target_BM.flatten()[batch.masked_T].tolist()
    everything = torch.cat([batch.ar_unmasked_U, batch.ar_masked_T])
    ar_all = picked(rows.ar_BAD, everything)
    ar = picked(rows.ar_BAD, batch.ar_masked_T) if gold else None
    nar, aux = picked(rows.nar_BMD, batch.masked_T), picked(rows.aux_BMD, batch.masked_T)
    total = torch.zeros((), dtype=torch.float64)
    if ar_all is not None:
        targets = batch.ar_target_BA.flatten()[everything].tolist()
        assert len(targets) == counts.ar_tokens
        total = total + w["ar"] * smoothed(ar_all, targets, EPS) / counts.ar_tokens
    for term, logits in (("nar", nar), ("aux", aux)):
        if logits is not None:
            total = total + w[term] * smoothed(logits, gold, EPS) / counts.masked_tokens
    for pair, a, b in (("ar_nar", ar, nar), ("ar_aux", ar, aux), ("nar_aux", nar, aux)):
        if a is not None and b is not None:
            total = total + w[f"kl_{pair}"] * symmetric_kl(a, b) / counts.masked_tokens
    assert rows.length_logits_BK is not None
    length = nll(rows.length_logits_BK, batch.length_target_B.tolist()) / counts.samples
    return total + w["length"] * length


def model_gradients(model: JanusModel) -> dict[str, Tensor]:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    beyond = found["embedding.weight"][TOY.vocab_size :]
    assert not beyond.any(), "rows beyond the vocabulary take no part"
    return found | {"embedding.weight": found["embedding.weight"][: TOY.vocab_size]}


def assert_same(total: Tensor, model: JanusModel, case: Case) -> None:
    total.backward()
    reference, gradients = naive_losses(model, case)
    assert abs(float(total.detach() - reference)) < TOLERANCE
    found = model_gradients(model)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((found[name] - gradient).abs().max()) < TOLERANCE, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_pass_with_autograd_losses_equals_separate_passes(case: Case) -> None:
    model = tiny_model(case.config)
    model.attention_backend = case.backend
    batch = make_batch(SAMPLES, case.how)
    assert_same(plain_total(model(batch), batch, case), model, case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_training_step_equals_separate_passes(case: Case) -> None:
    """The same with the product's objective, whose gradients are formulas, over two micro-batches."""
    model = tiny_model(case.config)
    model.attention_backend = case.backend
    config = ObjectiveConfig(
        label_smoothing=EPS, normalise="per_term", **{f"weight_{k}": v for k, v in case.weights.items()}
    )
    objective = JanusObjective(config, TOY.vocab_size, ParallelLayers())
    batches = [make_batch(SAMPLES[:2], case.how), make_batch(SAMPLES[2:], case.how)]
    counts = batches[0].counts + batches[1].counts
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        total = total + objective(model(batch), batch, counts).total
    assert_same(total, model, case)
