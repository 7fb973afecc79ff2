"""Weights prepared for inference: the same products, packed anew after changes, refused where impossible."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ds.decode.generator import Generator
from janus_ds.decode.load import InferenceOptions, prepare_for_inference
from janus_ds.errors import ConfigError
from janus_ds.model.attention import MultiHeadAttention
from janus_ds.model.decoding import cpu_kernels
from janus_ds.model.decoding.cpu_kernels import (
    PreparedLinear,
    PreparedProduct,
    can_pack,
    prepare,
)
from janus_ds.model.decoding.native_step import SOURCE, compiled
from janus_ds.model.janus import JanusModel
from janus_ds.objective.chunk_math import compiler_is_at_hand
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.tiny_model import tiny_model

packs = pytest.mark.skipif(not can_pack(torch.float32), reason="torch cannot pack weights here")
compiles = pytest.mark.skipif(not compiler_is_at_hand(torch.device("cpu")), reason="there is no C++ compiler")
quantizes = pytest.mark.skipif(compiled() is None, reason="there is no C++ compiler")


def layer(rows: int = 40, columns: int = 24) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(columns, rows).requires_grad_(False), torch.randn(3, 5, columns)


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).norm() / b.norm())


def every_row(model: JanusModel, tokens: Tensor, lengths: Tensor) -> Tensor:
    """All NAR rows, one after the other; the source is the target."""
    picked = torch.arange(tokens.numel()), tokens.shape[1]
    return model.nar_rows(model.encode(tokens, lengths), tokens[:, None], lengths[:, None], picked)


@packs
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_packed_products_are_those_of_linear(dtype: torch.dtype, tolerance: float) -> None:
    plain, x = layer()
    plain, x = plain.to(dtype), x.to(dtype)
    assert error(PreparedLinear(plain)(x), plain(x)) < tolerance
    plain.bias = None
    assert error(PreparedLinear(plain)(x), plain(x)) < tolerance


@quantizes
def test_int8_is_near_and_a_row_does_not_depend_on_its_neighbours() -> None:
    plain, x = layer()
    int8 = PreparedLinear(plain, int8=True)
    x[0, 0] *= 1000
    x[0, 1] = 0
    found = int8(x)
    assert 1e-5 < error(found[1:], plain(x)[1:]) < 0.02
    assert torch.equal(found[0, 1], plain.bias)
    assert torch.equal(int8(x[1:2]), found[1:2])


@packs
def test_changed_weights_are_packed_again() -> None:
    plain, x = layer()
    fast = PreparedLinear(plain)
    before = fast(x)
    plain.weight.mul_(2)
    assert error(fast(x) - plain.bias, 2 * (before - plain.bias)) < 1e-6
    assert fast.double()(x.double()).dtype == torch.float64
    assert list(fast.state_dict()) == ["weight", "bias"]


@packs
@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=quantizes)])
@pytest.mark.parametrize(("name", "function"), [("relu", F.relu), ("gelu", F.gelu)])
def test_an_activation_goes_along_with_the_product(name: str, function: Any, int8: bool) -> None:
    plain, x = layer()
    assert error(PreparedLinear(plain, int8, name)(x), function(plain(x))) < (0.02 if int8 else 1e-6)


@torch.no_grad()
def test_queries_keys_and_values_of_one_input_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, x = MultiHeadAttention(24, 3, 0.0, 0.3, ParallelLayers()), layer()[1]
    expected = [attention.queries(x), *attention.keys_values(x)]
    prepare(attention)
    calls: list[int] = []
    call = PreparedProduct.__call__

    def counted(product: PreparedProduct, value: Tensor, weights: Any, biases: Any) -> Tensor:
        calls.append(len(weights))
        return call(product, value, weights, biases)

    monkeypatch.setattr(PreparedProduct, "__call__", counted)
    found = attention.queries_keys_values(x)
    assert calls == [3]
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-6


def test_without_the_operators_linear_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise AttributeError("no such operator")

    can_pack.cache_clear()
    monkeypatch.setattr(cpu_kernels, "compiled", lambda: None)
    monkeypatch.setattr("janus_ds.decode.load.compiled", lambda: None)
    monkeypatch.setattr(cpu_kernels, "_packed_product", missing)
    try:
        plain, x = layer()
        assert not can_pack(torch.float32)
        assert torch.equal(PreparedLinear(plain)(x), plain(x))
        with pytest.raises(ConfigError, match="int8 needs"):
            prepare_for_inference(tiny_model().float(), InferenceOptions(int8=True))
    finally:
        can_pack.cache_clear()


def test_precisions_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="no precision 'fp8'"):
        prepare_for_inference(tiny_model(), InferenceOptions("fp8"))
    with pytest.raises(ConfigError, match="int8 needs fp32"):
        prepare_for_inference(tiny_model(), InferenceOptions("bf16", int8=True))
    if compiled() is not None:
        with pytest.raises(ConfigError, match="nothing to compile"):
            prepare_for_inference(tiny_model().float(), InferenceOptions(int8=True, compiled=True))


@pytest.mark.parametrize(
    ("known", "precision"),
    [
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ],
)
def test_auto_is_bf16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], precision: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    ready = prepare_for_inference(tiny_model().float(), InferenceOptions("auto"))
    assert {parameter.dtype for parameter in ready.parameters()} == {precision}
    drafts = Generator.from_checkpoint("demo", "draft", device="cpu", inference=InferenceOptions("auto"))
    assert drafts.model.output_weight.dtype == torch.float32


def test_a_compiled_model_traces_one_layer_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more for other shapes: rows are dynamic, and layers share their code."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_with = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_with(f, backend=backend, **options))
    plain = tiny_model()
    ready = prepare_for_inference(tiny_model(), InferenceOptions("float64", compiled=True))
    with torch.no_grad():
        for width in (4, 6, 9):
            tokens, lengths = torch.arange(4, 4 + width).repeat(2, 1), torch.tensor([width, width - 1])
            found, expected = (every_row(model, tokens, lengths)[:width] for model in (ready, plain))
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(ready.encoder.layers) + len(ready.decoder.layers) > len(graphs) > 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (InferenceOptions(), 1e-5),
        (InferenceOptions("float64"), 1e-13),
        (InferenceOptions("bf16"), 0.1),
        pytest.param(InferenceOptions(int8=True), 0.1, marks=quantizes),
        pytest.param(InferenceOptions("float64", compiled=True), 1e-12, marks=[compiles, pytest.mark.heavy]),
    ],
)
def test_a_prepared_model_is_the_model(options: InferenceOptions, tolerance: float) -> None:
    plain = tiny_model()
    ready = prepare_for_inference(tiny_model(), options)
    assert ready.state_dict().keys() == plain.state_dict().keys()
    tokens, lengths = torch.tensor([[0, 9, 8, 2], [0, 7, 2, 1]]), torch.tensor([4, 3])
    found, expected = (
        made.logits(every_row(made, tokens, lengths)).view(2, 4, -1) for made in (ready, plain)
    )
    real = torch.tensor([[True] * 4, [True, True, True, False]])
    assert error(found[real].double(), expected[real]) <= tolerance


def test_a_model_may_be_made_and_used_in_inference_mode() -> None:
    options: Any = {"device": "cpu", "beam": 1, "max_length": 6}
    expected = Generator.from_checkpoint("demo", "ar", **options).generate("Ja!")
    with torch.inference_mode():
        found = Generator.from_checkpoint("demo", "ar", **options).generate("Ja!")
    assert [item.text for item in found] == [item.text for item in expected]


@quantizes
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the names of CPUs are those of x86-64")
@pytest.mark.parametrize("kind", ["x86-64", "x86-64-v3", "x86-64-v4", "sapphirerapids"])
def test_no_vector_is_wider_than_a_register(kind: str) -> None:
    """GCC keeps a wider one in memory: with AVX2, products were 6 to 20 times as slow as they are."""
    warned = ("-Wpsabi", "-Werror=psabi", f"-march={kind}", "-fsyntax-only")
    done = subprocess.run(["g++", "-std=c++17", *warned, str(SOURCE)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
