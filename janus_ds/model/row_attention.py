"""Self-attention of decoder rows over content rows: the interface and the two back ends with masks.

Who may see whom is :func:`janus_ds.stream_mask.visible`. Rows stand in rank order inside their
segment, so the rule depends on columns alone and is evaluated once a batch, for (R, C); what differs
between samples is only which content rows are padding. Masks are made once a batch, not once a layer.

`dense` makes one call over all rows with one mask (B, 1, R, C). `grouped` makes one call for each group
of segments that share their keys: AR rows over ARC, causal and without any mask; the original part over
itself, where only padding is masked; compensation and AUX rows over VIS, CMP and MSK with a mask of
their own. Dense computes 4 to 6 times the pairs that count, but in one call: the faster way for short
sentences.

Shape letters: B samples, R decoder rows, C content rows, T rows of a query block, S source tokens,
H heads of this rank, E width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.stream_mask import Segment, visible

__all__ = [
    "DenseRows",
    "GroupedRows",
    "Kernel",
    "RowAttention",
    "additive_mask",
    "attend_draws",
    "segment_rule",
]


class Kernel(Protocol):
    """Scaled dot-product attention with the dropout of the layer that lends it."""

    def __call__(
        self,
        q_BHTE: Tensor,
        k_BHSE: Tensor,
        v_BHSE: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Attended values, shape (B, T, H, E)."""


class RowAttention(Protocol):
    """Self-attention of decoder rows over content rows.

    Attributes:
        content_rows: the leading rows that give keys and values.
        first_row: queries are the rows [first_row, R).
    """

    @property
    def content_rows(self) -> int: ...

    @property
    def first_row(self) -> int: ...

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """Attended values of the rows [first_row, R), shape (B, T, H, E)."""


def additive_mask(visible_pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as scores to add: 0 where visible, -inf elsewhere.

    A row that sees nothing (it can only be padding) sees everything instead: its softmax stays finite.
    """
    nothing = ~visible_pairs.any(-1, keepdim=True)
    hidden = ~(visible_pairs | nothing)
    zero = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zero.masked_fill_(hidden, -math.inf)


def attend_draws(
    kernel: Kernel,
    q_BHTE: Tensor,
    sources: Sequence[tuple[Tensor, Tensor]],
    mask_B11S: Tensor | None,
    runs: Sequence[int],
) -> Tensor:
    """Attention to the encoder states, of which there may be two dropout draws.

    Args:
        kernel: of the cross-attention.
        q_BHTE: queries of decoder rows.
        sources: keys and values of the encoder states, (B, H, S, E) each: of one draw, or of two.
        mask_B11S: padding of the source.
        runs: with two draws, widths of runs of rows that take the first and the second draw in turn.

    Returns:
        attended values, (B, T, H, E).
    """
    if len(sources) == 1:
        return kernel(q_BHTE, *sources[0], mask_B11S)
    queries = torch.split(q_BHTE, list(runs), 2)
    outputs = [q_BHTE] * len(runs)
    for draw, source in enumerate(sources):
        out = kernel(torch.cat(queries[draw::2], 2), *source, mask_B11S)
        outputs[draw::2] = torch.split(out, list(runs[draw::2]), 1)
    return torch.cat(outputs, 1)


def segment_rule(layout: RowLayout, queries: slice, keys: slice, device: torch.device) -> Tensor:
    """The predicate for a block of columns, padding aside: boolean, shape (queries, keys)."""
    widths = [layout.width(segment) for segment in Segment]
    segment_R = torch.cat([torch.full((n,), s, device=device) for s, n in zip(Segment, widths, strict=True)])
    rank_R = torch.cat([torch.arange(n, device=device) for n in widths])
    rule: Tensor = visible(
        segment_R[queries, None], rank_R[queries, None], segment_R[None, keys], rank_R[None, keys]
    )
    return rule


@dataclass(frozen=True)
class DenseRows:
    """One call over all rows."""

    content_rows: int
    first_row: int
    mask_B1TC: Tensor

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype) -> DenseRows:
        """All rows of a batch."""
        layout, valid_BC = batch.layout, batch.content_valid_BC()
        content = layout.content_rows
        rule_RC = segment_rule(layout, slice(None), slice(content), valid_BC.device)
        mask = additive_mask((rule_RC & valid_BC[:, None, :])[:, None], dtype)
        return cls(content, 0, mask)

    def from_row(self, first_row: int) -> DenseRows:
        """The same attention for the rows [first_row, R) only."""
        return DenseRows(self.content_rows, first_row, self.mask_B1TC[:, :, first_row:])

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        return kernel(q_BHTE, k_BHCE, v_BHCE, self.mask_B1TC)


@dataclass(frozen=True)
class GroupedRows:
    """One call for each group of segments that share their keys."""

    layout: RowLayout
    first_row: int
    original_mask_B11K: Tensor | None
    """Padding among VIS and MSK; None without those segments."""
    auxiliary_mask_B1TK: Tensor | None
    """CMP and QRY rows over VIS, CMP and MSK; None without those rows."""

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype) -> GroupedRows:
        """All rows of a batch."""
        layout, valid_BC = batch.layout, batch.content_valid_BC()
        vis, cmp, msk, qry = (layout.columns(s) for s in (Segment.VIS, Segment.CMP, Segment.MSK, Segment.QRY))
        original = auxiliary = None
        if layout.vis + layout.msk:
            original_valid = torch.cat([valid_BC[:, vis], valid_BC[:, msk]], 1)
            original = additive_mask(original_valid[:, None, None], dtype)
        if layout.cmp + layout.qry:
            keys, device = slice(layout.arc, layout.content_rows), valid_BC.device
            rule = torch.cat([segment_rule(layout, rows, keys, device) for rows in (cmp, qry)])
            auxiliary = additive_mask((rule & valid_BC[:, None, keys])[:, None], dtype)
        return cls(layout, 0, original, auxiliary)

    @property
    def content_rows(self) -> int:
        """C: rows that give keys and values."""
        return self.layout.content_rows

    def from_row(self, first_row: int) -> GroupedRows:
        """The same attention for the rows [first_row, R), which must start at a segment's start."""
        mask = self.auxiliary_mask_B1TK
        if mask is not None and first_row > self.layout.start(Segment.CMP):
            mask = mask[:, :, self.layout.cmp :]
        return replace(self, first_row=first_row, auxiliary_mask_B1TK=mask)

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        widths = [
            self.layout.width(segment) if self.layout.start(segment) >= self.first_row else 0
            for segment in Segment
        ]
        arc, vis, cmp, msk, arq, qry = torch.split(q_BHTE, widths, 2)
        outputs: list[Tensor | None] = [None] * len(Segment)
        layout = self.layout
        keys = layout.columns(Segment.ARC)
        for segment, q in ((Segment.ARC, arc), (Segment.ARQ, arq)):
            if q.shape[2]:
                outputs[segment] = kernel(q, k_BHCE[:, :, keys], v_BHCE[:, :, keys], causal=True)
        if vis.shape[2] or msk.shape[2]:
            k, v = (self._original(x) for x in (k_BHCE, v_BHCE))
            out = kernel(_join(vis, msk), k, v, self.original_mask_B11K)
            outputs[Segment.VIS], outputs[Segment.MSK] = torch.split(out, [vis.shape[2], msk.shape[2]], 1)
        if cmp.shape[2] or qry.shape[2]:
            k, v = (x[:, :, layout.arc :] for x in (k_BHCE, v_BHCE))
            out = kernel(_join(cmp, qry), k, v, self.auxiliary_mask_B1TK)
            outputs[Segment.CMP], outputs[Segment.QRY] = torch.split(out, [cmp.shape[2], qry.shape[2]], 1)
        present = [out for out in outputs if out is not None and out.shape[1]]
        return present[0] if len(present) == 1 else torch.cat(present, 1)

    def _original(self, x_BHCE: Tensor) -> Tensor:
        """Keys (or values) of the original part."""
        layout = self.layout
        if not layout.cmp:
            return x_BHCE[:, :, layout.arc :]
        return torch.cat([x_BHCE[:, :, layout.columns(s)] for s in (Segment.VIS, Segment.MSK)], 2)


def _join(first: Tensor, second: Tensor) -> Tensor:
    """Two blocks of queries as one; no copy where one is empty."""
    if not first.shape[2]:
        return second
    return torch.cat([first, second], 2) if second.shape[2] else first
