"""What a training step asks of the device: launches counted, no waiting, nothing that grows with samples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import BenchShape, make_batch, special_tokens
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.layers import ParallelLayers
from janus_ds.train.loop.step import TrainingStep
from tests.support.operations import CountedOperations

SHAPE = BenchShape("", "pair", 3, 9, 10, 4, 32, 1)
# Answers that only the device knows: each of these makes the host wait for it.
WAITING = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "masked_select", "unique2"}
VIEWS = {"view", "t", "transpose", "slice", "expand", "detach", "unsqueeze", "squeeze", "split", "alias"}
VIEWS |= {"_unsafe_view", "select", "split_with_sizes", "as_strided", "permute", "unbind", "_reshape_alias"}

BOUND_AR, BOUND_JANUS = 395, 585
BOUND_AR_LAYER, BOUND_JANUS_LAYER = 135, 130
BOUND_GROUPED = 130


class Counted(CountedOperations):
    """Knows which operations compute something."""

    @property
    def launches(self) -> int:
        """Operations that compute something."""
        return sum(count for name, count in self.calls.items() if name not in VIEWS)


def step_calls(preset: str, shape: BenchShape, layers: int = 2) -> Counted:
    model_config = ModelConfig(
        d_model=8,
        ffn_dim=8,
        heads=2,
        encoder_layers=layers,
        decoder_layers=layers,
        max_source_positions=256,
        max_target_positions=256,
        attention_dropout=0.0,
    )
    goal = ObjectiveConfig(preset=preset)
    run = resolve(RunConfig(model=model_config, data=DataConfig(task="pair"), objective=goal))
    batch = make_batch(shape, run)
    torch.manual_seed(0)
    model = JanusModel(model_config, special_tokens(shape), ParallelLayers())
    step = TrainingStep(model, JanusObjective(run.objective, shape.vocab_size, ParallelLayers())).train()
    with Counted() as counted:
        total, _ = step(batch, batch.counts)
        torch.autograd.backward(total)
    return counted


@pytest.mark.parametrize("preset", ["ar", "paper", "released", "cmlm"])
def test_no_operation_waits_for_the_device_and_none_is_done_sample_by_sample(preset: str) -> None:
    few, many = (step_calls(preset, replace(SHAPE, samples=n)) for n in (2, 9))
    assert not WAITING & set(few.calls), WAITING & set(few.calls)
    assert few.calls == many.calls


def test_launches_of_a_step_stay_within_their_bound() -> None:
    ar, janus = step_calls("ar", SHAPE), step_calls("paper", SHAPE)
    deeper_ar, deeper_janus = step_calls("ar", SHAPE, 3), step_calls("paper", SHAPE, 3)
    # One more encoder and decoder layer, forward and backward; rows of all streams go together.
    assert deeper_ar.launches - ar.launches <= BOUND_AR_LAYER
    assert deeper_janus.launches - janus.launches <= BOUND_JANUS_LAYER
    assert ar.launches <= BOUND_AR
    assert janus.launches <= BOUND_JANUS


@pytest.mark.parametrize("length", [10, 100])
def test_long_sentences_take_a_fixed_number_of_launches_too(length: int) -> None:
    shape = replace(SHAPE, source_tokens=length, target_tokens=length, masked_tokens=length // 2)
    assert step_calls("paper", shape).launches <= BOUND_JANUS + BOUND_GROUPED
