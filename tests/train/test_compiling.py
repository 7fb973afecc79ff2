"""Compiled steps: the same losses and gradients, few compilations over many shapes, faults in words."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import BenchShape, make_batch, special_tokens
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.model.janus import JanusModel
from janus_ds.objective import chunk_math
from janus_ds.objective.chunk_math import compiler_is_at_hand
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.train import engine as compiling
from janus_ds.train.engine import TrainingStep, compile_step

CPU = torch.device("cpu")
SHAPE = BenchShape("", "pair", 3, 9, 10, 4, 32, 1)
MODEL = ModelConfig(
    d_model=8,
    ffn_dim=8,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    max_source_positions=64,
    max_target_positions=64,
    dropout=0.0,
    attention_dropout=0.0,
)
NEEDS_COMPILER = pytest.mark.skipif(not compiler_is_at_hand(CPU), reason="no C++ compiler at hand")


def make_step(layers: int = 2, recompute: bool = False) -> tuple[TrainingStep, RunConfig]:
    config = replace(MODEL, decoder_layers=layers)
    run = resolve(
        RunConfig(model=config, data=DataConfig(task="pair"), objective=ObjectiveConfig(preset="paper"))
    )
    torch.manual_seed(0)
    model = JanusModel(config, special_tokens(SHAPE), ParallelLayers(), recompute)
    return TrainingStep(model, JanusObjective(run.objective, 32, ParallelLayers())), run


def result_of(step: TrainingStep, run: RunConfig, shape: BenchShape) -> list[torch.Tensor]:
    batch = make_batch(shape, run)
    total, _ = step(batch, batch.counts)
    step.zero_grad()
    torch.autograd.backward(total)
    return [total.detach(), *(p.grad.clone() for p in step.parameters() if p.grad is not None)]


def assert_same(backend: str, layers: int = 2) -> int:
    """Compare over several shapes; the number of graphs that were made."""
    eager, run = make_step(layers)
    compiled, _ = make_step(layers)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_step(compiled, "model", CPU, backend=backend)
    for samples, length in ((3, 10), (4, 14), (5, 18), (7, 22)):
        shape = replace(
            SHAPE, samples=samples, source_tokens=length, target_tokens=length, masked_tokens=length // 2
        )
        found, expected = result_of(compiled, run, shape), result_of(eager, run, shape)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("backend", "layers"),
    [
        ("aot_eager", 1),
        ("eager", 2),
        pytest.param("aot_eager", 2, marks=pytest.mark.heavy),
    ],
)
def test_the_captured_model_gives_the_same_losses_and_is_captured_few_times(
    monkeypatch: pytest.MonkeyPatch, backend: str, layers: int
) -> None:
    # aot_eager also differentiates ahead of time; no code is generated, which takes long.
    monkeypatch.setattr(compiling, "compiler_is_at_hand", lambda device: True)
    monkeypatch.setattr(chunk_math, "_compiled", lambda function: function)
    # Four shapes, encoder and decoder: one graph each for the first, few once shapes are taken as unknown.
    assert 2 <= assert_same(backend, layers) <= 8


def test_a_captured_model_may_recompute_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "compiler_is_at_hand", lambda device: True)
    monkeypatch.setattr(chunk_math, "_compiled", lambda function: function)
    (eager, run), (saving, _) = make_step(1), make_step(1, recompute=True)
    torch._dynamo.reset()
    compile_step(saving, "model", CPU, backend="eager")
    for ours, theirs in zip(result_of(saving, run, SHAPE), result_of(eager, run, SHAPE), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.heavy
@NEEDS_COMPILER
def test_the_compiled_model_gives_the_same_losses() -> None:
    # Two of them are the head's; without dynamic shapes the model's would be eight.
    assert assert_same("inductor") <= 6 + 2


def test_a_missing_compiler_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, _ = make_step()
    monkeypatch.setattr(compiling, "compiler_is_at_hand", lambda device: False)
    with caplog.at_level(logging.WARNING):
        compile_step(step, "head", CPU)
    assert "runs uncompiled" in caplog.text
    assert not step.objective.compiled_head
    monkeypatch.setattr(compiling, "compiler_is_at_hand", lambda device: True)
    compile_step(step, "head", CPU)
    assert step.objective.compiled_head
