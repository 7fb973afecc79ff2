"""Attention of the two-stream decoder: projections and heads, and the back ends `dense` and `grouped`.

Which rows may attend to which is :func:`janus_ds.stream_mask.visible`. Rows stand in rank order inside their
segment, so the rule depends on columns alone and is evaluated once a batch, for (R, C); what differs
between samples is only which content rows are padding. Masks are made once a batch, not once a layer.

`dense` makes one call over all rows with one mask (B, 1, R, C). `grouped` makes one call for each group
of segments that share their keys: AR rows over ARC, causal and without any mask; the original part over
itself, where only padding is masked; compensation and AUX rows over VIS, CMP and MSK with a mask of
their own. Dense computes 4 to 6 times the pairs that count, but in one call: the faster way for short
sentences. Which one a batch takes: :func:`fitting`.

For bf16 on a CPU, torch has slow kernels for two operations (:func:`attend_in_bf16`, :func:`dropout`).
Measured on an AMD EPYC with avx512_bf16, torch 2.13, one thread: attention over 26 tokens, forward and
backward, takes twice as long as products and a softmax, `bernoulli_` five times as long as random integers.

Shape letters: B samples, R decoder rows, C content rows, T rows of a query block, S source tokens,
H heads of this rank, E width of a head, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.model.decoding.cpu_kernels import PreparedProduct
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.stream_mask import Segment

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of the encoder states for one layer, each (B, H, S, E)."""


Kernel = Callable[..., Tensor]
""":meth:`MultiHeadAttention.kernel` of the layer that lends it."""


@dataclass(frozen=True)
class RowAttention:
    """Attention of decoder rows to content rows.

    Attributes:
        content_rows: the leading rows that give keys and values.
        first_row: queries are the rows [first_row, R).
    """

    content_rows: int
    first_row: int

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """Attended values of the rows [first_row, R), shape (B, T, H, E)."""
        raise NotImplementedError


def additive_mask(visible_pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as scores to add: 0 where visible, -inf elsewhere.

    A row that sees nothing (it can only be padding) sees everything instead: its softmax stays finite.
    """
    nothing = ~visible_pairs.any(-1, keepdim=True)
    hidden = ~(visible_pairs | nothing)
    zero = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return zero.masked_fill_(hidden, -math.inf)


@dataclass(frozen=True)
class DenseRows(RowAttention):
    """One call over all rows."""

    mask_B1TC: Tensor

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype) -> DenseRows:
        """All rows of a batch."""
        layout, valid_BC = batch.layout, batch.content_valid_BC()
        content = layout.content_rows
        rule_RC = layout.visible(slice(None), slice(content), valid_BC.device)
        mask = additive_mask((rule_RC & valid_BC[:, None, :])[:, None], dtype)
        return cls(content, 0, mask)

    def from_row(self, first_row: int) -> DenseRows:
        """The same attention for the rows [first_row, R) only."""
        return DenseRows(self.content_rows, first_row, self.mask_B1TC[:, :, first_row:])

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        return kernel(q_BHTE, k_BHCE, v_BHCE, self.mask_B1TC)


@dataclass(frozen=True)
class GroupedRows(RowAttention):
    """One call for each group of segments that share their keys."""

    layout: RowLayout
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
            rule = torch.cat([layout.visible(rows, keys, device) for rows in (cmp, qry)])
            auxiliary = additive_mask((rule & valid_BC[:, None, keys])[:, None], dtype)
        return cls(layout.content_rows, 0, layout, original, auxiliary)

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


BACKENDS: dict[str, type[DenseRows] | type[GroupedRows]] = {"dense": DenseRows, "grouped": GroupedRows}

DENSE_ROW_LIMIT = 48
"""Longest segment for which one dense call beats several smaller ones (measured on CPU: even at ~45)."""


def fitting(layout: RowLayout) -> str:
    """The faster back end for a shape: dense for short sentences and several groups of rows, or grouped."""
    groups = (layout.arc > 0) + (layout.vis + layout.msk > 0) + (layout.cmp + layout.qry > 0)
    longest = max(layout.arc, layout.vis + layout.msk)
    return "dense" if longest <= DENSE_ROW_LIMIT and groups > 1 else "grouped"


@dataclass(frozen=True)
class RowsOfBatch:
    """Attention of a batch's decoder rows, made once for all layers."""

    every: RowAttention
    """All rows: what every layer but the last computes."""
    predicted: RowAttention
    """The rows that something is predicted from: what the last layer computes."""
    every_runs: tuple[int, ...]
    """How all rows alternate between AR and other rows (:func:`attend_source`)."""
    predicted_runs: tuple[int, ...]
    """The same of the predicted rows."""

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype, backend: str = "auto") -> RowsOfBatch:
        """Masks of a batch.

        Args:
            dtype: of the masks, that of the queries.
            backend: a key of :data:`BACKENDS`, or auto.
        """
        layout = batch.layout
        every = BACKENDS[fitting(layout) if backend == "auto" else backend].build(batch, dtype)
        predicted = every.from_row(layout.predicted_start)
        first = Segment.MSK if layout.predicted_start else Segment.ARC
        return cls(every, predicted, _runs(layout, Segment.ARC), _runs(layout, first))


def _runs(layout: RowLayout, first: Segment) -> tuple[int, ...]:
    """Rows from a segment on: AR content, the original part and its compensation, AR queries, AUX queries."""
    arc, vis, cmp, msk, arq, qry = (layout.width(s) if s >= first else 0 for s in Segment)
    return arc, vis + cmp + msk, arq, qry


def attend_source(
    kernel: Kernel,
    q_BHTE: Tensor,
    sources: Sequence[KeysValues],
    mask_B11S: Tensor | None,
    runs: Sequence[int] = (),
) -> Tensor:
    """Attention of decoder rows to the encoder states, of which there may be two dropout draws.

    Args:
        sources: keys and values of the encoder states: of one draw, or of two.
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
        self.heads = heads // parallel.size
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
        return out.view(*x_BSD.shape[:2], len(parts), self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

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
        """Scaled dot-product attention with this layer's dropout: attended values, (B, T, H, E).

        Args:
            mask: additive.
            causal: row t sees the keys 0 .. t.
        """
        if not (self.training and self.dropout):
            attend = attend_in_bf16 if trains_in_bf16(q_BHTE) else F.scaled_dot_product_attention
            out = attend(q_BHTE, k_BHSE, v_BHSE, mask, is_causal=causal)
        else:
            # Heads are sharded, so their masks must differ between the ranks of a tensor group.
            with self._sharded_rng():
                out = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, self.dropout, causal)
        return out.transpose(1, 2)

    def _split(self, x_BTD: Tensor) -> Tensor:
        return x_BTD.view(*x_BTD.shape[:2], self.heads, -1).transpose(1, 2)


_PAIRS = 1 << 14
"""Rows x keys up to which products are faster; beyond them their memory would matter, too."""


def trains_in_bf16(x: Tensor) -> bool:
    """Whether this is what the other operations are for."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.requires_grad


def attend_in_bf16(
    q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention, (B, H, T, E), with scores and softmax in fp32; the mask is additive."""
    rows, keys = q_BHTE.shape[2], k_BHSE.shape[2]
    if rows * keys > _PAIRS:
        return F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, is_causal=is_causal)
    scale = q_BHTE.shape[3] ** -0.5
    scores = torch.matmul(q_BHTE.float() * scale, k_BHSE.float().transpose(2, 3))
    if is_causal:
        scores = scores.masked_fill(torch.ones(rows, keys, dtype=torch.bool).triu(1), -math.inf)
    scores = scores if mask is None else scores + mask
    return torch.matmul(scores.softmax(-1).to(v_BHSE.dtype), v_BHSE)


def dropout(x: Tensor, rate: float) -> Tensor:
    """Like `F.dropout` in training; rates are multiples of 2^-16, as four elements share a random number.

    A compiled model takes the compiler's own dropout.
    """
    if not trains_in_bf16(x) or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    drawn = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    level = drawn.view(torch.int16)[: x.numel()].view(x.shape)
    return x * (level >= round(rate * (1 << 16)) - (1 << 15)).to(x.dtype).mul_(1 / (1 - rate))
