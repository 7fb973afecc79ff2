"""A step takes a block of tokens, each sentence at its own point: exactly what single steps give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.config.schema import ObjectiveConfig
from janus_ds.model.decoding.cache import ArStream, KVCache
from janus_ds.model.janus import JanusModel
from tests.support.tiny_model import TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY

EXACT = 1e-12
SOURCES = torch.tensor([[0, 9, 8, 7, 2], [0, 7, 2, 1, 1], [0, 6, 5, 2, 1]])
LENGTHS = torch.tensor([5, 3, 4])
TOKENS = torch.tensor([[0, 11, 12, 13, 14, 15, 16], [0, 21, 22, 23, 24, 25, 26], [0, 9, 8, 7, 6, 5, 11]])
STREAMS = [
    (TINY, ObjectiveConfig(ar_stream="query", ar_query_position="predicted", decoder_start="bos")),
    (TINY_NMT, ObjectiveConfig(ar_stream="query", ar_query_position="previous", decoder_start="bos")),
    (TINY, ObjectiveConfig(ar_stream="content", ar_query_position="predicted", decoder_start="bos")),
]


@pytest.fixture(params=STREAMS, ids=["predicted", "previous", "content"])
def case(request: Any) -> tuple[JanusModel, ArStream]:
    config, objective = request.param
    return tiny_model(config), ArStream.of(objective, TOY)


def start(case: tuple[JanusModel, ArStream], beams: int = 1, rows: Any = slice(None)) -> KVCache:
    model, stream = case
    memory = model.encode(SOURCES[rows], LENGTHS[rows])
    return model.start_cache(memory, stream, beams, 12)


def single_steps(case: tuple[JanusModel, ArStream], tokens: Tensor) -> Tensor:
    """Hidden rows of every token, one step each, (B, T, D)."""
    cache = start(case)
    return torch.cat([case[0].ar_step(cache, tokens[:, t : t + 1]) for t in range(tokens.shape[1])], 1)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@torch.no_grad()
def test_a_block_is_its_single_steps(case: tuple[JanusModel, ArStream]) -> None:
    expected, cache, model = single_steps(case, TOKENS), start(case), case[0]
    found = [model.ar_block(cache, TOKENS[:, None, a:b])[:, 0] for a, b in ((0, 3), (3, 4), (4, 7))]
    assert distance(torch.cat(found, 1), expected) < EXACT
    assert cache.even
    assert cache.reach == 7


@torch.no_grad()
def test_sentences_stand_at_their_own_points_and_rejected_rows_are_dropped(
    case: tuple[JanusModel, ArStream],
) -> None:
    """A ragged draft: each block holds what is right up to a point, and other tokens behind it."""
    expected, cache, model = single_steps(case, TOKENS), start(case), case[0]
    taken = torch.zeros(3, dtype=torch.long)
    for kept in ([4, 1, 2], [0, 4, 1], [3, 0, 2], [0, 2, 2]):
        block = torch.full((3, 4), 19)
        for b, count in enumerate(kept):
            block[b, :count] = TOKENS[b, taken[b] : taken[b] + count]
        found = model.ar_block(cache, block[:, None])[:, 0]
        for b, count in enumerate(kept):
            assert count == 0 or distance(found[b, :count], expected[b, taken[b] : taken[b] + count]) < EXACT
        taken += torch.tensor(kept)
        cache.accept(torch.tensor(kept))
        assert cache.taken_B.tolist() == taken.tolist()
        assert cache.reach == int(taken.max())
    assert taken.tolist() == [7, 7, 7]
    assert cache.even
    # A part of them goes on alone.
    again = torch.tensor([[[17]], [[18]]])
    whole = model.ar_block(start_with(case, TOKENS), torch.tensor([[[17]], [[20]], [[18]]]))[[0, 2]]
    assert distance(model.ar_block(cache.select(torch.tensor([0, 2])), again), whole) < EXACT


def start_with(case: tuple[JanusModel, ArStream], tokens: Tensor) -> KVCache:
    cache = start(case)
    case[0].ar_block(cache, tokens[:, None])
    return cache


@torch.no_grad()
def test_blocks_of_beams(case: tuple[JanusModel, ArStream]) -> None:
    """Two beams that swap their pasts, blocks of two tokens, one of which is taken back."""
    model, one, two = case[0], start(case, 2), start(case, 2)
    first = torch.stack([TOKENS[:, :2], TOKENS[:, 2:4]], 1)
    second = torch.stack([TOKENS[:, 3:5], TOKENS[:, 5:7]], 1)
    swap = torch.tensor([[1, 0], [0, 0], [1, 1]])
    model.ar_block(one, first)
    found = model.ar_block(one, second, swap)
    one.accept(torch.ones(3, dtype=torch.long))
    found_last = model.ar_block(one, second[..., :1], swap)
    for t in range(2):
        model.ar_step(two, first[..., t])
    expected = [model.ar_step(two, second[..., 0], swap)]
    expected_last = model.ar_step(two, second[..., 0], swap)
    assert distance(found[:, :, 0], expected[0]) < EXACT
    assert distance(found_last[:, :, 0], expected_last) < EXACT


@torch.no_grad()
def test_a_refilled_place_is_a_new_sentence(case: tuple[JanusModel, ArStream]) -> None:
    """Sentence 0 starts in the middle, sentence 2 takes the place of sentence 1 later."""
    model = case[0]
    expected, cache = single_steps(case, TOKENS), start(case, rows=[1, 1])
    for t in range(2):
        model.ar_step(cache, TOKENS[[1, 1], t : t + 1])
    cache.refill(torch.tensor([0]), model.encode(SOURCES[:1], LENGTHS[:1]))
    assert not cache.even
    found = [model.ar_step(cache, torch.stack([TOKENS[0, t], TOKENS[1, t + 2]])[:, None]) for t in range(3)]
    assert distance(torch.cat(found, 1)[0], expected[0, :3]) < EXACT
    assert distance(torch.cat(found, 1)[1], expected[1, 2:5]) < EXACT
    cache.refill(torch.tensor([1]), model.encode(SOURCES[2:], LENGTHS[2:]))
    assert cache.taken_B.tolist() == [3, 0]
    found = [model.ar_step(cache, torch.stack([TOKENS[0, t + 3], TOKENS[2, t]])[:, None]) for t in range(4)]
    assert distance(torch.cat(found, 1)[0], expected[0, 3:]) < EXACT
    assert distance(torch.cat(found, 1)[1], expected[2, :4]) < EXACT
    # The widest source has gone: nothing is kept of its width.
    cache.refill(torch.tensor([0]), model.encode(SOURCES[1:2], LENGTHS[1:2]))
    assert cache.memory.valid_BS.shape[1] == max(LENGTHS[1], LENGTHS[2])


@torch.no_grad()
def test_the_pool_grows_and_forgets_nothing(case: tuple[JanusModel, ArStream], monkeypatch: Any) -> None:
    expected = single_steps(case, TOKENS)
    monkeypatch.setattr("janus_ds.model.decoding.cache._FIRST_STEPS", 2)
    cache = start(case)
    widths = []
    found = []
    for t in range(7):
        found.append(case[0].ar_step(cache, TOKENS[:, t : t + 1]))
        widths.append(cache.keys[0].shape[2])
    assert distance(torch.cat(found, 1), expected) < EXACT
    assert widths == [2, 2, 4, 4, 8, 8, 8]
