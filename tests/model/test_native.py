"""The C++ kernels: what PyTorch computes, for each kind of CPU they are made for, and how they come to be."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import InferenceOptions, prepare_for_inference
from janus_ds.errors import ConfigError
from janus_ds.model.attention import KeysValues
from janus_ds.model.decoding import native_step as native
from janus_ds.model.decoding.cache import ArStream
from janus_ds.model.decoding.native_step import compiled, load, packed, product
from janus_ds.model.decoding.steps import AuxPool
from janus_ds.model.janus import JanusModel
from tests.support.tiny_model import TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY

compiles = pytest.mark.skipif(compiled() is None, reason="there is no C++ compiler")
CPUS: dict[str, tuple[str, ...]] = {"this": (), "avx2": ("-march=x86-64-v3", "-O1"), "any": ("-O1",)}
PLACES = ("janus_ds.model.decoding.cpu_kernels", "janus_ds.model.decoding.native_step")
STREAMS = [
    ArStream.of(ObjectiveConfig(ar_stream=rows, ar_query_position="predicted", decoder_start="bos"), TOY)
    for rows in ("query", "content")
]
SOURCES = [
    "Ein Hund läuft am Strand .",
    "Zwei Frauen sitzen in einem Park und reden .",
    "Meine Mutter ist krank .",
]


@pytest.fixture(scope="module", params=CPUS)
def kernels(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those of a kind of CPU, where this one is of that kind."""
    if request.param == "avx2" and " avx2 " not in native._cpu()[2]:
        pytest.skip("this CPU has no AVX2")
    if request.param == "this":
        return compiled()
    return load(native._built(tmp_path_factory.mktemp("native"), CPUS[request.param]))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def use(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (*PLACES, "janus_ds.decode.load"):
        monkeypatch.setattr(f"{place}.compiled", lambda: kernels)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).norm() / expected.norm())


@compiles
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (32, 16), (70, 33), (96, 130)])
def test_a_product_is_that_of_float64(kernels: Any, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight, bias, x = (
        torch.randn(n, generator=generator) for n in ((outputs, inputs), (outputs,), (40, inputs))
    )
    x[3] = 0
    whole = x.double() @ weight.double().T
    functions: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}
    for name, function in functions.items():
        for shift in (None, bias):
            expected = function(whole if shift is None else whole + shift)
            for matrix, most in (
                (packed(weight, shift), 1e-6),
                (packed(weight.bfloat16(), shift), 0.01),
                (packed(weight, shift, int8=True), 0.03),
            ):
                found = product(kernels, matrix, x, name)
                assert error(found, expected) < most
                # Whatever the number of rows: a row's result is its own.
                for rows in (1, 5, 13):
                    assert torch.equal(product(kernels, matrix, x[:rows], name), found[:rows])


SOURCE_BS, LENGTH_B = torch.tensor([[0, 9, 8, 7, 2], [0, 7, 2, 1, 1]]), torch.tensor([5, 3])


def prepared_and_plain(shape: ModelConfig, options: str) -> tuple[JanusModel, JanusModel]:
    """The same weights for the kernels and as the reference."""
    config = replace(shape, d_model=96, ffn_dim=72, heads=2, init_std=0.15)
    int8 = options == "int8"
    settings = InferenceOptions("fp32" if int8 else options, int8=int8)
    return prepare_for_inference(tiny_model(config), settings), tiny_model(config)


@compiles
@torch.no_grad()
@pytest.mark.parametrize("shape", [TINY, TINY_NMT], ids=["gelu", "relu"])
@pytest.mark.parametrize(("options", "most"), [("fp32", 1e-5), ("bf16", 0.06), ("int8", 0.06)])
def test_a_step_is_that_of_float64(
    kernels: Any, shape: ModelConfig, options: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams that change places, ragged sources, content and query rows."""
    use(kernels, monkeypatch)
    (ready, plain), sources, lengths = prepared_and_plain(shape, options), SOURCE_BS, LENGTH_B
    for stream in STREAMS:
        found = []
        for model in (ready, plain):
            cache = model.start_cache(model.encode(sources, lengths), stream, 3, 8)
            assert (model.decoder.native is not None) == (model is ready)
            first = torch.tensor([[[0, 9], [0, 8], [0, 7]], [[0, 11], [0, 12], [0, 13]]])
            model.ar_block(cache, first)
            parents = torch.tensor([[1, 1, 0], [2, 0, 1]])
            found.append(model.ar_block(cache, first[..., 1:].flip(1), parents))
        assert ready.decoder.native is not None
        assert ready.decoder.native.takes(found[0])
        assert error(*found) < most
        with threads(2):
            cache = ready.start_cache(ready.encode(sources, lengths), stream, 3, 8)
            ready.ar_block(cache, first)
            assert torch.equal(ready.ar_block(cache, first[..., 1:].flip(1), parents), found[0])


@compiles
@torch.no_grad()
@pytest.mark.parametrize("shape", [TINY, TINY_NMT], ids=["gelu", "relu"])
@pytest.mark.parametrize(("options", "most"), [("fp32", 1e-5), ("bf16", 0.06), ("int8", 0.06)])
def test_passes_of_nar_and_aux_are_those_of_float64(
    kernels: Any, shape: ModelConfig, options: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two length candidates of a sentence, ragged; picked rows and all; then AUX blocks."""
    use(kernels, monkeypatch)
    (ready, plain), sources, lengths = prepared_and_plain(shape, options), SOURCE_BS, LENGTH_B
    target_length = torch.tensor([[5, 4], [4, 3]])
    mask = TOY.mask
    rows = [[0, mask, mask, mask, 2], [0, mask, mask, 2, 1], [0, 8, mask, 2, 1], [0, mask, 2, 1, 1]]
    blank = torch.tensor(rows).view(2, 2, 5)
    picked = (blank == mask).flatten().nonzero().squeeze(1)
    settled, filled = torch.ones_like(target_length), blank.masked_fill(blank == mask, 11)
    found: list[list[Tensor]] = []
    for model in (ready, plain):
        memory, kept = model.encode(sources, lengths), list[KeysValues]()
        native = model.decoder.native
        assert (native is not None and native.takes(memory.states_BSD)) == (model is ready)
        every = model.nar_rows(memory, blank, target_length, (torch.arange(20), 5)).view(2, 2, 5, -1)
        valid = torch.arange(5) < target_length[..., None]
        some = model.nar_rows(memory, blank, target_length, (picked, 3), kept)
        slots = (blank == mask).flatten(0, 1)
        pool = AuxPool.build(kept, slots, target_length.flatten(), 3)
        blocks = [model.aux_rows(memory, pool, filled, at, 2, mask)[:1] for at in (settled, settled + 1)]
        found.append([memory.states_BSD[0], every[valid], some, *blocks])
    for one, other in zip(*found, strict=True):
        assert error(one, other) < most


@compiles
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar", "beam": 5},
        {"mode": "ar", "beam": 1},
        {"mode": "draft"},
        {"mode": "nar"},
        {"mode": "aux"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_tokens_of_the_demo_are_those_of_pytorch(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Generator.from_checkpoint("demo", **options).generate(SOURCES)
    for place in PLACES:
        monkeypatch.setattr(f"{place}.compiled", lambda: None)
    expected = Generator.from_checkpoint("demo", **options).generate(SOURCES)
    assert [result.text for result in found] == [result.text for result in expected]
    assert [result.score for result in found] == pytest.approx(
        [result.score for result in expected], abs=1e-4
    )


@pytest.fixture
def fresh() -> Any:
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@compiles
def test_a_call_keeps_its_rows_while_another_thread_makes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    made = Generator.from_checkpoint("demo", "ar", device="cpu", beam=1, max_length=6)
    expected = [item.text for item in made.generate(SOURCES)]
    native_step, kernels = made.model.decoder.native, compiled()
    assert native_step is not None
    assert kernels is not None

    class Between:
        """Another call begins and ends when the first one is about to compute."""

        def janus_step(self, step: Any, layers: Any, *rest: Any) -> None:
            mine = [(layer.keys, layer.source_keys) for layer in layers]
            if not kept:
                kept.append(True)
                with ThreadPoolExecutor(1) as other:
                    assert other.submit(made.generate, SOURCES).result()[0].text == expected[0]
            kept.append(mine == [(layer.keys, layer.source_keys) for layer in layers])
            kernels.janus_step(step, layers, *rest)

    monkeypatch.setattr(native_step, "_kernels", Between())
    assert [item.text for item in made.generate(SOURCES)] == expected
    assert all(kept)


@pytest.mark.usefixtures("fresh")
def test_without_a_compiler_pytorch_does_it_with_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    plain, ready = tiny_model().float(), prepare_for_inference(tiny_model())
    tokens, lengths = torch.tensor([[0, 9, 8, 2]]), torch.tensor([4])
    found = []
    with torch.no_grad():
        for model in (ready, plain):
            cache = model.start_cache(model.encode(tokens, lengths), STREAMS[0], 1, 4)
            found.append(model.logits(model.ar_block(cache, torch.tensor([[[0]]]))))
    assert error(found[0], found[1].double()) < 1e-5
    with pytest.raises(ConfigError, match=r"(?s)C\+\+ compiler.*install g\+\+"):
        prepare_for_inference(tiny_model(), InferenceOptions(int8=True))
    note = "decoding goes on without its C++ kernels, slower and without int8: there is no C++ compiler"
    assert [record.message for record in caplog.records] == [f"{note} (CXX, g++ or clang++)"]


@pytest.mark.usefixtures("fresh")
def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("JANUS_NATIVE", "0")
    assert compiled() is None
    assert not caplog.records


@pytest.mark.usefixtures("fresh")
def test_a_folder_that_others_can_write_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = os.umask(0o002)  # as of users who have a group of their own
    folder = native._cache_folder()
    os.umask(before)
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    assert compiled() is None
    assert f"chmod 700 {folder}" in caplog.text
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    with pytest.raises(OSError, match=f"{folder.parent} must be"):
        native._cache_folder()
    folder.parent.chmod(0o755)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(OSError, match="folder of your own"):
        native._cache_folder()


@compiles
def test_two_that_build_at_once_leave_one_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = tmp_path / "small.cpp", tmp_path / "made"
    source.write_text('extern "C" int janus_answer() { return 42; }', encoding="utf-8")
    folder.mkdir()
    monkeypatch.setattr(native, "SOURCE", source)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(native._built, [folder] * 2)
    assert first == second
    assert os.listdir(folder) == [first.name]
    assert ctypes.CDLL(str(first)).janus_answer() == 42
    # Another source is another library.
    source.write_text('extern "C" int janus_answer() { return 43; }', encoding="utf-8")
    assert native._built(folder) != first


@compiles
def test_what_does_not_compile_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int x = ;", encoding="utf-8")
    monkeypatch.setattr(native, "SOURCE", broken)
    with pytest.raises(OSError, match=r"failed: .*error"):
        native._built(tmp_path)
    assert os.listdir(tmp_path) == ["broken.cpp"]
