"""Attention of the two-stream decoder: projections and heads, and which back end attends.

The back ends compute one predicate (:func:`janus_ds.stream_mask.visible`):

==========  ====================================================  ==================
name        how                                                   refuses
==========  ====================================================  ==================
dense       one call, one mask (B, 1, R, C)
grouped     a call a group of segments, masks where needed
flex        one fused call that skips empty blocks (`flex_rows`)    dropout; training on CPUs
==========  ====================================================  ==================

`auto` takes the fastest one that is right for the batch, by measured limits (:func:`fitting`). Packed
rows are spread into a padded grid and attend there (`packed_rows`).
Shape letters as in `row_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.errors import ConfigError
from janus_ds.model.few_rows import attend_few, few_rows, stored_by_columns
from janus_ds.model.flex_rows import FlexRows
from janus_ds.model.packed_rows import PackedRows
from janus_ds.model.prepared import PreparedProduct
from janus_ds.model.row_attention import (
    DenseRows,
    GroupedRows,
    Kernel,
    RowAttention,
    additive_mask,
    attend_draws,
)
from janus_ds.packing import unpacked
from janus_ds.parallel.layers import ParallelLayers
from janus_ds.stream_mask import Segment

__all__ = [
    "BACKENDS",
    "DenseRows",
    "FlexRows",
    "GroupedRows",
    "Kernel",
    "MultiHeadAttention",
    "PackedRows",
    "RowAttention",
    "RowsOfBatch",
    "additive_mask",
    "attend_draws",
    "fitting",
]

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
    """How all rows alternate between AR and other rows (:func:`attend_draws`)."""
    predicted_runs: tuple[int, ...]
    """The same of the predicted rows."""

    @classmethod
    def build(
        cls, batch: TwoStreamBatch, dtype: torch.dtype, backend: str = "auto", dropout: float = 0.0
    ) -> RowsOfBatch:
        """Masks of a batch, made once for all layers.

        Args:
            batch: rows and lengths.
            dtype: dtype of the masks, that of the queries.
            backend: a key of :data:`BACKENDS`, or auto.
            dropout: of attention weights in this pass; 0 in evaluation.

        Raises:
            ConfigError: the back end cannot do what is asked.
        """
        name = fitting(batch.layout) if backend == "auto" else backend
        if name == "flex" and dropout:
            raise ConfigError(
                f"attention backend 'flex' cannot drop attention weights (rate {dropout})",
                "train.attention_backend",
                "use auto or grouped, or set model.attention_dropout to 0",
            )
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


BACKENDS: dict[str, type[DenseRows] | type[GroupedRows] | type[FlexRows]] = {
    "dense": DenseRows,
    "grouped": GroupedRows,
    "flex": FlexRows,
}


def fitting(layout: RowLayout) -> str:
    """The faster back end for a shape: dense for short sentences and several groups of rows, or grouped."""
    groups = (layout.arc > 0) + (layout.vis + layout.msk > 0) + (layout.cmp + layout.qry > 0)
    longest = max(layout.arc, layout.vis + layout.msk)
    return "dense" if longest <= DENSE_ROW_LIMIT and groups > 1 else "grouped"


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
        self._keys_values: PreparedProduct | None = None
        self._all_three: PreparedProduct | None = None

    def prepare_products(self, int8: bool) -> None:
        """Make one product of the projections of one input, for inference."""
        self._keys_values, self._all_three = PreparedProduct(int8), PreparedProduct(int8)

    def queries(self, x_BTD: Tensor) -> Tensor:
        """Queries of rows, shape (B, H, T, E)."""
        return self._split(self.q(x_BTD))

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of rows, each of shape (B, H, S, E)."""
        if self._keys_values is None:
            return self._split(self.k(x_BSD)), self._split(self.v(x_BSD))
        k, v = self._joint(self._keys_values, x_BSD, (self.k, self.v))
        return k, v

    def queries_keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All three of the same rows, each of shape (B, H, S, E)."""
        if self._all_three is None:
            return self.queries(x_BSD), *self.keys_values(x_BSD)
        q, k, v = self._joint(self._all_three, x_BSD, (self.q, self.k, self.v))
        return q, k, v

    def _joint(self, product: PreparedProduct, x_BSD: Tensor, parts: Sequence[nn.Module]) -> Sequence[Tensor]:
        layers = [cast(nn.Linear, part) for part in parts]
        out = product(x_BSD, [layer.weight for layer in layers], [layer.bias for layer in layers])
        # (B, S, parts x H x E) -> parts of (B, H, S, E)
        return out.view(*x_BSD.shape[:2], len(parts), self._heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

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
        if stored_by_columns(k_BHSE):
            if few_rows(q_BHTE, k_BHSE) and not causal:
                return attend_few(q_BHTE, k_BHSE, v_BHSE, mask)
            k_BHSE = k_BHSE.contiguous()
        if not (self.training and self.dropout):
            out = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, is_causal=causal)
        else:
            # Heads are sharded, so their masks must differ between the ranks of a tensor group.
            with self._sharded_rng():
                out = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, self.dropout, causal)
        return out.transpose(1, 2)

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.view(*x_BTD.shape[:2], self._heads, -1).transpose(1, 2)
