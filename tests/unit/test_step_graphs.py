"""AR steps on buffers, as graphs need them: the ordinary steps' logits, fixed work, and few captures."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from janus_ds.config.schema import DataConfig, DecodeConfig, ObjectiveConfig, RunConfig
from janus_ds.decode.generator import Generator
from janus_ds.errors import ConfigError
from janus_ds.model import step_graphs
from janus_ds.model.graph_runners import CalledAgain, CapturedGraph
from janus_ds.model.incremental import ArCache, ArStream, Memory
from janus_ds.model.inference import InferenceOptions, prepare_for_inference
from janus_ds.model.janus import JanusModel
from janus_ds.model.step_graphs import StaticStep, StepGraphs, StepSize
from tests.support.tiny_model import TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY

EXACT = 1e-12
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SOURCES = torch.tensor([[0, 9, 8, 7, 6, 2], [0, 7, 2, 1, 1, 1], [0, 6, 5, 2, 1, 1]])
LENGTHS = torch.tensor([6, 3, 4])
MANY = [[5 + (7 * i + j) % 20 for j in range(1 + (5 * i) % 9)] for i in range(13)]
STREAMS = {
    "predicted": (
        TINY,
        ObjectiveConfig(ar_stream="query", ar_query_position="predicted", decoder_start="bos"),
    ),
    "previous": (
        TINY_NMT,
        ObjectiveConfig(ar_stream="query", ar_query_position="previous", decoder_start="eos_bos"),
    ),
    "content": (
        TINY,
        ObjectiveConfig(ar_stream="content", ar_query_position="predicted", decoder_start="bos"),
    ),
}


@pytest.fixture(params=STREAMS.values(), ids=STREAMS)
def case(request: Any) -> tuple[JanusModel, ArStream]:
    config, objective = request.param
    return tiny_model(config), ArStream.of(objective, TOY)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that short searches leave."""
    monkeypatch.setattr(step_graphs, "_LEAST_TOKENS", 2)
    monkeypatch.setattr(step_graphs, "_LEAST_SOURCE", 4)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Recording(TorchDispatchMode):
    """Stands in for a graph: what was launched is launched again, on the same tensors, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.launched.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.launched:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                # Views and changes in place are where they were.
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Stream:
    """Stands in for a stream."""

    def wait_stream(self, other: Stream) -> None:
        assert other is not self


@pytest.fixture(params=["called", "recorded"])
def runner(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are called again, or the runner for CUDA on graphs that are recorded here."""
    if request.param == "called":
        return
    here, entered = Stream(), inspect.signature(torch.cuda.graph)
    handles: list[object] = []

    def graph(*args: Any, **kwargs: Any) -> Recording:
        given = entered.bind(*args, **kwargs).arguments
        assert given["pool"] is handles[-1]
        assert isinstance(given["stream"], Stream)
        assert given["stream"] is not here
        recording: Recording = given["cuda_graph"]
        return recording

    def handle() -> object:
        handles.append(object())
        return handles[-1]

    capture_on = step_graphs.capture_on
    monkeypatch.setattr(step_graphs, "capture_on", lambda device: capture_on(torch.device("cuda")))
    stubs = {"device": nullcontext, "stream": nullcontext, "Stream": Stream, "CUDAGraph": Recording}
    for name, stub in {**stubs, "current_stream": lambda: here, "graph_pool_handle": handle}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    monkeypatch.setattr(torch.cuda, "graph", graph)


class Pair:
    """The same search twice: on buffers and by ordinary steps."""

    def __init__(self, case: tuple[JanusModel, ArStream], beams: int, tolerance: float = EXACT) -> None:
        self.model, stream = case
        self.beams, self.tolerance = beams, tolerance
        self.device = next(self.model.parameters()).device
        self.graphs = StepGraphs(self.model)
        memory = self.encode(SOURCES, LENGTHS)
        self.ours, self.theirs = (self.model.start_cache(memory, stream, beams, 12) for _ in range(2))
        self.random = torch.Generator().manual_seed(beams)
        self.sizes: list[StepSize] = []

    def encode(self, source_BS: Tensor, length_B: Tensor) -> Memory:
        return self.model.encode(source_BS.to(self.device), length_B.to(self.device))

    def draw(self, below: int) -> Tensor:
        shape = (self.ours.memory.sentences, self.beams)
        return torch.randint(0, below, shape, generator=self.random).to(self.device)

    def steps(self, count: int, follow: bool = True) -> None:
        for _ in range(count):
            token, parent = self.draw(TOY.vocab_size), self.draw(self.beams) if follow else None
            self.sizes.append(StepSize.of(self.ours))
            found = self.graphs.step(self.ours, token, parent)
            expected = self.model.logits(self.model.ar_step(self.theirs, token, parent))
            assert found.shape == expected.shape
            assert float((found - expected).abs().max()) < self.tolerance
            assert torch.equal(self.ours.taken_B, self.theirs.taken_B)
            assert (self.ours.reach, self.ours.even) == (self.theirs.reach, self.theirs.even)

    def refill(self, place: int, source: int) -> None:
        for cache in (self.ours, self.theirs):
            row = slice(source, source + 1)
            memory = self.encode(SOURCES[row, : LENGTHS[source]], LENGTHS[row])
            cache.refill(torch.tensor([place], device=self.device), memory)

    def select(self, *sentences: int) -> None:
        index = torch.tensor(sentences, device=self.device)
        self.ours, self.theirs = self.ours.select(index), self.theirs.select(index)


@pytest.mark.usefixtures("small", "runner")
@pytest.mark.parametrize("beams", [1, 3])
def test_logits_are_those_of_ordinary_steps(case: tuple[JanusModel, ArStream], beams: int) -> None:
    pair = Pair(case, beams)
    pair.steps(5, follow=False)
    pair.steps(1)
    pair.refill(0, 2)  # the widest source goes
    pair.steps(2)
    pair.refill(2, 0)
    pair.refill(1, 1)
    pair.steps(3)
    pair.select(2, 0)
    pair.steps(3)
    pair.select(1)
    pair.steps(2)
    # Sentences 3 (filled up to 4), 2, 1; room for 2, 4, 8 and 16 tokens; sources of 8 and 4.
    assert {size.sentences for size in pair.sizes} == {4, 2, 1}
    assert {size.tokens for size in pair.sizes} == {2, 4, 8, 16}
    assert {size.source for size in pair.sizes} == {8, 4}
    assert pair.graphs.captures == len(set(pair.sizes)) > 5


@pytest.mark.usefixtures("small", "runner")
def test_steps_of_other_kinds_go_on_from_the_buffers(case: tuple[JanusModel, ArStream]) -> None:
    """A block of two tokens of which one is kept, and a cache that follows by itself."""
    pair = Pair(case, 2)
    pair.steps(3)
    for cache in (pair.ours, pair.theirs):
        block = torch.arange(12).view(3, 2, 2) + 5
        pair.model.ar_block(cache, block, torch.tensor([[1, 0], [0, 0], [1, 1]]))
        cache.accept(torch.tensor([2, 1, 0]))
    pair.steps(2)
    for cache in (pair.ours, pair.theirs):
        cache.accept(torch.zeros(3, dtype=torch.long))
        cache.follow(torch.tensor([[1, 0], [1, 1], [0, 1]]))
    pair.steps(3)


@pytest.mark.usefixtures("small", "runner")
def test_what_stands_in_buffers_from_before_does_no_harm(case: tuple[JanusModel, ArStream]) -> None:
    """Rows that fill up, and columns that other searches have left, even if they are not finite."""
    pair = Pair(case, 2)
    for sentences in ((0, 1, 2), (0, 1), (1, 2, 1)):
        index = torch.tensor(sentences)
        memory = pair.encode(SOURCES[index], LENGTHS[index])
        pair.ours, pair.theirs = (pair.model.start_cache(memory, pair.ours.stream, 2, 12) for _ in range(2))
        pair.steps(9)
        for static in pair.graphs._steps.values():
            own = static.cache
            # Not every kernel can do with a row that sees nothing.
            assert own.memory.mask_B11S is not None
            assert bool((own.memory.mask_B11S == 0).any(-1).all())
            for pool in (*own.keys, *own.values, *(x for layer in own.memory.source for x in layer)):
                pool.fill_(torch.nan)
    assert pair.graphs.captures == 2 * 4


class FixedWork(TorchDispatchMode):
    """Notes every operation with the shapes of its tensors, which must all be on one device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.done: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        assert all(x.device == self.device for x in tensors), func
        self.done.append((str(func), *((tuple(x.shape), x.stride(), x.dtype) for x in tensors)))
        return out


def test_a_step_reads_no_value(case: tuple[JanusModel, ArStream]) -> None:
    """On the meta device there are none: what asks for one, or has a shape that depends on one, fails."""
    model, stream = case
    model.to("meta")
    heads, width = model.config.heads, model.config.d_model // model.config.heads
    kept = torch.zeros(3, heads, 6, width, dtype=torch.float64, device="meta")
    states = torch.zeros(3, 6, model.config.d_model, dtype=torch.float64, device="meta")
    valid = torch.ones(3, 6, dtype=torch.bool, device="meta")
    memory = Memory(states, valid, None, ((kept, kept),) * model.config.decoder_layers)
    cache = model.start_cache(memory, stream, 2, 12)
    static = StaticStep(model, cache, StepSize.of(cache), CalledAgain)
    static.take_over(cache)
    with FixedWork("meta") as work:
        logits = static.body()
    assert logits.shape == (4, 2, TOY.vocab_size)
    assert len(work.done) > 100
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(logits.any())
    with pytest.raises((RuntimeError, NotImplementedError)):
        logits.nonzero()
    assert not any("_local_scalar_dense" in name or "nonzero" in name for name, *_ in work.done)


@pytest.mark.usefixtures("small")
def test_steps_of_a_size_do_the_same_work_at_the_same_addresses(case: tuple[JanusModel, ArStream]) -> None:
    pair = Pair(case, 3)
    pair.steps(4)  # room for 8 tokens from here on
    pair.refill(1, 1)
    pair.steps(1)
    (static,) = (s for size, s in pair.graphs._steps.items() if size == pair.sizes[-1])
    seen: list[tuple[Any, ...]] = []
    for step in range(3):
        token, parent = pair.draw(29), pair.draw(3)
        with FixedWork("cpu") as work:
            logits = pair.graphs.step(pair.ours, token, parent if step else None)
        cache = static.cache
        tensors = (static.token_BK, static.parent_BK, cache.taken_B, cache.past_BKN, *cache.keys)
        tensors += (*cache.values, *(x for layer in cache.memory.source for x in layer), logits)
        # Inputs are copied before: a replay begins with the parents.
        first = next(i for i, (name, *_) in enumerate(work.done) if "gather" in name)
        seen.append((work.done[first:], [x.data_ptr() for x in tensors]))
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0][0]) > 100
    assert pair.graphs.captures == len(set(pair.sizes))


def generator(model: JanusModel, objective: ObjectiveConfig, **decode: Any) -> Generator:
    run = RunConfig(
        model=TINY,
        data=DataConfig(task="pair"),
        objective=objective,
        decode=DecodeConfig(**{"mode": "ar", "beam": 3, "max_length": 12, **decode}),
    )
    return Generator(model, None, TOY, run, batch_sentences=5)


def varied_model() -> JanusModel:
    model = tiny_model(seed=5)
    model.embedding.weight[TOY.eos] *= 0.8  # outputs of many lengths
    return model


def assert_same_outputs(found: list[Any], expected: list[Any], tolerance: float = 1e-10) -> None:
    assert len({len(item.tokens) for items in expected for item in items}) > 2
    for ours, theirs in zip(found, expected, strict=True):
        assert [item.tokens for item in ours] == [item.tokens for item in theirs]
        assert max(abs(a.score - b.score) for a, b in zip(ours, theirs, strict=True)) < tolerance


@pytest.mark.usefixtures("small", "runner")
@pytest.mark.parametrize("start", ["bos", "eos_bos"])
@pytest.mark.parametrize("preset", ["paper", "ar"])
@pytest.mark.parametrize(
    "decode", [{"beam_stop": "fairseq"}, {"beam_stop": "transformers", "length_penalty": 2.0}, {"beam": 1}]
)
def test_searches_give_the_same_outputs(preset: str, start: str, decode: dict[str, Any]) -> None:
    model, objective = varied_model(), ObjectiveConfig(preset=preset, decoder_start=start)
    made = generator(model, objective, **decode)
    expected = made.generate_ids(MANY)
    model.step_graphs = graphs = StepGraphs(model, kept=99)
    assert_same_outputs(made.generate_ids(MANY), expected)
    captured = graphs.captures
    assert captured > 3
    # The next search finds all graphs that it needs.
    assert_same_outputs(made.generate_ids(MANY), expected)
    assert graphs.captures == captured


@pytest.mark.usefixtures("small", "runner")
def test_few_graphs_are_kept_and_none_of_weights_that_moved() -> None:
    model = varied_model()
    made = generator(model, ObjectiveConfig(preset="paper"))
    expected = made.generate_ids(MANY)
    model.step_graphs = graphs = StepGraphs(model, kept=2)
    assert_same_outputs(made.generate_ids(MANY), expected)
    assert len(graphs._steps) == 2
    first = graphs.captures
    assert_same_outputs(made.generate_ids(MANY), expected)
    assert graphs.captures > first
    model.step_graphs = graphs = StepGraphs(model, kept=99)
    made.generate_ids(MANY)
    first = graphs.captures
    model.embedding.weight = torch.nn.Parameter(model.embedding.weight * 0.9)
    found = made.generate_ids(MANY)
    assert graphs.captures > first
    model.step_graphs = None
    assert_same_outputs(found, made.generate_ids(MANY))


def test_graphs_of_one_gradient_mode_serve_the_other(case: tuple[JanusModel, ArStream]) -> None:
    """What was made under inference mode could not be changed outside of it."""
    model, stream = case
    graphs, found = StepGraphs(model), []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            cache = model.start_cache(model.encode(SOURCES, LENGTHS), stream, 2, 4)
            token = torch.full((3, 2), TOY.eos)
            found.append(graphs.step(cache, token).clone())
    assert torch.equal(*found)
    assert graphs.captures == 1


def test_sizes_double() -> None:
    model, stream = tiny_model(), ArStream(True, 1, TOY.mask)
    cache = model.start_cache(model.encode(SOURCES, LENGTHS), stream, 2, 12)
    sizes = []
    for sentences, reach in ((3, 0), (3, 31), (1, 32), (2, 63), (2, 64)):
        part: ArCache = replace(cache, memory=cache.memory.select(torch.arange(sentences)), reach=reach)
        size = StepSize.of(part)
        sizes.append((size.sentences, size.tokens, size.source))
    assert sizes == [(4, 32, 64), (4, 32, 64), (1, 64, 64), (2, 64, 64), (2, 128, 64)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (InferenceOptions(int8=True, cuda_graphs=True), "int8 runs on a CPU"),
        (InferenceOptions("bf16", cuda_graphs=True), "need a CUDA device"),
    ],
)
def test_what_cannot_be_captured_is_refused(options: InferenceOptions, text: str) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match=text) as caught:
        prepare_for_inference(model, options)
    assert caught.value.exit_code == 3
    assert "--cuda-graphs" in caught.value.where
    assert caught.value.fix
    assert model.step_graphs is None
    assert next(model.parameters()).dtype == torch.float64
    assert prepare_for_inference(model, InferenceOptions("float64")).step_graphs is None


@NEEDS_GPU
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3), (torch.bfloat16, 0.3)]
)
@pytest.mark.parametrize("least", [2, 32])
def test_captured_steps_give_the_logits_of_ordinary_ones(
    case: tuple[JanusModel, ArStream],
    dtype: torch.dtype,
    tolerance: float,
    least: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_graphs, "_LEAST_TOKENS", least)
    case[0].to("cuda", dtype)
    pair = Pair(case, 3, tolerance)
    pair.steps(5)
    pair.refill(0, 2)
    pair.steps(3)
    pair.select(2, 0)
    pair.steps(3)


@NEEDS_GPU
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("preset", ["paper", "ar"])
def test_captured_searches_give_the_same_tokens_by_one_replay_a_step(
    preset: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, replays = [], []
    step, replay = StepGraphs.step, CapturedGraph.replay
    monkeypatch.setattr(StepGraphs, "step", lambda *given: (steps.append(1), step(*given))[1])
    monkeypatch.setattr(CapturedGraph, "replay", lambda run: (replays.append(1), replay(run))[1])
    model = varied_model().cuda()
    made = generator(model, ObjectiveConfig(preset=preset))
    expected = made.generate_ids(MANY)
    prepare_for_inference(model, InferenceOptions("float64", compiled=compiled, cuda_graphs=True))
    for _ in range(2):
        assert_same_outputs(made.generate_ids(MANY), expected, 1e-8)
    assert len(replays) == len(steps) > 20


@NEEDS_GPU
def test_a_replay_is_one_launch() -> None:
    model = varied_model().cuda()
    stream = ArStream(True, 1, TOY.mask)
    graphs = StepGraphs(model)
    cache = model.start_cache(model.encode(SOURCES.cuda(), LENGTHS.cuda()), stream, 2, 12)
    tokens = torch.full((3, 2), 9, device="cuda")
    graphs.step(cache, tokens)
    (static,) = graphs._steps.values()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        static._runner.replay()
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if "Launch" in event.name]
    assert launches == ["cudaGraphLaunch"]
