"""The contracts between data, model, objective and decoding: token rows, batches, rows to predict from.

Shape letters: B samples, S source tokens, R decoder rows, C content rows, A AR rows, V visible
rows, M masked slots, D width, K length classes, U unmasked AR predictions of the batch,
T masked tokens of the batch (both counted over all samples, without padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike
from torch import Tensor

from janus_ds.stream_mask import CONTENT_SEGMENTS, Segment, visible

IntArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special symbols and the size of the vocabulary they belong to."""

    bos: int
    pad: int
    eos: int
    unk: int
    mask: int
    vocab_size: int

    @property
    def ids(self) -> frozenset[int]:
        """Those of all symbols; some models have one for two of them."""
        return frozenset((self.bos, self.pad, self.eos, self.unk, self.mask))


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in two flat arrays, the one in-memory form of token data.

    Of n rows, row i is `values[offsets[i]:offsets[i + 1]]`.

    Args:
        values: all rows one after the other, one-dimensional.
        offsets: int64, shape (n + 1,), starts at 0, never falls, ends at `len(values)`.
    """

    values: IntArray
    offsets: IntArray

    @classmethod
    def from_rows(cls, rows: Sequence[ArrayLike], dtype: DTypeLike = np.int64) -> Ragged:
        """Build from a list of one-dimensional rows; the values get `dtype`."""
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))  # type: ignore[arg-type]
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
        return cls.from_lengths(values, lengths)

    @classmethod
    def from_lengths(cls, values: IntArray, lengths: ArrayLike) -> Ragged:
        """Build from flat values and the length of each row."""
        return cls(values, np.append(0, np.cumsum(np.asarray(lengths, dtype=np.int64))))

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, in order; `parts` must not be empty."""
        values = np.concatenate([part.values for part in parts])
        return cls.from_lengths(values, np.concatenate([part.lengths for part in parts]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """int64, shape (n,): tokens of each row."""
        return self.offsets[1:] - self.offsets[:-1]

    def row(self, index: int) -> IntArray:
        """Row 0 .. n - 1, a view."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def rows(self) -> list[IntArray]:
        """All rows, as views."""
        return [self.row(index) for index in range(len(self))]

    def map(self, function: Callable[[IntArray], ArrayLike]) -> Ragged:
        """What the function makes of each row (int64), of any length."""
        return Ragged.from_rows([function(row.astype(np.int64)) for row in self.rows()])

    def take(self, rows: ArrayLike) -> Ragged:
        """The chosen rows in the chosen order; a row may be chosen more than once."""
        chosen = np.asarray(rows, dtype=np.int64)
        starts = self.offsets[chosen]
        lengths = self.offsets[chosen + 1] - starts
        offsets = np.append(0, np.cumsum(lengths))
        # Flat position k of the result lies in row r(k): source = start[r] + (k - offset[r]).
        shift = np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[shift + np.arange(offsets[-1])], offsets)

    def slice(self, start: int, stop: int) -> Ragged:
        """Rows start .. stop - 1; the values are a view."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])


@dataclass(frozen=True)
class RowLayout:
    """Widths of the six row segments, in the order of :class:`Segment`; zero means absent.

    The order ARC, VIS, CMP, MSK, ARQ, QRY puts all content rows first (one fused projection of
    queries, keys and values) and all predicted rows last (MSK, ARQ, QRY: what the last layer
    computes). Plain AR has ARC rows alone, which are then predicted from.
    """

    arc: int = 0
    vis: int = 0
    cmp: int = 0
    msk: int = 0
    arq: int = 0
    qry: int = 0

    def width(self, segment: Segment) -> int:
        """Rows of a sample in one segment, padding included."""
        # By value: an IntEnum as an index is more than torch.compile can follow.
        return (self.arc, self.vis, self.cmp, self.msk, self.arq, self.qry)[segment.value]

    def start(self, segment: Segment) -> int:
        """First column of one segment."""
        return sum(self.width(other) for other in Segment if other < segment)

    def columns(self, segment: Segment) -> slice:
        """The columns of one segment."""
        start = self.start(segment)
        return slice(start, start + self.width(segment))

    @property
    def rows(self) -> int:
        """R: all columns."""
        return sum(self.width(segment) for segment in Segment)

    @property
    def content_rows(self) -> int:
        """C: the columns that give keys and values, [0, C)."""
        return self.start(Segment.ARQ)

    @property
    def predicted_start(self) -> int:
        """The columns [predicted_start, R) are those that the last layer computes."""
        plain_ar = self.arc > 0 and self.arq == 0
        return 0 if plain_ar else self.start(Segment.MSK)

    def segment_and_rank(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """The segment of every column and its rank in there (`stream_mask`), int64, each of shape (R,)."""
        widths = [self.width(segment) for segment in Segment]
        segments = [torch.full((n,), s, device=device) for s, n in zip(Segment, widths, strict=True)]
        return torch.cat(segments), torch.cat([torch.arange(n, device=device) for n in widths])

    def visible(
        self, queries: slice | Tensor, keys: slice | Tensor, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Whether rows see content rows, padding aside, for columns of each: boolean, (queries, keys)."""
        segment_R, rank_R = self.segment_and_rank(device)
        rule: Tensor = visible(
            segment_R[queries, None], rank_R[queries, None], segment_R[None, keys], rank_R[None, keys]
        )
        return rule


@dataclass(frozen=True)
class BatchCounts:
    """Host-side counts, so that no step asks the device. They add up over batches and ranks."""

    samples: int = 0
    source_tokens: int = 0
    target_tokens: int = 0
    """L summed over samples: target tokens with their specials."""
    ar_tokens: int = 0
    """Tokens that AR predicts, eos included; 0 where AR is not trained."""
    masked_tokens: int = 0
    """Tokens that NAR and AUX predict; 0 where masked tokens are not trained."""

    def __add__(self, other: BatchCounts) -> BatchCounts:
        return BatchCounts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        """The counts in field order, for a reduction over ranks."""
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class TwoStreamBatch:
    """One micro-batch, laid out for one pass of the model over all decoder rows.

    Padding stands at the end of every segment and of the source. Token and position of padding
    rows are the pad symbol and 0.
    """

    layout: RowLayout
    counts: BatchCounts
    sample_id_B: Tensor
    """int64: the number of each sample in the data set."""
    source_BS: Tensor
    """int64: encoder input with its bos and eos."""
    source_length_B: Tensor
    row_token_BR: Tensor
    row_position_BR: Tensor
    ar_length_B: Tensor
    """AR content rows of each sample, and AR query rows where there are any."""
    visible_length_B: Tensor
    masked_length_B: Tensor
    """M_b: rows of each sample in MSK, and in CMP and QRY where it has these."""
    ar_target_BA: Tensor
    """int64: the token that each predicting AR row predicts; pad in padding. Shape (B, 0) without AR."""
    masked_target_BM: Tensor
    """int64: the gold token of each masked slot; pad in padding."""
    length_target_B: Tensor
    """int64: class of the length head."""
    ar_unmasked_U: Tensor
    """int64: flat index b * A + a of the AR predictions whose token is not masked."""
    ar_masked_T: Tensor
    """int64: flat index b * A + a of the AR prediction of each masked token; empty without AR."""
    masked_T: Tensor
    """int64: flat index b * M + j of each masked token, in the order of `ar_masked_T`."""
    draws: int = 1
    """Dropout draws of each sample; with 2, the second half of the samples repeats the first."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensor fields by name."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value

    def to(self, device: torch.device | str) -> TwoStreamBatch:
        """The same batch on a device; copies do not wait where memory is pinned."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors()}
        return self._with(moved)

    def pin_memory(self) -> TwoStreamBatch:
        """The same batch in page-locked memory."""
        return self._with({name: value.pin_memory() for name, value in self.tensors()})

    def __getstate__(self) -> dict[str, Any]:
        # Tensors would pass between processes through shared memory: one file descriptor each, and a socket
        # in a temporary folder (pymp-*), which stays when the process is killed.
        return {**vars(self), **{name: value.numpy() for name, value in self.tensors()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        arrays = {k: torch.from_numpy(v) for k, v in state.items() if isinstance(v, np.ndarray)}
        vars(self).update(state | arrays)

    def _with(self, tensors: dict[str, Tensor]) -> TwoStreamBatch:
        return replace(self, **tensors)  # type: ignore[arg-type]

    def row_length_B(self, segment: Segment) -> Tensor:
        """Rows of each sample in one segment, where the sample has that segment at all."""
        if segment in (Segment.ARC, Segment.ARQ):
            return self.ar_length_B
        return self.visible_length_B if segment == Segment.VIS else self.masked_length_B

    def content_valid_BC(self) -> Tensor:
        """False for padding among the content rows, boolean, shape (B, C)."""
        layout, device = self.layout, self.row_token_BR.device
        parts = [
            torch.arange(layout.width(segment), device=device) < self.row_length_B(segment)[:, None]
            for segment in CONTENT_SEGMENTS
        ]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class PredictedRows:
    """What the model hands to the objective: hidden rows to predict from, not logits."""

    ar_BAD: Tensor | None
    """Hidden rows of AR (ARQ; or ARC for the plain single-stream decoder)."""
    nar_BMD: Tensor | None
    """Hidden rows of MSK."""
    aux_BMD: Tensor | None
    """Hidden rows of QRY."""
    length_logits_BK: Tensor | None
    output_weight: Tensor
    """The tied output embedding, (V, D), or this rank's rows of it under tensor parallelism."""
