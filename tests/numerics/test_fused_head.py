"""The fused head against whole logits under autograd: exactness, memory, 16 bits, evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from janus_ds.objective import chunk_math
from janus_ds.objective import fused_head as head_module
from janus_ds.objective.chunk_math import Terms, VocabSlice, chunk_losses, compiler_is_at_hand, logit_gradient
from janus_ds.objective.fused_head import fused_head, rows_per_chunk
from janus_ds.parallel.tensor_parallel import ParallelLayers, make_layers
from tests.support.head_cases import (
    CASES,
    VOCAB,
    HeadCase,
    HeadInputs,
    gradients,
    make_inputs,
    make_plan,
    reference,
)

TOLERANCE = 1e-12
DENSE = make_layers(1)
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


NEEDS_COMPILER = pytest.mark.skipif(
    not compiler_is_at_hand(torch.device("cpu")), reason="no C++ compiler at hand"
)


def run_head(
    case: HeadCase, inputs: HeadInputs, chunk_rows: int | None = None, compiled: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    plan = make_plan(case, inputs, DENSE, chunk_rows, compiled)
    return fused_head(inputs.hidden, inputs.weight_VD, plan)


def compile_by(monkeypatch: pytest.MonkeyPatch, made: Callable[[Any], Any]) -> None:
    """Let `made` stand for torch.compile."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: made(function))
    monkeypatch.setattr(chunk_math, "_compiled", lru_cache(chunk_math._compiled.__wrapped__))


class Recorder(TorchDispatchMode):
    """Shapes of all results of operations, and how many matrix products there were."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += "mm" in func.__name__
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, Tensor):
                self.shapes.append(tuple(value.shape))
        return result


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "as compiled"])
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_autograd_of_the_plain_losses(
    case: HeadCase, chunk_rows: int | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The functions that are compiled run as they are written, without a compiler."""
    compile_by(monkeypatch, lambda function: function)
    inputs = make_inputs(case)
    total, sums = run_head(case, inputs, chunk_rows, compiled)
    wanted, wanted_sums = reference(case, inputs)
    assert abs(total - wanted) < TOLERANCE
    assert set(sums) == set(wanted_sums)
    for name, value in wanted_sums.items():
        assert abs(sums[name] - value) < TOLERANCE * max(1.0, abs(float(value.detach()))), name
    found, exact = gradients(3.0 * total, inputs), gradients(3.0 * wanted, inputs)
    for name, gradient in exact.items():
        rows = VOCAB if name == "weight" else None  # padding: below
        assert (found[name][:rows] - gradient[:rows]).abs().max() < TOLERANCE, name


def test_evaluation_gives_the_same_sums_without_gradient_work() -> None:
    case, inputs = CASES[1], make_inputs(CASES[1])
    with Recorder() as training:
        total, sums = run_head(case, inputs)
    with torch.no_grad(), Recorder() as evaluation:
        evaluated, evaluated_sums = run_head(case, inputs)
    assert not evaluated.requires_grad
    assert evaluated == total
    assert all(evaluated_sums[name] == value for name, value in sums.items())
    # Logits of two groups, against logits, dH and dW of two groups.
    assert (evaluation.products, training.products) == (2, 6)


def test_no_more_than_a_chunk_of_logits_exists_at_a_time() -> None:
    vocab, width, tokens, chunk_rows = 5003, 4, 120, 24
    case = CASES[0]
    generator = torch.Generator().manual_seed(0)
    hidden = {n: torch.randn(2 * tokens, width, generator=generator).requires_grad_() for n in case.ce}
    rows, target = torch.arange(tokens), torch.arange(tokens)
    inputs = HeadInputs(
        hidden,
        torch.randn(vocab, width, generator=generator).requires_grad_(),
        dict.fromkeys(case.ce, rows),
        target,
        rows + tokens,
        target,
    )
    plan = make_plan(case, inputs, DENSE, chunk_rows)
    plan = type(plan)(plan.groups, vocab, DENSE, chunk_rows)
    with Recorder() as recorder:
        total, _ = fused_head(hidden, inputs.weight_VD, plan)
        total.backward()
    wide = [s for s in recorder.shapes if s and s[-1] >= vocab]
    assert wide, "the recorder saw no logits"
    largest = max(torch.Size(shape).numel() for shape in wide)
    # The buffer's rows are padded to a multiple of 64 columns.
    assert largest <= chunk_rows * (-(-vocab // 64) * 64)
    tall = {s for s in recorder.shapes if len(s) == 2 and s[0] >= vocab}
    assert all(columns in (width, chunk_rows) or columns < chunk_rows for _, columns in tall)


def test_a_second_backward_is_refused() -> None:
    inputs = make_inputs(CASES[0])
    total, _ = run_head(CASES[0], inputs)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        total.backward()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_lose_only_the_rounding_of_their_dtype(
    dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks of the vocabulary, where a product goes block by block.
    monkeypatch.setattr(head_module, "_COLUMNS", 5)
    case = CASES[1]
    inputs, exact_inputs = make_inputs(case, dtype, device), make_inputs(case, device=device)
    for name, leaf in exact_inputs.leaves().items():
        leaf.data.copy_(inputs.leaves()[name])
    total, _ = run_head(case, inputs, 4)
    wanted, _ = reference(case, exact_inputs)
    assert total.dtype == torch.float32
    assert abs(total - wanted) < 1e-5
    found = gradients(total, inputs)
    for name, gradient in gradients(wanted, exact_inputs).items():
        assert found[name].dtype == dtype
        error = (found[name].double() - gradient).norm() / gradient.norm()
        assert error < torch.finfo(dtype).eps + 1e-6, name


def test_float16_gradients_survive_small_coefficients_under_a_loss_scale() -> None:
    scale, tokens = 2.0**16, 1e6
    small = HeadCase(
        "small", {n: w / tokens for n, w in CASES[0].ce.items()}, {("ar", "aux"): 2 / tokens}, 0.1
    )
    inputs, exact_inputs = make_inputs(small, torch.float16), make_inputs(small)
    for name, leaf in exact_inputs.leaves().items():
        leaf.data.copy_(inputs.leaves()[name])
    # Without a scale the gradients of the rows are below what float16 can hold.
    found = gradients(run_head(small, inputs)[0] * scale, inputs)
    wanted = gradients(reference(small, exact_inputs)[0] * scale, exact_inputs)
    for name, gradient in wanted.items():
        assert (found[name].double() - gradient).norm() / gradient.norm() < 1e-3, name


def test_autocast_of_the_caller_does_not_reach_the_losses() -> None:
    case, inputs = CASES[0], make_inputs(CASES[0], torch.float32)
    plain, _ = run_head(case, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = run_head(case, inputs)
    assert cast.dtype == torch.float32
    # Operands are rounded as autocast asks, so the result is another, but not by a bfloat16 softmax.
    assert 0 < abs(cast - plain) < 2e-3 * plain


def test_chunks_fit_the_device() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for vocab in (1, 8_000, 50_265, 250_000):
        assert 96 <= rows_per_chunk(vocab, cpu) <= 512
        assert rows_per_chunk(vocab, cuda) >= 2048


def test_a_compiler_that_fails_is_told_and_the_head_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: object) -> torch.Tensor:
        raise torch._dynamo.exc.TorchDynamoException("file too short")

    compile_by(monkeypatch, lambda function: broken)
    inputs = make_inputs(CASES[0])
    total, _ = run_head(CASES[0], inputs, 4, compiled=True)
    assert abs(float(total - reference(CASES[0], inputs)[0])) < 1e-12
    assert caplog.text.count("runs uncompiled: file too short") == 2, "once for each function"


@pytest.mark.heavy
@NEEDS_COMPILER
def test_the_compiled_chunk_equals_the_eager_one_and_is_compiled_once() -> None:
    torch.manual_seed(0)
    terms = Terms((0.5, 0.25, 1.0), ((0, 2, 2.0), (1, 2, 0.5)), 0.1)
    vocab = VocabSlice(50, 0, 50, ParallelLayers())
    torch._dynamo.utils.counters.clear()
    for number, tokens in enumerate((7, 5, 12)):
        z_GnV = torch.randn(3, tokens, 50, dtype=torch.float64)
        target_n = torch.randint(0, 50, (tokens,))
        # Other coefficients and another number of rows: what changes from step to step.
        now = replace(terms, ce=(0.5 + number, 0.25, 1.0))
        expected_z = z_GnV.clone()
        result = chunk_losses(expected_z, target_n, now, vocab, torch.empty_like(z_GnV))
        expected = logit_gradient(expected_z, result, now, vocab)
        sums = chunk_math.chunk_gradient(z_GnV, target_n, now, vocab)
        assert float((sums - result.sums).abs().max()) < 1e-12
        assert float((z_GnV - expected).abs().max()) < 1e-12
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
