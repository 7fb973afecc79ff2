"""AR steps of fixed shapes, replayed as CUDA graphs: one launch a step instead of hundreds.

A graph repeats the kernels of its capture on the addresses of its capture. A :class:`StaticStep` therefore
works on buffers: what it is given is copied into them, and what a sentence has not reached is hidden by
masks. Room for tokens and for sources comes in doubling sizes, and sentences are filled up to a power of
two with rows that nobody reads, so that few graphs serve all searches of a model.

Shape letters: B sentences, K beams, N columns of the pool, S source tokens, D width, H heads, E width of a
head, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from janus_ds.model.graph_runners import CalledAgain, Capture, capture_on
from janus_ds.model.incremental import ArCache, ArStream, Memory
from janus_ds.model.row_attention import additive_mask

if TYPE_CHECKING:
    from janus_ds.model.janus import JanusModel

__all__ = ["StaticStep", "StepGraphs", "StepSize"]

_LEAST_TOKENS, _LEAST_SOURCE = 32, 64
"""Room for tokens of a beam and for source tokens of the smallest graphs."""


@dataclass(frozen=True)
class StepSize:
    """What a graph is captured for."""

    stream: ArStream
    sentences: int
    beams: int
    tokens: int
    """Room for so many tokens a beam, N / K."""
    source: int
    """S."""

    @classmethod
    def of(cls, cache: ArCache) -> StepSize:
        """The smallest size that the next step of a search fits into."""
        sentences, source = cache.memory.valid_BS.shape
        return cls(
            cache.stream,
            _doubled(1, sentences),
            cache.beams,
            _doubled(_LEAST_TOKENS, cache.reach + 1),
            _doubled(_LEAST_SOURCE, source),
        )


def _doubled(size: int, wanted: int) -> int:
    while size < wanted:
        size *= 2
    return size


class _StaticCache(ArCache):
    """A cache of which every tensor stays where it is; who feeds it counts the tokens."""

    def follow(self, parent_BK: Tensor) -> None:
        """See :meth:`ArCache.follow`; in place."""
        index = parent_BK[:, :, None].expand_as(self.past_BKN)
        self.past_BKN.copy_(self.past_BKN.gather(1, index))

    def advance(self, tokens: int) -> None:
        """`taken_B` is an input of the next step."""


class StaticStep:
    """One AR step of one size on buffers of its own, captured when it is made.

    A cache that was taken over has its tensors in these buffers from then on: its methods, and steps of
    other kinds, go on as ever. It must not be stepped again here after another one was taken over.

    Args:
        model: in evaluation mode.
        cache: one that will be taken over, for devices and widths.
        size: of the buffers.
        capture: makes the runner.
    """

    def __init__(self, model: JanusModel, cache: ArCache, size: StepSize, capture: Capture) -> None:
        self._model = model
        # Buffers that may be changed whatever the mode of later searches.
        with torch.inference_mode(False):
            self._make_buffers(cache, size)
        self._runner = capture(self.body)

    def _make_buffers(self, cache: ArCache, size: StepSize) -> None:
        B, K, N, S = size.sentences, size.beams, size.tokens * size.beams, size.source
        states, taken = cache.memory.states_BSD, cache.taken_B
        memory = Memory(
            states.new_zeros(B, S, states.shape[2]),
            cache.memory.valid_BS.new_zeros(B, S),
            states.new_zeros(B, 1, 1, S),
            tuple((_blank(k, B, S), _blank(v, B, S)) for k, v in cache.memory.source),
        )
        self.token_BK, self.parent_BK = taken.new_zeros(B, K), taken.new_zeros(B, K)
        self._own_K = torch.arange(K, device=taken.device)
        # All sentences stand at points of their own, somewhere in the whole width of the pool.
        self.cache = _StaticCache(
            memory=memory,
            stream=size.stream,
            beams=K,
            keys=[_blank(k, B, N) for k in cache.keys],
            values=[_blank(v, B, N) for v in cache.values],
            past_BKN=cache.past_BKN.new_zeros(B, K, N),
            taken_B=taken.new_zeros(B),
            reach=size.tokens - 1,
            even=False,
        )
        self._memory, self._past, self._keys = memory, self.cache.past_BKN, self.cache.keys

    def body(self) -> Tensor:
        """The step: logits, (B, K, V), from what the buffers hold. Reads no value on the host."""
        model = self._model
        return model.logits(model.ar_step(self.cache, self.token_BK, self.parent_BK))

    def holds(self, cache: ArCache) -> bool:
        """Whether a cache was taken over and has put nothing beside the buffers since."""
        return cache.memory is self._memory and self._has_pools_of(cache)

    def take_over(self, cache: ArCache) -> None:
        """Copy what is not there yet of a cache into the buffers, and let it have its tensors there."""
        own, sentences = self.cache, cache.memory.sentences
        if cache.memory is not self._memory:
            _copy_source(own.memory, cache.memory)
            self._memory = cache.memory = _front(own.memory, sentences)
        if self._has_pools_of(cache):
            return
        used = cache.reach * cache.beams
        buffers, tensors = ((c.past_BKN, *c.keys, *c.values) for c in (own, cache))
        for buffer, tensor in zip(buffers, tensors, strict=True):
            _put(buffer, tensor, used)
        self._past = cache.past_BKN = own.past_BKN[:sentences]
        self._keys = cache.keys = [k[:sentences] for k in own.keys]
        cache.values = [v[:sentences] for v in own.values]

    def run(self, cache: ArCache, token_BK: Tensor, parent_BK: Tensor | None) -> Tensor:
        """Logits, (B, K, V), of a cache that it holds; they stand until the next call."""
        sentences = len(token_BK)
        self.cache.taken_B[:sentences].copy_(cache.taken_B)
        self.token_BK[:sentences].copy_(token_BK)
        self.parent_BK[:sentences].copy_(self._own_K if parent_BK is None else parent_BK)
        return self._runner.replay()[:sentences]

    def _has_pools_of(self, cache: ArCache) -> bool:
        return cache.past_BKN is self._past and cache.keys is self._keys


class StepGraphs:
    """The graphs of a model, for one search after the other.

    They are kept over searches, those used last, and dropped where the weights have moved (`Module.to`).

    Args:
        model: in evaluation mode.
        kept: graphs that are kept, each with its buffers.
    """

    def __init__(self, model: JanusModel, kept: int = 8) -> None:
        self._model = model
        self._kept = kept
        self._steps: dict[StepSize, StaticStep] = {}
        self._weights: list[int] = []
        self._capture: Capture = CalledAgain
        self.captures = 0
        """Graphs that were captured so far."""

    def step(self, cache: ArCache, token_BK: Tensor, parent_BK: Tensor | None = None) -> Tensor:
        """:meth:`JanusModel.ar_step` and :meth:`JanusModel.logits` as one replay.

        Args:
            cache: of the search that goes on here; another one's cache must not come back.
            token_BK: the next tokens.
            parent_BK: the beam slot that each beam continues; None: its own slot.

        Returns:
            logits, (B, K, V); the next step writes over them.
        """
        size = StepSize.of(cache)
        static = self._steps.get(size)
        if static is None or not static.holds(cache):
            static = self._enter(size, cache)
        logits = static.run(cache, token_BK, parent_BK)
        cache.advance(1)
        return logits

    def _enter(self, size: StepSize, cache: ArCache) -> StaticStep:
        weights = [parameter.data_ptr() for parameter in self._model.parameters()]
        if weights != self._weights:
            self._steps.clear()
            self._weights, self._capture = weights, capture_on(cache.taken_B.device)
        static = self._steps.pop(size, None)
        if static is None:
            static = StaticStep(self._model, cache, size, self._capture)
            self.captures += 1
        self._steps[size] = static
        if len(self._steps) > self._kept:
            # After the capture: a memory pool that no graph uses any more cannot be used again.
            del self._steps[next(iter(self._steps))]
        static.take_over(cache)
        return static


def _blank(like_BHNE: Tensor, sentences: int, columns: int) -> Tensor:
    return like_BHNE.new_zeros(sentences, like_BHNE.shape[1], columns, like_BHNE.shape[3])


def _put(buffer: Tensor, tensor: Tensor, columns: int) -> None:
    """Copy the first columns (dimension 2) of some sentences into the first sentences of a buffer.

    Their other columns become zeros: no row sees them, but what was not finite would come through a mask.
    """
    front = buffer[: len(tensor)]
    front[:, :, :columns].copy_(tensor[:, :, :columns])
    front[:, :, columns:].zero_()


def _front(memory: Memory, sentences: int) -> Memory:
    """The first sentences of a memory, in place."""
    mask = memory.mask_B11S
    return Memory(
        memory.states_BSD[:sentences],
        memory.valid_BS[:sentences],
        None if mask is None else mask[:sentences],
        tuple((k[:sentences], v[:sentences]) for k, v in memory.source),
    )


def _copy_source(buffers: Memory, memory: Memory) -> None:
    """Put a memory into the front of buffers with a mask; all that is not of it is padding."""
    sentences, width = memory.valid_BS.shape
    buffers.valid_BS.zero_()
    buffers.valid_BS[:sentences, :width].copy_(memory.valid_BS)
    buffers.states_BSD[:sentences, :width].copy_(memory.states_BSD)
    for into, layer in zip(buffers.source, memory.source, strict=True):
        for buffer, tensor in zip(into, layer, strict=True):
            _put(buffer, tensor, width)
    mask = additive_mask(buffers.valid_BS[:, None, None], buffers.states_BSD.dtype)
    if buffers.mask_B11S is not None:
        buffers.mask_B11S.copy_(mask)
