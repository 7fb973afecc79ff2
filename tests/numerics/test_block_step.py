"""A step takes a block of tokens, each sentence at its own point: exactly what single steps give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.decode.load import prepare_for_inference
from janus_ds.model.decoding.cache import ArStream, KVCache
from janus_ds.model.decoding.native_step import compiled
from janus_ds.model.janus import JanusModel
from tests.numerics.test_invariants import STREAMS, distance
from tests.support.tiny_model import tiny_model
from tests.support.two_stream import TOY

EXACT = 1e-12
SOURCES = torch.tensor([[0, 9, 8, 7, 2], [0, 7, 2, 1, 1], [0, 6, 5, 2, 1]])
LENGTHS = torch.tensor([5, 3, 4])
TOKENS = torch.tensor([[0, 11, 12, 13, 14, 15, 16], [0, 21, 22, 23, 24, 25, 26], [0, 9, 8, 7, 6, 5, 11]])
STREAMS_FROM_BOS = [stream for stream in STREAMS if stream[1].decoder_start == "bos"]


@dataclass(frozen=True)
class Case:
    """A model, and in `twin` one of the same weights whose single steps are the truth."""

    model: JanusModel
    stream: ArStream
    exact: float
    reference: JanusModel | None = None

    @property
    def twin(self) -> Case:
        return self if self.reference is None else Case(self.reference, self.stream, EXACT)


@pytest.fixture(
    params=product(STREAMS_FROM_BOS, (False, True)),
    ids=lambda p: f"{p[0][1].ar_stream}-{p[0][1].ar_query_position}-{p[1]}",
)
def case(request: Any) -> Case:
    """With the layers of PyTorch in float64, and with the native step in float32."""
    (config, objective), native = request.param
    stream = ArStream.of(objective, TOY)
    if not native:
        return Case(tiny_model(config), stream, EXACT)
    if compiled() is None:
        pytest.skip("there is no C++ compiler")
    config = replace(config, d_model=64, ffn_dim=72, heads=2)
    return Case(prepare_for_inference(tiny_model(config)), stream, 1e-4, tiny_model(config))


def start(case: Case, beams: int = 1, rows: Any = slice(None)) -> KVCache:
    memory = case.model.encode(SOURCES[rows], LENGTHS[rows])
    return case.model.start_cache(memory, case.stream, beams, 12)


def single_steps(case: Case, tokens: Tensor) -> Tensor:
    """Hidden rows of every token, one step each, (B, T, D)."""
    cache = start(case.twin)
    return torch.cat(
        [case.twin.model.ar_block(cache, tokens[:, None, t : t + 1])[:, 0] for t in range(tokens.shape[1])], 1
    )


@torch.no_grad()
def test_a_block_is_its_single_steps(case: Case) -> None:
    expected, cache, model = single_steps(case, TOKENS), start(case), case.model
    found = [model.ar_block(cache, TOKENS[:, None, a:b])[:, 0] for a, b in ((0, 3), (3, 4), (4, 7))]
    assert distance(torch.cat(found, 1), expected) < case.exact
    assert cache.even
    assert cache.reach == 7


@torch.no_grad()
def test_sentences_stand_at_their_own_points_and_rejected_rows_are_dropped(
    case: Case,
) -> None:
    """A ragged draft: each block holds what is right up to a point, and other tokens behind it."""
    expected, cache, model = single_steps(case, TOKENS), start(case), case.model
    taken = torch.zeros(3, dtype=torch.long)
    for kept in ([4, 1, 2], [0, 4, 1], [3, 0, 2], [0, 2, 2]):
        block = torch.full((3, 4), 19)
        for b, count in enumerate(kept):
            block[b, :count] = TOKENS[b, taken[b] : taken[b] + count]
        found = model.ar_block(cache, block[:, None])[:, 0]
        for b, count in enumerate(kept):
            assert (
                count == 0
                or distance(found[b, :count], expected[b, taken[b] : taken[b] + count]) < case.exact
            )
        taken += torch.tensor(kept)
        cache.accept(torch.tensor(kept))
        assert cache.host_taken_B.tolist() == taken.tolist()
        assert cache.reach == int(taken.max())
    assert taken.tolist() == [7, 7, 7]
    assert cache.even
    # A part of them goes on alone.
    again = torch.tensor([[[17]], [[18]]])
    whole = model.ar_block(start_with(case, TOKENS), torch.tensor([[[17]], [[20]], [[18]]]))[[0, 2]]
    assert distance(model.ar_block(cache.select(torch.tensor([0, 2])), again), whole) < case.exact


def start_with(case: Case, tokens: Tensor) -> KVCache:
    cache = start(case)
    case.model.ar_block(cache, tokens[:, None])
    return cache


@torch.no_grad()
def test_blocks_of_beams(case: Case) -> None:
    """Two beams that swap their pasts, blocks of two tokens, one of which is taken back."""
    model, one, two = case.model, start(case, 2), start(case, 2)
    first = torch.stack([TOKENS[:, :2], TOKENS[:, 2:4]], 1)
    second = torch.stack([TOKENS[:, 3:5], TOKENS[:, 5:7]], 1)
    swap = torch.tensor([[1, 0], [0, 0], [1, 1]])
    model.ar_block(one, first)
    found = model.ar_block(one, second, swap)
    one.accept(torch.ones(3, dtype=torch.long))
    found_last = model.ar_block(one, second[..., :1], swap)
    for t in range(2):
        model.ar_block(two, first[..., t : t + 1])
    expected = model.ar_block(two, second[..., :1], swap)
    expected_last = model.ar_block(two, second[..., :1], swap)
    assert distance(found[:, :, :1], expected) < case.exact
    assert distance(found_last, expected_last) < case.exact


@torch.no_grad()
def test_a_refilled_place_is_a_new_sentence(case: Case) -> None:
    """Sentence 0 starts in the middle, sentence 2 takes the place of sentence 1 later."""
    model = case.model
    expected, cache = single_steps(case, TOKENS), start(case, rows=[1, 1])
    for t in range(2):
        model.ar_block(cache, TOKENS[[1, 1], None, t : t + 1])
    cache.refill(torch.tensor([0]), model.encode(SOURCES[:1], LENGTHS[:1]))
    assert not cache.even
    found = [
        model.ar_block(cache, torch.stack([TOKENS[0, t], TOKENS[1, t + 2]])[:, None, None])[:, 0]
        for t in range(3)
    ]
    assert distance(torch.cat(found, 1)[0], expected[0, :3]) < case.exact
    assert distance(torch.cat(found, 1)[1], expected[1, 2:5]) < case.exact
    cache.refill(torch.tensor([1]), model.encode(SOURCES[2:], LENGTHS[2:]))
    assert cache.taken_B.tolist() == [3, 0]
    found = [
        model.ar_block(cache, torch.stack([TOKENS[0, t + 3], TOKENS[2, t]])[:, None, None])[:, 0]
        for t in range(4)
    ]
    assert distance(torch.cat(found, 1)[0], expected[0, 3:]) < case.exact
    assert distance(torch.cat(found, 1)[1], expected[2, :4]) < case.exact
    # The widest source has gone: nothing is kept of its width.
    cache.refill(torch.tensor([0]), model.encode(SOURCES[1:2], LENGTHS[1:2]))
    assert cache.memory.valid_BS.shape[1] == max(LENGTHS[1], LENGTHS[2])


@torch.no_grad()
def test_the_pool_grows_and_forgets_nothing(case: Case, monkeypatch: Any) -> None:
    expected = single_steps(case, TOKENS)
    monkeypatch.setattr("janus_ds.model.decoding.cache._FIRST_STEPS", 2)
    cache = start(case)
    widths = []
    found = []
    for t in range(7):
        found.append(case.model.ar_block(cache, TOKENS[:, None, t : t + 1])[:, 0])
        widths.append(cache.keys[0].shape[2])
    assert distance(torch.cat(found, 1), expected) < case.exact
    assert widths == [2, 2, 4, 4, 8, 8, 8]
