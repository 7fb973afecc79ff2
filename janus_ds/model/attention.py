"""Attention of the two-stream decoder: two back ends behind one interface and one predicate.

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
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.model.prepared import PreparedProduct
from janus_ds.parallel.layers import ParallelLayers
from janus_ds.stream_mask import Segment, visible

__all__ = [
    "DenseRows",
    "GroupedRows",
    "Kernel",
    "MultiHeadAttention",
    "RowAttention",
    "RowsOfBatch",
    "additive_mask",
]

DENSE_ROW_LIMIT = 48
"""Longest segment for which one dense call beats several smaller ones (measured on CPU: even at ~45)."""


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
        return GroupedRows(self.layout, first_row, self.original_mask_B11K, mask)

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        widths = [
            self.layout.width(segment) if self.layout.start(segment) >= self.first_row else 0
            for segment in Segment
        ]
        arc, vis, cmp, msk, arq, qry = torch.split(q_BHTE, widths, 2)
        outputs: list[Tensor | None] = [None] * len(Segment)
        layout = self.layout
        for segment, q in ((Segment.ARC, arc), (Segment.ARQ, arq)):
            if q.shape[2]:
                keys = layout.columns(Segment.ARC)
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


@dataclass(frozen=True)
class RowsOfBatch:
    """Self-attention of a batch's decoder rows."""

    every: RowAttention
    """All rows: what every layer but the last computes."""
    predicted: RowAttention
    """The rows that something is predicted from: what the last layer computes."""

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype, backend: str = "auto") -> RowsOfBatch:
        """Masks of a batch, made once for all layers.

        Args:
            batch: rows and lengths.
            dtype: dtype of the masks, that of the queries.
            backend: dense, grouped, or auto (by shape: grouped for long sentences, and for layouts with
                one group of rows, where it too needs one call).
        """
        rows = _BACKENDS[_fitting(batch.layout) if backend == "auto" else backend].build(batch, dtype)
        return cls(rows, rows.from_row(batch.layout.predicted_start))


_BACKENDS: dict[str, type[DenseRows] | type[GroupedRows]] = {"dense": DenseRows, "grouped": GroupedRows}


def _fitting(layout: RowLayout) -> str:
    """The faster back end for a shape."""
    groups = (layout.arc > 0) + (layout.vis + layout.msk > 0) + (layout.cmp + layout.qry > 0)
    short = max(layout.arc, layout.vis + layout.msk) <= DENSE_ROW_LIMIT
    return "dense" if short and groups > 1 else "grouped"


class MultiHeadAttention(nn.Module):
    """Projections of one attention sublayer; heads are sharded under tensor parallelism.

    Queries and keys/values are projected apart, since query rows give no keys and the keys of the
    encoder states are shared by all rows.
    """

    def __init__(
        self, d_model: int, heads: int, dropout: float, std: float, parallel: ParallelLayers
    ) -> None:
        super().__init__()
        self.q = parallel.column_linear(d_model, d_model, std=std)
        self.k = parallel.column_linear(d_model, d_model, std=std)
        self.v = parallel.column_linear(d_model, d_model, std=std)
        self.out = parallel.row_linear(d_model, d_model, std=std)
        self.dropout = dropout
        self._heads = heads // parallel.size
        self._sharded_rng = parallel.sharded_rng
        self._joint: PreparedProduct | None = None

    def join_keys_values(self, int8: bool) -> None:
        """Make one product of the projections to keys and values, for inference."""
        self._joint = PreparedProduct(int8)

    def queries(self, x_BTD: Tensor) -> Tensor:
        """Queries of rows, shape (B, H, T, E)."""
        return self._split(self.q(x_BTD))

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows, each of shape (B, H, S, E)."""
        if self._joint is not None:
            k, v = cast(nn.Linear, self.k), cast(nn.Linear, self.v)
            both = self._joint(x_BSD, [k.weight, v.weight], [k.bias, v.bias])
            k_BSD, v_BSD = both.chunk(2, -1)
            return self._split(k_BSD), self._split(v_BSD)
        return self._split(self.k(x_BSD)), self._split(self.v(x_BSD))

    def merge(self, attended_BTHE: Tensor) -> Tensor:
        """Output projection over all heads, shape (B, T, D)."""
        merged: Tensor = self.out(attended_BTHE.flatten(2))
        return merged

    def kernel(
        self,
        q_BHTE: Tensor,
        k_BHSE: Tensor,
        v_BHSE: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """See :class:`Kernel`."""
        if not (self.training and self.dropout):
            out = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, is_causal=causal)
        else:
            # Heads are sharded, so their masks must differ between the ranks of a tensor group.
            with self._sharded_rng():
                out = F.scaled_dot_product_attention(
                    q_BHTE, k_BHSE, v_BHSE, mask, self.dropout, is_causal=causal
                )
        return out.transpose(1, 2)

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.view(*x_BTD.shape[:2], self._heads, -1).transpose(1, 2)
