"""What decoding keeps between steps: the encoded source and the content rows seen so far.

The keys and values of the encoder states are computed once per sentence; beams, length candidates and
both streams are folded into the query axis. The cache holds each content key once (the released code
holds it twice, so that it decodes differently from how it trains) and is never reordered: a beam knows
its past by a row of `visible_BKN`.

Shape letters: B sentences, K beams, N = K x steps cached content rows, S source tokens, L target tokens,
D width, H heads, E width of a head, T query rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.model.attention import Kernel
from janus_ds.model.transformer import KeysValues

__all__ = ["ArCache", "ArStream", "CachedRows", "CandidateRows", "Memory", "new_cache"]


@dataclass(frozen=True)
class Memory:
    """An encoded batch of sources."""

    states_BSD: Tensor
    valid_BS: Tensor
    mask_B11S: Tensor | None
    """Additive mask of padding; None where nothing is padded."""
    source: tuple[KeysValues, ...]
    """Keys and values for the cross-attention of each decoder layer."""

    @property
    def sentences(self) -> int:
        """B."""
        return self.states_BSD.shape[0]

    def select(self, sentence_B: Tensor) -> Memory:
        """The memory of some sentences only, by index, in any order."""
        mask = self.mask_B11S
        return Memory(
            self.states_BSD[sentence_B],
            self.valid_BS[sentence_B],
            None if mask is None else mask[sentence_B],
            tuple((k[sentence_B], v[sentence_B]) for k, v in self.source),
        )


@dataclass(frozen=True)
class ArStream:
    """How AR rows are made in decoding, as the model was trained (`ObjectiveConfig`).

    `ar_stream: content` has no query row; else the query that follows the content row at position t
    stands at t + `query_offset`: 1 for `ar_query_position: predicted` with `decoder_start: bos`, else 0.
    """

    two_stream: bool
    query_offset: int
    query_token: int
    """The MASK of query rows."""

    @classmethod
    def of(cls, objective: ObjectiveConfig, special: SpecialTokens) -> ArStream:
        """The rows that a resolved objective trains."""
        ahead = objective.ar_query_position == "predicted" and objective.decoder_start == "bos"
        mask = special.unk if objective.mask_symbol == "unk" else special.mask
        return cls(objective.ar_stream == "query", int(ahead), mask)


@dataclass
class ArCache:
    """State of an AR search: `JanusModel.ar_step` appends one content row per beam to it."""

    memory: Memory
    stream: ArStream
    beams: int
    keys: list[Tensor]
    """For each layer (B, H, K x max_steps, E); row step x K + k belongs to beam slot k."""
    values: list[Tensor]
    visible_BKN: Tensor
    """Which cached rows are the past of each beam, boolean, (B, K, K x max_steps)."""
    step: int = 0

    def follow(self, parent_BK: Tensor) -> None:
        """Let beam k go on from beam parent_BK[b, k]; called between two steps."""
        index = parent_BK[:, :, None].expand_as(self.visible_BKN)
        self.visible_BKN = self.visible_BKN.gather(1, index)

    def select(self, sentence_B: Tensor) -> ArCache:
        """The cache of some sentences only, by index (the finished ones need no more steps)."""
        return replace(
            self,
            memory=self.memory.select(sentence_B),
            keys=[k[sentence_B] for k in self.keys],
            values=[v[sentence_B] for v in self.values],
            visible_BKN=self.visible_BKN[sentence_B],
        )


@dataclass(frozen=True)
class CachedRows:
    """Self-attention of the new rows of one AR step over the cached past of their beam."""

    keys: Tensor
    values: Tensor
    start: int
    """Cached rows before this step; this step's content rows are appended there."""
    mask_B1TN: Tensor | None
    content_rows: int
    first_row: int

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor) -> Tensor:
        """See :class:`janus_ds.model.attention.RowAttention`."""
        end = self.start + k_BHKE.shape[2]
        self.keys[:, :, self.start : end] = k_BHKE
        self.values[:, :, self.start : end] = v_BHKE
        mask = None if self.mask_B1TN is None else self.mask_B1TN[:, :, self.first_row :]
        return kernel(q_BHTE, self.keys[:, :, :end], self.values[:, :, :end], mask)


@dataclass(frozen=True)
class CandidateRows:
    """Self-attention of NAR rows inside each length candidate; candidates are folded into the rows."""

    mask: Tensor
    """Additive, (B x candidates, 1, 1, L)."""
    content_rows: int
    candidates: int
    first_row: int = 0

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        """See :class:`janus_ds.model.attention.RowAttention`."""
        out = kernel(self._apart(q_BHTE), self._apart(k_BHTE), self._apart(v_BHTE), self.mask)
        return out.reshape(-1, self.content_rows, *out.shape[2:])

    def _apart(self, x_BHTE: Tensor) -> Tensor:
        """(B, H, candidates x L, E) -> (B x candidates, H, L, E)."""
        sentences, heads, _, width = x_BHTE.shape
        return x_BHTE.reshape(sentences, heads, self.candidates, -1, width).transpose(1, 2).flatten(0, 1)


def new_cache(memory: Memory, stream: ArStream, beams: int, max_steps: int) -> ArCache:
    """A cache without rows, with room for `max_steps` steps."""
    rows = beams * max_steps
    keys = [k.new_empty(k.shape[0], k.shape[1], rows, k.shape[3]) for k, _ in memory.source]
    visible = memory.valid_BS.new_zeros(memory.sentences, beams, rows)
    return ArCache(memory, stream, beams, keys, [torch.empty_like(k) for k in keys], visible)
