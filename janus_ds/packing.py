"""Packed batches: the rows of all samples one after the other, without padding between them.

Only attention distinguishes samples in a packed batch: projections, norms, feed-forward and losses treat rows
one by one. For attention rows are spread into the grid of a padded batch and taken out again
(:class:`GridPlaces`).

Shape letters: B samples, B x R the grid of a padded batch, T packed rows, X width of a row, W rows of a part
and sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.stream_mask import Segment

Array = NDArray[Any]


@dataclass(frozen=True)
class Part:
    """Rows that stand together: a segment of the decoder's, or the source."""

    length_B: Tensor
    """Rows of each sample."""
    width: int
    """W: of the grid."""
    count: int
    """Packed rows, with what fills them up at the end."""


@dataclass(frozen=True)
class GridPlaces:
    """Where packed rows stand in the grid, and where grid rows are kept."""

    kept_BR: Tensor
    """The packed row of each place of the grid; any for padding."""
    padding_BR: Tensor
    place_T: Tensor
    """The place (flat) of each packed row; any for the rows that fill up."""
    filler_T: Tensor

    @classmethod
    def of(cls, parts: Sequence[Part]) -> GridPlaces:
        """Of parts that follow one another, in the grid and packed; without asking the device."""
        kept, places, padding, filler = [], [], [], []
        grid_width = sum(part.width for part in parts)
        first_kept = first_column = 0
        for part in parts:
            length_B, device = part.length_B, part.length_B.device
            end_B = length_B.cumsum(0)
            begin_B = end_B - length_B
            rank_W = torch.arange(part.width, device=device)
            padding.append(rank_W >= length_B[:, None])
            # Padding takes any row that exists (below).
            kept.append(first_kept + begin_B[:, None] + rank_W)
            row_T = torch.arange(part.count, device=device)
            filler.append(row_T >= length_B.sum())
            sample_T = torch.searchsorted(end_B, row_T, right=True).clamp_max(max(0, len(end_B) - 1))
            rank_T = (row_T - begin_B[sample_T]).clamp_max(max(0, part.width - 1))
            places.append(sample_T * grid_width + first_column + rank_T)
            first_kept, first_column = first_kept + part.count, first_column + part.width
        kept_BR = torch.cat(kept, 1).clamp_max(max(0, first_kept - 1))
        return cls(kept_BR, torch.cat(padding, 1), torch.cat(places), torch.cat(filler))

    def spread(self, rows_1TX: Tensor) -> Tensor:
        """Packed rows in the grid, (B, R, X); padding holds copies of other rows, and gives no gradient."""
        grid = _moved(rows_1TX[0], self.kept_BR.flatten(), self.place_T, self.filler_T)
        return grid.view(*self.kept_BR.shape, -1)

    def take(self, grid_BRX: Tensor) -> Tensor:
        """Packed rows out of the grid, (1, T, X); those that fill up hold copies, and give no gradient."""
        rows = grid_BRX.flatten(0, 1)
        return _moved(rows, self.place_T, self.kept_BR.flatten(), self.padding_BR.flatten())[None]


class _Moved(torch.autograd.Function):
    """Rows in another order: the gradient comes back by the inverse order, not by adding up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, without: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, without)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        inverse, without = ctx.saved_tensors
        moved = grad.index_select(0, inverse)
        return moved.masked_fill_(without[:, None], 0.0), None, None, None


def _moved(rows: Tensor, order: Tensor, inverse: Tensor, without: Tensor) -> Tensor:
    """rows[order].

    Args:
        order: row of each result.
        inverse: the result that each row went to.
        without: rows that went nowhere, or to results that are not used.
    """
    moved: Tensor = _Moved.apply(rows, order, inverse, without)
    return moved


def segment_parts(batch: TwoStreamBatch, segments: Sequence[Segment]) -> list[Part]:
    """The parts of a packed batch that are decoder rows."""
    layout, packed = batch.layout, batch.layout.packed
    if packed is None:
        raise ValueError("the batch is not packed")
    return [
        Part(batch.row_length_B(segment), layout.width(segment), packed.width(segment))
        for segment in segments
        if layout.width(segment)
    ]


def source_part(batch: TwoStreamBatch) -> Part:
    """The source of a packed batch."""
    return Part(batch.source_length_B, batch.layout.packed_source, batch.source_BS.shape[1])


def unpacked(batch: TwoStreamBatch) -> TwoStreamBatch:
    """The padded batch that a packed one was made from, but for what padding holds; others as they are.

    Targets and their indices stay packed: nothing but losses needs them.
    """
    if batch.layout.packed is None:
        return batch
    rows = GridPlaces.of(segment_parts(batch, list(Segment))).kept_BR
    source = GridPlaces.of([source_part(batch)]).kept_BR
    return replace(
        batch,
        layout=replace(batch.layout, packed=None, packed_source=0),
        source_BS=batch.source_BS[0][source],
        row_token_BR=batch.row_token_BR[0][rows],
        row_position_BR=batch.row_position_BR[0][rows],
    )


def pack(batch: TwoStreamBatch, pad: int, multiple: int) -> TwoStreamBatch:
    """The same batch without padding between its rows.

    Args:
        pad: token of the rows that fill up.
        multiple: packed rows of each segment, and of the source, are filled up to a multiple of this.
    """
    layout = batch.layout
    real = {s: np.arange(layout.width(s)) < batch.row_length_B(s).numpy()[:, None] for s in Segment}
    counts = [-(-int(shown.sum()) // multiple) * multiple for shown in real.values()]
    arc, vis, cmp, msk, arq, qry = counts
    packed = RowLayout(arc, vis, cmp, msk, arq, qry)
    place_R = np.full(sum(counts), -1)
    every_BR = np.arange(batch.row_token_BR.numel()).reshape(batch.row_token_BR.shape)
    begin = 0
    for (segment, shown), count in zip(real.items(), counts, strict=True):
        found = every_BR[:, layout.columns(segment)][shown]
        place_R[begin : begin + len(found)] = found
        begin += count
    filler_R = place_R < 0

    def rows(values: Tensor, fill: int) -> Tensor:
        found = values.numpy().reshape(-1)[place_R]
        found[filler_R] = fill
        return torch.from_numpy(found[None])

    def kept(values: Tensor, shown: Array) -> Tensor:
        return torch.from_numpy(values.numpy()[shown][None])

    source_real = np.arange(batch.source_BS.shape[1]) < batch.source_length_B.numpy()[:, None]
    source = kept(batch.source_BS, source_real)
    ar_real = real[Segment.ARQ if layout.arq else Segment.ARC]
    ar_row, masked_row = (torch.from_numpy(np.cumsum(x) - 1) for x in (ar_real, real[Segment.MSK]))
    return replace(
        batch,
        layout=replace(layout, packed=packed, packed_source=batch.source_BS.shape[1]),
        source_BS=F.pad(source, (0, -source.shape[1] % multiple), value=pad),
        row_token_BR=rows(batch.row_token_BR, pad),
        row_position_BR=rows(batch.row_position_BR, 0),
        ar_target_BA=kept(batch.ar_target_BA, ar_real),
        masked_target_BM=kept(batch.masked_target_BM, real[Segment.MSK]),
        ar_unmasked_U=ar_row[batch.ar_unmasked_U],
        ar_masked_T=ar_row[batch.ar_masked_T],
        masked_T=masked_row[batch.masked_T],
    )
