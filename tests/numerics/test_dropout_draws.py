"""Several dropout draws in one step against one naive pass a draw, stream and sample: losses and gradients.

Dropout is replaced by a factor for each column that depends on the draw, in the product and in the reference,
so that a row that meets the wrong draw of the encoder or the decoder changes the loss.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.data.masking.collate import Collator
from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.masking.views import Views
from janus_ds.model import transformer
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.packing import pack
from janus_ds.parallel.layers import ParallelLayers
from janus_ds.train.loop.step import TrainingStep
from tests.support.naive_reference import NaiveJanus, NaiveShape, nll, smoothed, symmetric_kl
from tests.support.packed_data import run_config
from tests.support.tiny_model import SAMPLES, TINY, tiny_model
from tests.support.two_stream import TOY, Sample

TOLERANCE = 1e-12
EPS = 0.1
ORDERS = [[1, 0, 2], [0], [2, 0, 3, 1]]
"""Of the masked tokens of the samples, where AUX does not go from left to right."""
FACTORS = 0.5 + torch.rand(
    (2, 2, TINY.d_model), generator=torch.Generator().manual_seed(7), dtype=torch.double
)
"""Side (encoder, decoder), draw, column."""
TWO_PASSES = {"encoder_passes": 2}
EVERYTHING = {**TWO_PASSES, "weight_kl_ar_ar": 0.7, "weight_kl_nar_nar": 0.4, "weight_kl_aux_aux": 0.3}
CASES = {
    "ar_rdrop": ("ar_rdrop", {}, False),
    "ar_query_rdrop": ("ar_query_rdrop", {}, False),
    "released_finetune": ("released_finetune", {}, True),
    "paper-two-passes": ("paper", TWO_PASSES, False),
    "released-two-passes": ("released", TWO_PASSES, False),
    "all-of-it": ("paper", EVERYTHING, True),
    "shared-divisor": ("paper", {**EVERYTHING, "normalise": "target_tokens"}, False),
}


class NaiveDraw(NaiveJanus):
    """The reference under one draw of the encoder and one of the decoder."""

    def __init__(self, parameters: dict[str, Tensor], shape: NaiveShape, encoder: int, decoder: int) -> None:
        super().__init__(parameters, shape)
        self._factors = {"encoder": FACTORS[0, encoder], "decoder": FACTORS[1, decoder]}

    def drop(self, side: str, x: Tensor) -> Tensor:
        return x * self._factors[side]


def objective_of(preset: str, changes: dict[str, Any]) -> ObjectiveConfig:
    return replace(run_config(preset, "pair").objective, **changes)


def batch_of(objective: ObjectiveConfig, samples: list[Sample]) -> TwoStreamBatch:
    target = Ragged.from_rows([s.target for s in samples])
    masked, order = np.zeros(len(target.values), dtype=bool), np.zeros(len(target.values), dtype=np.uint64)
    for start, sample in zip(target.offsets, samples, strict=False):
        places = start + np.array(sample.masked)
        masked[places], order[places] = True, np.arange(len(places))
    views = Views(Ragged.from_rows([s.source for s in samples]), target, masked, order=order)
    return Collator(TOY, objective, TINY.max_target_positions, 2)(views, np.arange(len(samples)))


def reference(
    model: JanusModel, objective: ObjectiveConfig, samples: list[Sample]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and gradients, draw by draw, stream by stream, sample by sample."""
    leaves = {n: p.detach().clone() for n, p in model.named_parameters()}
    leaves["embedding.weight"] = leaves["embedding.weight"][: TOY.vocab_size].clone()
    leaves = {n: p.requires_grad_() for n, p in leaves.items()}
    config, draws = model.config, objective.dropout_draws
    shape = NaiveShape(config.heads, config.encoder_layers, config.decoder_layers, config.activation, 1.0)
    mask = TOY.unk if objective.mask_symbol == "unk" else TOY.mask
    ahead = 0 if objective.ar_query_position == "previous" else 1
    has = {name: bool(getattr(objective, f"weight_{name}")) for name in ("ar", "nar", "aux")}
    sums: dict[str, Tensor] = {}
    tokens = {"ar": 0, "masked": 0, "target": 0, "length": 0}

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros((), dtype=torch.double)) + value

    for sample in samples:
        gold = [sample.target[p] for p in sample.masked]
        content = list(zip(sample.target[:-1], range(len(sample.target) - 1), strict=True))
        query = [(mask, p + ahead) for _, p in content] if objective.ar_stream == "query" else []
        every, paired = [], []
        for draw in range(draws):
            # Draws of the encoder: with two passes AR has its own. A doubled batch has one draw a half.
            first = NaiveDraw(leaves, shape, draw, draw)
            second = NaiveDraw(leaves, shape, 1 - draw if objective.encoder_passes == 2 else draw, draw)
            found, ar_all = {}, None
            if has["ar"]:
                ar_all = first.ar(sample.source, content, query)
                add("ar", smoothed(ar_all, sample.target[1:], EPS))
                found["ar"] = ar_all[[p - 1 for p in sample.masked]]
            if has["nar"]:
                found["nar"] = second.nar(sample.source, sample.target, sample.masked, mask)
            if has["aux"]:
                found["aux"] = second.aux(sample.source, sample.target, sample.masked, mask)
            for name in ("nar", "aux"):
                if name in found:
                    add(name, smoothed(found[name], gold, EPS))
            for a, b in (("ar", "nar"), ("ar", "aux"), ("nar", "aux")):
                if a in found and b in found:
                    add(f"kl_{a}_{b}", symmetric_kl(found[a], found[b]))
            add("length", nll(second.length(sample.source)[None], [_length_class(objective, sample)]))
            every.append(ar_all)
            paired.append(found)
        if draws == 2:
            for name in paired[0]:
                both = every if name == "ar" else [found[name] for found in paired]
                add(f"kl_{name}_{name}", symmetric_kl(*both))
        tokens["ar"] += len(content)
        tokens["masked"] += len(gold)
        tokens["target"] += len(sample.target)
        tokens["length"] += 1
    total = torch.zeros((), dtype=torch.double)
    for name, value in sums.items():
        own = "ar" if name in ("ar", "kl_ar_ar") else "length" if name == "length" else "masked"
        count = tokens["target" if objective.normalise == "target_tokens" else own]
        copies = 1 if name in ("kl_ar_ar", "kl_nar_nar", "kl_aux_aux") else draws
        total = total + getattr(objective, f"weight_{name}") * value / (count * copies)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return total.detach(), {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(leaves.items(), gradients, strict=True)
    }


def _length_class(objective: ObjectiveConfig, sample: Sample) -> int:
    return len(sample.target) - (0 if objective.length_convention == "with_specials" else 2)


def draw_of_rows(batch: TwoStreamBatch, packs: bool) -> tuple[Tensor, Tensor]:
    """The draw of each source token and decoder row: which half of the samples it belongs to."""
    size = len(batch.sample_id_B)
    half_B1 = (torch.arange(size) >= size // batch.draws).long()[:, None]
    marked = replace(
        batch,
        source_BS=half_B1.expand_as(batch.source_BS).contiguous(),
        row_token_BR=half_B1.expand_as(batch.row_token_BR).contiguous(),
    )
    marked = pack(marked, 0, 2) if packs else marked
    return marked.source_BS, marked.row_token_BR


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What stands for dropout: the factor of each row's draw, as the hooks of a model set it."""
    state = SimpleNamespace(factor=None)

    def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        return x * state.factor[:, -x.shape[1] :] if training else x

    monkeypatch.setattr(transformer.F, "dropout", dropout)
    return state


def hook_draws(model: JanusModel, batch: TwoStreamBatch, packs: bool, state: SimpleNamespace) -> None:
    source_BS, row_BR = draw_of_rows(batch, packs)
    passes = iter(range(2))

    def encoder_starts(*_: Any) -> None:
        number = next(passes)
        draw = source_BS if number == 0 else 1 - source_BS
        state.factor = FACTORS[0][draw]

    def encoder_ends(*_: Any) -> None:
        state.factor = FACTORS[1][row_BR]

    model.encoder.register_forward_pre_hook(encoder_starts)
    model.encoder.register_forward_hook(encoder_ends)


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", ["dense", "grouped"])
@pytest.mark.parametrize("case", CASES)
def test_the_training_step_equals_naive_passes_of_each_draw(
    case: str, backend: str, packs: bool, drawn: SimpleNamespace
) -> None:
    preset, changes, reordered = CASES[case]
    objective = objective_of(preset, changes)
    samples = SAMPLES
    if reordered:
        samples = [
            replace(sample, masked=[sample.masked[i] for i in order])
            for sample, order in zip(SAMPLES, ORDERS, strict=True)
        ]
    batch = batch_of(objective, samples)
    assert batch.draws == objective.dropout_draws
    model = tiny_model(TINY)
    model.train()
    model.attention_backend = backend
    hook_draws(model, batch, packs, drawn)
    head = JanusObjective(objective, TOY.vocab_size, ParallelLayers())
    step = TrainingStep(model, head, objective.encoder_passes)
    total, _ = step(pack(batch, TOY.pad, 2) if packs else batch, batch.counts)
    total.backward()
    expected, gradients = reference(model, objective, samples)
    assert abs(float(total.detach() - expected)) < TOLERANCE
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found = found[: TOY.vocab_size] if name == "embedding.weight" else found
        assert float((found - gradients[name]).abs().max()) < TOLERANCE, name


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_second_encoder_pass_changes_nothing_without_dropout(preset: str) -> None:
    losses = []
    for passes in (1, 2):
        objective = objective_of(preset, {"encoder_passes": passes})
        batch = batch_of(objective, SAMPLES)
        for training in (True, False):
            step = TrainingStep(
                tiny_model(TINY), JanusObjective(objective, TOY.vocab_size, ParallelLayers()), passes
            ).train(training)
            losses.append(float(step(batch, batch.counts)[0].detach()))
    assert max(losses) - min(losses) < TOLERANCE


@pytest.mark.parametrize("objective", ["ar_rdrop", "released_finetune", "two-passes"])
def test_recomputation_draws_the_same_dropout(objective: str) -> None:
    """Activation checkpointing repeats each draw in the backward pass: the same gradients."""
    config = objective_of("paper", TWO_PASSES) if objective == "two-passes" else objective_of(objective, {})
    batch = batch_of(config, SAMPLES)
    dropping: ModelConfig = replace(TINY, dropout=0.3, attention_dropout=0.2)
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = JanusModel(dropping, TOY, ParallelLayers(), recompute).double().train()
        head = JanusObjective(config, TOY.vocab_size, ParallelLayers())
        torch.manual_seed(1)
        TrainingStep(model, head, config.encoder_passes)(batch, batch.counts)[0].backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
