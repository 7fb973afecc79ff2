"""Attention of packed rows: spread into the grid of a padded batch, attend there, take the rows out again.

Everything else in the model sees a batch of one without padding. Which back end attends in the grid, and
with which masks, is as for a padded batch.

Shape letters as in `janus_ds.packing` and `row_attention`; T rows computed, C content rows, S source tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.model.row_attention import Kernel, RowAttention, attend_draws
from janus_ds.packing import GridPlaces, segment_parts, source_part
from janus_ds.stream_mask import Segment

__all__ = ["PackedRows", "attend_source_rows"]


@dataclass(frozen=True)
class PackedRows:
    """Self-attention of packed decoder rows, and their cross-attention."""

    inner: RowAttention
    """Of the grid."""
    content_rows: int
    """C, packed."""
    first_row: int
    """Packed; queries are the rows behind it."""
    queries: GridPlaces
    content: GridPlaces
    source: GridPlaces

    @classmethod
    def build(cls, batch: TwoStreamBatch, inner: RowAttention) -> PackedRows:
        """All rows of a packed batch.

        Args:
            batch: packed.
            inner: of the unpacked batch.
        """
        packed = batch.layout.packed
        if packed is None:
            raise ValueError("the batch is not packed")
        content = segment_parts(batch, [s for s in Segment if s < Segment.ARQ])
        return cls(
            inner,
            packed.content_rows,
            0,
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
        sources: Sequence[tuple[Tensor, Tensor]],
        mask_B11S: Tensor | None,
        runs: Sequence[int],
    ) -> Tensor:
        """Attention to the encoder states of each row's own sample.

        Args:
            kernel: of the cross-attention.
            q_BHTE: queries of the rows behind `first_row`, (1, H, T, E).
            sources: packed keys and values of the encoder states, (1, H, tokens, E), of each dropout draw.
            mask_B11S: padding of the source in its grid.
            runs: of the grid's rows (`row_attention.attend_draws`).

        Returns:
            attended values, (1, T, H, E).
        """
        q = _spread(self.queries, q_BHTE)
        spread = [(_spread(self.source, k), _spread(self.source, v)) for k, v in sources]
        return _take(self.queries, attend_draws(kernel, q, spread, mask_B11S, runs))


def attend_source_rows(
    places: GridPlaces, kernel: Kernel, projected: tuple[Tensor, Tensor, Tensor], mask_B11S: Tensor | None
) -> Tensor:
    """Self-attention of packed source tokens, (1, tokens, H, E).

    Args:
        places: of the source.
        kernel: of the attention.
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
