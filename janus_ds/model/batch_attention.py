"""Which attention the decoder rows of a batch take, and attention of packed rows.

Both back ends, `dense` and `grouped` (`attention`), compute one predicate
(:func:`janus_ds.stream_mask.visible`). Packed rows are spread into the grid of a padded batch, attend there,
and are taken out again; everything else in the model sees a packed batch as a batch of one without padding.

Shape letters as in `attention` and `janus_ds.packing`; T rows computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.model.attention import DenseRows, GroupedRows, Kernel, KeysValues, RowAttention
from janus_ds.packing import GridPlaces, segment_parts, source_part, unpacked
from janus_ds.stream_mask import CONTENT_SEGMENTS, Segment

DENSE_ROW_LIMIT = 48
"""Longest segment for which one dense call beats several smaller ones (measured on CPU: even at ~45)."""


@dataclass(frozen=True)
class RowsOfBatch:
    """Self-attention of a batch's decoder rows."""

    every: RowAttention
    """All rows: what every layer but the last computes."""
    predicted: RowAttention
    """The rows that something is predicted from: what the last layer computes."""
    every_runs: tuple[int, ...]
    """How all rows alternate between AR and other rows (:meth:`RowAttention.attend_source`)."""
    predicted_runs: tuple[int, ...]
    """The same of the predicted rows."""

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype, backend: str = "auto") -> RowsOfBatch:
        """Masks of a batch, made once for all layers.

        Args:
            dtype: dtype of the masks, that of the queries.
            backend: a key of :data:`BACKENDS`, or auto.
        """
        name = fitting(batch.layout) if backend == "auto" else backend
        rows = BACKENDS[name].build(unpacked(batch), dtype)
        first = Segment.MSK if batch.layout.predicted_start else Segment.ARC
        every, predicted = rows, rows.from_row(batch.layout.predicted_start)
        runs = _runs(batch.layout, Segment.ARC), _runs(batch.layout, first)
        if batch.layout.packed is None:
            return cls(every, predicted, *runs)
        packed = PackedRows.build(batch, every)
        return cls(packed, packed.from_segment(batch, predicted, first), *runs)


def _runs(layout: RowLayout, first: Segment) -> tuple[int, ...]:
    """Rows from a segment on: AR content, the original part and its compensation, AR queries, AUX queries."""
    arc, vis, cmp, msk, arq, qry = (layout.width(s) if s >= first else 0 for s in Segment)
    return arc, vis + cmp + msk, arq, qry


BACKENDS: dict[str, type[DenseRows] | type[GroupedRows]] = {"dense": DenseRows, "grouped": GroupedRows}


def fitting(layout: RowLayout) -> str:
    """The faster back end for a shape: dense for short sentences and several groups of rows, or grouped."""
    groups = (layout.arc > 0) + (layout.vis + layout.msk > 0) + (layout.cmp + layout.qry > 0)
    longest = max(layout.arc, layout.vis + layout.msk)
    return "dense" if longest <= DENSE_ROW_LIMIT and groups > 1 else "grouped"


@dataclass(frozen=True)
class PackedRows(RowAttention):
    """Attention of packed decoder rows; `content_rows` and `first_row` count packed rows."""

    inner: RowAttention
    """Of the grid."""
    queries: GridPlaces
    content: GridPlaces
    source: GridPlaces

    @classmethod
    def build(cls, batch: TwoStreamBatch, inner: RowAttention) -> PackedRows:
        """All rows of a packed batch."""
        packed = batch.layout.packed
        if packed is None:
            raise ValueError("the batch is not packed")
        content = segment_parts(batch, CONTENT_SEGMENTS)
        return cls(
            packed.content_rows,
            0,
            inner,
            GridPlaces.of(segment_parts(batch, list(Segment))),
            GridPlaces.of(content),
            GridPlaces.of([source_part(batch)]),
        )

    def from_segment(self, batch: TwoStreamBatch, inner: RowAttention, first: Segment) -> PackedRows:
        """The same attention for the rows from one segment on; `inner` is that of these rows."""
        layout = batch.layout
        queries = segment_parts(batch, [s for s in Segment if s >= first])
        return replace(
            self,
            inner=inner,
            first_row=layout.packed.start(first) if layout.packed else 0,
            queries=GridPlaces.of(queries),
        )

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`; all of shape (1, H, rows, E), the result (1, T, H, E)."""
        q = _spread(self.queries, q_BHTE)
        k, v = _spread(self.content, k_BHCE), _spread(self.content, v_BHCE)
        return _take(self.queries, self.inner.attend(kernel, q, k, v))

    def attend_source(
        self,
        kernel: Kernel,
        q_BHTE: Tensor,
        sources: Sequence[KeysValues],
        mask_B11S: Tensor | None,
        runs: Sequence[int] = (),
    ) -> Tensor:
        """See :class:`RowAttention`; queries, keys and values are packed, mask and `runs` are the grid's."""
        q = _spread(self.queries, q_BHTE)
        spread = [(_spread(self.source, k), _spread(self.source, v)) for k, v in sources]
        return _take(self.queries, self.inner.attend_source(kernel, q, spread, mask_B11S, runs))


def attend_packed_source(
    places: GridPlaces, kernel: Kernel, projected: tuple[Tensor, Tensor, Tensor], mask_B11S: Tensor | None
) -> Tensor:
    """Self-attention of packed source tokens, (1, tokens, H, E).

    Args:
        projected: queries, keys and values, (1, H, tokens, E) each.
        mask_B11S: padding of the source in its grid.
    """
    q, k, v = (_spread(places, x) for x in projected)
    return _take(places, kernel(q, k, v, mask_B11S))


def _spread(places: GridPlaces, x_1HTE: Tensor) -> Tensor:
    """(1, H, T, E) -> (B, H, R, E)."""
    heads = x_1HTE.shape[1]
    grid = places.spread(x_1HTE.transpose(1, 2).flatten(2))
    return grid.unflatten(2, (heads, -1)).transpose(1, 2)


def _take(places: GridPlaces, out_BRHE: Tensor) -> Tensor:
    """(B, R, H, E) -> (1, T, H, E)."""
    return places.take(out_BRHE.flatten(2)).unflatten(2, out_BRHE.shape[2:])
