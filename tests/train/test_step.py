"""A training step, counted: multiply-adds, launches, no waiting for the device, nothing a sample alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import BenchShape, make_batch, special_tokens, training_step
from janus_ds.batch import TwoStreamBatch
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.model.janus import JanusModel
from janus_ds.objective import chunk_math, fused_head
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.train.engine import TrainingStep
from tests.support.operations import META, host_traffic, on_device

SHAPE = BenchShape("", "pair", 3, 9, 10, 4, 32, 1)
SCALE = 8
# BART-base at 512 / 512 tokens with width, length and vocabulary divided by SCALE: every product shrinks by
# the same factor, so the ratios are those of the full shape (2.24 for the whole objective).
BART = BenchShape("", "denoise", 2, 512 // SCALE, 512 // SCALE, 256 // SCALE, 50265 // SCALE, 1)
# Counted by hand: 2.24; grouped attention computes more pairs than count, and rows of eos come on top.
MOST = 2.30
VIEWS = {"view", "t", "transpose", "slice", "expand", "detach", "unsqueeze", "squeeze", "split", "alias"}
VIEWS |= {"_unsafe_view", "select", "split_with_sizes", "as_strided", "permute", "unbind", "_reshape_alias"}

BOUND_AR, BOUND_JANUS = 395, 585
BOUND_AR_LAYER, BOUND_JANUS_LAYER = 135, 130
BOUND_GROUPED = 130


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


class Counted(TorchDispatchMode):
    """Every operation by name while it is entered, those of a backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        """Operations that compute something."""
        return sum(count for name, count in self.calls.items() if name not in VIEWS)


def step_of(
    preset: str, shape: BenchShape, width: int, layers: int, ffn_dim: int
) -> tuple[TrainingStep, TwoStreamBatch]:
    config = ModelConfig(
        d_model=width,
        ffn_dim=ffn_dim,
        heads=2,
        encoder_layers=layers,
        decoder_layers=layers,
        max_source_positions=256,
        max_target_positions=256,
        attention_dropout=0.0,
    )
    goal, data = ObjectiveConfig(preset=preset), DataConfig(task=shape.task)
    run = resolve(RunConfig(model=config, data=data, objective=goal))
    torch.manual_seed(0)
    model = JanusModel(config, special_tokens(shape), ParallelLayers())
    return training_step(model, run.objective), make_batch(shape, run)


def bart_step(preset: str) -> tuple[TrainingStep, TwoStreamBatch]:
    return step_of(preset, BART, 768 // SCALE, 6, 3072 // SCALE)


def step_calls(preset: str, shape: BenchShape, layers: int = 2) -> Counted:
    step, batch = step_of(preset, shape, 8, layers, 8)
    with Counted() as counted:
        total, _ = step(batch, batch.counts)
        torch.autograd.backward(total)
    return counted


def work_of(preset: str) -> int:
    step, batch = bart_step(preset)
    with Products() as counted:
        total, _ = step(batch, batch.counts)
        torch.autograd.backward(total)
    return counted.work


def test_work_against_plain_ar_stays_within_its_bound() -> None:
    n, m, samples = BART.target_tokens, BART.masked_tokens, BART.samples
    assert bart_step("paper")[1].row_token_BR.numel() == samples * (3 * n + 2 * m)
    assert work_of("paper") / work_of("ar") <= MOST


def test_the_vocabulary_meets_predicted_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits: AR's predicted tokens, and the masked ones for NAR and for AUX."""
    seen: list[int] = []
    plain = fused_head._Head._logits

    def logits(self: Any, h_ND: torch.Tensor) -> torch.Tensor:
        seen.append(len(h_ND))
        return plain(self, h_ND)

    monkeypatch.setattr(fused_head._Head, "_logits", logits)
    step, batch = bart_step("paper")
    step(batch, batch.counts)
    assert sum(seen) == batch.counts.ar_tokens + 2 * batch.counts.masked_tokens


@pytest.mark.parametrize("preset", ["ar", "paper", "released", "cmlm"])
def test_no_operation_is_done_sample_by_sample(preset: str) -> None:
    few, many = (step_calls(preset, replace(SHAPE, samples=n)) for n in (2, 9))
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


CASES = [
    ("ar", False, "dense"),
    ("paper", False, "dense"),
    ("paper", False, "grouped"),
    ("released", True, "grouped"),
    ("released_finetune", True, "dense"),
    ("ar_rdrop", False, "grouped"),
]


@pytest.mark.parametrize(("preset", "compiled", "attention"), CASES)
def test_a_step_waits_for_nothing_and_sends_the_device_only_its_batch(
    preset: str, compiled: bool, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, host = step_of(preset, SHAPE, 8, 2, 8)
    step.model.attention_backend = attention
    on_device(step)
    if compiled:
        # The functions that are compiled, as they are written.
        monkeypatch.setattr(chunk_math, "_compiled", lambda function: function)
        step.objective.compiled_head = True
    with host_traffic(monkeypatch) as seen:
        batch = host.to(META)
        seen.clear()
        total, _ = step(batch, host.counts)
        torch.autograd.backward(total)
    assert seen == {}
    assert all(parameter.grad is not None for parameter in step.model.decoder.parameters())


def test_the_watch_sees_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with host_traffic(monkeypatch) as seen:
        x = torch.ones(3, 4, device=META)
        torch.tensor([1, 2], device=META)
        x[[0, 1]]
        torch.arange(3).to(META)
        x[x > 0] = 1.0
        x + torch.zeros(4)
        assert x.sum().item() == 12
        assert x.tolist() == x.cpu().tolist() == [[1.0] * 4] * 3
    counts = {"upload": 3, "boolean index": 1, "read": 3, "mixed": 1}
    assert seen == {(kind, "outside"): count for kind, count in counts.items()}
