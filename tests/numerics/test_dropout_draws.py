"""Several dropout draws in one step against one naive pass a draw, stream and sample: losses and gradients.

Dropout is replaced by a factor for each column that depends on the draw, in the product and in the reference,
so that a row that meets the wrong draw of the encoder or the decoder changes the loss.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.model import transformer
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.packing import pack
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.train.engine import TrainingStep
from tests.support.naive_reference import NaiveJanus, NaiveShape
from tests.support.naive_step import assert_same_gradients, collated, naive_step
from tests.support.packed_data import run_config
from tests.support.tiny_model import SAMPLES, TINY, tiny_model
from tests.support.two_stream import TOY

TOLERANCE = 1e-12
CLASSES = TINY.max_target_positions
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
    batch = collated(samples, objective, CLASSES)
    assert batch.draws == objective.dropout_draws
    model = tiny_model(TINY)
    model.train()
    model.attention_backend = backend
    hook_draws(model, batch, packs, drawn)
    head = JanusObjective(objective, TOY.vocab_size, ParallelLayers())
    step = TrainingStep(model, head, objective.encoder_passes)
    total, _ = step(pack(batch, TOY.pad, 2) if packs else batch, batch.counts)
    total.backward()
    expected, gradients, _ = naive_step(model, objective, samples, NaiveDraw)
    assert abs(float(total.detach() - expected)) < TOLERANCE
    assert_same_gradients(model, gradients, TOLERANCE)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_second_encoder_pass_changes_nothing_without_dropout(preset: str) -> None:
    losses = []
    for passes in (1, 2):
        objective = objective_of(preset, {"encoder_passes": passes})
        batch = collated(SAMPLES, objective, CLASSES)
        for training in (True, False):
            step = TrainingStep(
                tiny_model(TINY), JanusObjective(objective, TOY.vocab_size, ParallelLayers()), passes
            ).train(training)
            losses.append(float(step(batch, batch.counts)[0].detach()))
    assert max(losses) - min(losses) < TOLERANCE
