"""A step of one pass over all rows against naive passes, one a draw, stream and sample: losses and gradients.

Dropout is replaced by a factor for each column that depends on the draw, in the product and in the reference,
so that a row that meets the wrong draw of the encoder or the decoder changes the loss.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.train.engine import TrainingStep
from tests.support.naive_reference import NaiveJanus, NaiveShape
from tests.support.naive_step import assert_same_gradients, collated, naive_step
from tests.support.packed_data import run_config
from tests.support.tiny_model import SAMPLES, TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY, Sample

TOLERANCE = 1e-12
CLASSES = 12
SOME = [*SAMPLES, Sample([0, 9, 5, 2], [0, 12, 13, 14, 2], [1, 3])]
ORDERS = [[1, 0, 2], [0], [2, 0, 3, 1], [1, 0]]
"""Of the masked tokens of the samples, where AUX does not go from left to right."""
FACTORS = 0.5 + torch.rand(
    (2, 2, TINY.d_model), generator=torch.Generator().manual_seed(7), dtype=torch.double
)
"""Side (encoder, decoder), draw, column."""
EVERY_KL = {"weight_kl_ar_nar": 0.7}
TWO_PASSES = {"encoder_passes": 2}
EVERYTHING = {**TWO_PASSES, "weight_kl_ar_ar": 0.7, "weight_kl_nar_nar": 0.4, "weight_kl_aux_aux": 0.3}
Case = tuple[str, str, ModelConfig, dict[str, Any]]
CASES: dict[str, Case] = {
    "paper": ("paper", "pair", TINY, EVERY_KL),
    "bart": ("paper", "denoise", TINY, {}),
    "released": ("released", "pair", TINY_NMT, {}),
    "released-bart": ("released", "denoise", TINY_NMT, EVERY_KL),
    "cmlm": ("cmlm", "pair", TINY_NMT, {}),
    "ar_query": ("ar_query", "pair", TINY, {}),
    "ar": ("ar", "pair", TINY_NMT, {}),
    "ar_rdrop": ("ar_rdrop", "pair", TINY, {}),
    "ar_query_rdrop": ("ar_query_rdrop", "pair", TINY, {}),
    "released_finetune": ("released_finetune", "pair", TINY, {}),
    "paper-two-passes": ("paper", "pair", TINY, TWO_PASSES),
    "released-two-passes": ("released", "pair", TINY, TWO_PASSES),
    "all-of-it": ("paper", "pair", TINY, EVERYTHING),
    "shared-divisor": ("paper", "pair", TINY, {**EVERYTHING, "normalise": "target_tokens"}),
}
REORDERED = ("released_finetune", "all-of-it")


class NaiveDraw(NaiveJanus):
    """The reference under one draw of the encoder and one of the decoder."""

    def __init__(self, parameters: dict[str, Tensor], shape: NaiveShape, encoder: int, decoder: int) -> None:
        super().__init__(parameters, shape)
        self._factors = {"encoder": FACTORS[0, encoder], "decoder": FACTORS[1, decoder]}

    def drop(self, side: str, x: Tensor) -> Tensor:
        return x * self._factors[side]


def objective_of(preset: str, task: str, changes: dict[str, Any]) -> ObjectiveConfig:
    return replace(run_config(preset, task).objective, label_smoothing=0.1, **changes)


def draw_of_rows(batch: TwoStreamBatch) -> tuple[Tensor, Tensor]:
    """The draw of each source token and decoder row: which half of the samples it belongs to."""
    size = len(batch.sample_id_B)
    half_B1 = (torch.arange(size) >= size // batch.draws).long()[:, None] * (batch.draws - 1)
    return half_B1.expand_as(batch.source_BS), half_B1.expand_as(batch.row_token_BR)


class Draws:
    """What stands for dropout in a model: the factor of each row's draw."""

    def __init__(self, model: JanusModel, monkeypatch: pytest.MonkeyPatch) -> None:
        model.encoder.register_forward_pre_hook(self._encoder_starts)
        model.encoder.register_forward_hook(self._encoder_ends)
        monkeypatch.setattr("torch.nn.functional.dropout", self._drop)

    def expect(self, batch: TwoStreamBatch) -> None:
        """The next forward call has this batch."""
        self._source_BS, self._row_BR = draw_of_rows(batch)
        self._passes = 0

    def _drop(self, x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
        return x * self._factor[:, -x.shape[1] :] if training else x

    def _encoder_starts(self, *_: Any) -> None:
        self._factor = FACTORS[0][self._source_BS if self._passes == 0 else 1 - self._source_BS]
        self._passes += 1

    def _encoder_ends(self, *_: Any) -> None:
        self._factor = FACTORS[1][self._row_BR]


@pytest.mark.parametrize("backend", ["dense", "grouped"])
@pytest.mark.parametrize("case", CASES)
def test_the_training_step_equals_naive_passes(
    case: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches over common counts."""
    preset, task, config, changes = CASES[case]
    objective = objective_of(preset, task, changes)
    samples = SOME
    if case in REORDERED:
        samples = [
            replace(sample, masked=[sample.masked[i] for i in order])
            for sample, order in zip(SOME, ORDERS, strict=True)
        ]
    model = tiny_model(replace(config, length_classes=CLASSES)).train()
    model.attention_backend = backend
    draws = Draws(model, monkeypatch)
    step = TrainingStep(
        model, JanusObjective(objective, TOY.vocab_size, ParallelLayers()), objective.encoder_passes
    )
    parts = (samples[:3], samples[3:])
    batches = [collated(part, objective, CLASSES) for part in parts]
    counts = sum((batch.counts for batch in batches), BatchCounts())
    total, told = torch.zeros((), dtype=torch.float64), []
    for batch in batches:
        assert batch.draws == objective.dropout_draws
        draws.expect(batch)
        loss, terms = step(batch, counts)
        loss.backward()
        total += loss.detach()
        told.append(terms)
    expected, gradients, wanted = naive_step(model, objective, samples, NaiveDraw)
    assert abs(float(total - expected)) < TOLERANCE
    # Every micro-batch reports every term, so that ranks can add them up.
    assert told[0].keys() == told[1].keys()
    for term, value in wanted.items():
        assert abs(float(sum(terms[term] for terms in told)) - value) < TOLERANCE, term
    assert_same_gradients(model, gradients, TOLERANCE)


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_second_encoder_pass_changes_nothing_without_dropout(preset: str) -> None:
    losses = []
    for passes in (1, 2):
        objective = objective_of(preset, "pair", {"encoder_passes": passes})
        batch = collated(SAMPLES, objective, CLASSES)
        head = JanusObjective(objective, TOY.vocab_size, ParallelLayers())
        for training in (True, False):
            step = TrainingStep(tiny_model(TINY), head, passes).train(training)
            losses.append(float(step(batch, batch.counts)[0].detach()))
    assert max(losses) - min(losses) < TOLERANCE
