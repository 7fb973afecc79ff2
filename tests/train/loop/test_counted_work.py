"""Work of a training step, counted: multiply-adds of every product it asks for, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import BenchShape, make_batch, special_tokens
from janus_ds.batch import TwoStreamBatch
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.layers import ParallelLayers
from janus_ds.train.loop.step import TrainingStep

SCALE = 8
# BART-base at 512 / 512 tokens with width, length and vocabulary divided by SCALE: every product shrinks by
# the same factor, so the ratios are those of the full shape (2.24 for the whole objective).
SHAPE = BenchShape("", "denoise", 2, 512 // SCALE, 512 // SCALE, 256 // SCALE, 50265 // SCALE, 1)
MODEL = ModelConfig(
    d_model=768 // SCALE,
    ffn_dim=3072 // SCALE,
    heads=2,
    encoder_layers=6,
    decoder_layers=6,
    max_source_positions=128,
    max_target_positions=128,
    dropout=0.0,
    attention_dropout=0.0,
)
# Counted by hand: 2.24; grouped attention computes more pairs than count, and rows of eos come on top.
MOST = 2.30


class Products(TorchDispatchMode):
    """Multiply-adds of matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if name in ("mm", "addmm", "addmm_", "bmm"):
            first, second = tensors[-2:]
            self.work += first.numel() * second.shape[-1]
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            q, k, _ = tensors[:3]
            self.work += 2 * q.numel() * k.shape[2]
        elif name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            _, q, k = tensors[:3]
            self.work += 4 * q.numel() * k.shape[2]
        return func(*args, **(kwargs or {}))


def step_of(preset: str) -> tuple[TrainingStep, TwoStreamBatch]:
    goal = ObjectiveConfig(preset=preset)
    run = resolve(RunConfig(model=MODEL, data=DataConfig(task="denoise"), objective=goal))
    torch.manual_seed(0)
    model = JanusModel(MODEL, special_tokens(SHAPE), ParallelLayers())
    step = TrainingStep(model, JanusObjective(run.objective, SHAPE.vocab_size, ParallelLayers()))
    return step.train(), make_batch(SHAPE, run)


def work_of(preset: str) -> int:
    step, batch = step_of(preset)
    with Products() as counted:
        total, _ = step(batch, batch.counts)
        torch.autograd.backward(total)
    return counted.work


def test_work_against_plain_ar_stays_within_its_bound() -> None:
    n, m, samples = SHAPE.target_tokens, SHAPE.masked_tokens, SHAPE.samples
    assert step_of("paper")[1].row_token_BR.numel() == samples * (3 * n + 2 * m)
    assert work_of("paper") / work_of("ar") <= MOST


def test_the_vocabulary_meets_predicted_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits: AR's predicted tokens, and the masked ones for NAR and for AUX."""
    from janus_ds.objective import fused_head

    seen: list[int] = []
    plain = fused_head._Head._logits

    def logits(self: Any, h_ND: torch.Tensor) -> torch.Tensor:
        seen.append(len(h_ND))
        return plain(self, h_ND)

    monkeypatch.setattr(fused_head._Head, "_logits", logits)
    step, batch = step_of("paper")
    step(batch, batch.counts)
    assert sum(seen) == batch.counts.ar_tokens + 2 * batch.counts.masked_tokens
