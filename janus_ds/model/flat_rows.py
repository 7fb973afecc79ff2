"""Self-attention of a flat layout: rows of all samples one after the other, AUX rows for some of them.

Projections, norms and feed-forward treat rows one by one, so there a flat batch is a batch of one. Here
its rows become samples again: each segment is a view (samples, H, width, E) of its columns. The groups of
rows, their keys and their masks are those of the back end `grouped`; compensation and AUX rows, and their
keys, are those of the first samples only. So are the encoder states that they attend to.

Shape letters as in `row_attention`; here B samples stand behind a first dimension of 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.model.row_attention import Kernel, additive_mask, picked_query_mask, segment_rule
from janus_ds.stream_mask import Segment

__all__ = ["FlatRows"]

_AUX = (Segment.CMP, Segment.QRY)
_ORIGINAL = (Segment.VIS, Segment.MSK)


@dataclass(frozen=True)
class FlatRows:
    """One call for each group of segments that share their keys, over flat rows."""

    layout: RowLayout
    first_row: int
    original_mask_B11K: Tensor | None
    """Padding among VIS and MSK; None without those segments."""
    auxiliary_mask_B1TK: Tensor | None
    """CMP and QRY rows (QRY alone behind `first_row`) over VIS, CMP and MSK; None without those rows."""
    query_mask_B1TK: Tensor | None
    """AR queries over ARC where they are picked; None: the causal rule."""

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype) -> FlatRows:
        """All rows of a batch."""
        layout, device = batch.layout, batch.row_token_BR.device

        def valid(segment: Segment, length_B: Tensor) -> Tensor:
            return torch.arange(layout.width(segment), device=device) < length_B[:, None]

        shown = valid(Segment.VIS, batch.visible_length_B)
        masked = valid(Segment.MSK, batch.masked_length_B)
        original = auxiliary = None
        if layout.vis + layout.msk:
            original = additive_mask(torch.cat([shown, masked], 1)[:, None, None], dtype)
        count = layout.aux_samples
        if count and layout.cmp + layout.qry:
            one = replace(layout, flat_samples=0, aux_samples=0)
            keys = slice(one.arc, one.content_rows)
            rule = torch.cat([segment_rule(one, one.columns(s), keys, device) for s in _AUX])
            valid_BK = torch.cat([shown, masked, masked], 1)[:count]
            auxiliary = additive_mask((rule & valid_BK[:, None])[:, None], dtype)
        return cls(layout, 0, original, auxiliary, picked_query_mask(batch, dtype))

    @property
    def content_rows(self) -> int:
        """C: rows that give keys and values."""
        return self.layout.content_rows

    def from_row(self, first_row: int) -> FlatRows:
        """The same attention for the rows [first_row, R), which must start at a segment's start."""
        mask = self.auxiliary_mask_B1TK
        if mask is not None and first_row > self.layout.start(Segment.CMP):
            mask = mask[:, :, self.layout.cmp :]
        return replace(self, first_row=first_row, auxiliary_mask_B1TK=mask)

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`; all of shape (1, H, rows, E), the result (1, T, H, E)."""
        layout = self.layout
        q = self._samples(q_BHTE, self.first_row)
        k, v = self._samples(k_BHCE), self._samples(v_BHCE)
        out: dict[Segment, Tensor] = {}
        if Segment.ARC in q:
            out[Segment.ARC] = kernel(q[Segment.ARC], k[Segment.ARC], v[Segment.ARC], causal=True)
        if Segment.ARQ in q:
            mask = self.query_mask_B1TK
            out[Segment.ARQ] = kernel(
                q[Segment.ARQ], k[Segment.ARC], v[Segment.ARC], mask, causal=mask is None
            )
        original = [s for s in _ORIGINAL if s in q]
        if original:
            keys, values = (torch.cat([x[s] for s in _ORIGINAL], 2) for x in (k, v))
            out |= _group(kernel, original, q, (keys, values), self.original_mask_B11K)
        auxiliary = [s for s in _AUX if s in q]
        if auxiliary:
            n = layout.aux_samples
            order = (Segment.VIS, Segment.CMP, Segment.MSK)
            keys, values = (torch.cat([x[s][:n] for s in order], 2) for x in (k, v))
            out |= _group(kernel, auxiliary, q, (keys, values), self.auxiliary_mask_B1TK)
        return _flat(out)

    def attend_source(
        self, kernel: Kernel, q_BHTE: Tensor, source: tuple[Tensor, Tensor], mask_B11S: Tensor | None
    ) -> Tensor:
        """Attention to the encoder states of each row's own sample.

        Args:
            kernel: of the cross-attention.
            q_BHTE: queries of the rows [first_row, R), (1, H, T, E).
            source: keys and values of the encoder states, (B, H, S, E).
            mask_B11S: padding of the source.

        Returns:
            attended values, (1, T, H, E).
        """
        q = self._samples(q_BHTE, self.first_row)
        out: dict[Segment, Tensor] = {}
        for count in dict.fromkeys(len(part) for part in q.values()):
            group = [s for s, part in q.items() if len(part) == count]
            k, v = (x[:count] for x in source)
            out |= _group(kernel, group, q, (k, v), None if mask_B11S is None else mask_B11S[:count])
        return _flat(out)

    def _samples(self, x_BHTE: Tensor, first_row: int = 0) -> dict[Segment, Tensor]:
        """Columns from `first_row` on as views (samples, H, width, E), without empty segments."""
        parts: dict[Segment, Tensor] = {}
        for segment in Segment:
            columns, count = self.layout.columns(segment), self.layout.samples(segment)
            if columns.start < first_row or columns.stop - first_row > x_BHTE.shape[2]:
                continue
            if columns.stop > columns.start:
                part = x_BHTE[0, :, columns.start - first_row : columns.stop - first_row]
                parts[segment] = part.unflatten(1, (count, -1)).transpose(0, 1)
        return parts


def _group(
    kernel: Kernel,
    segments: list[Segment],
    q: dict[Segment, Tensor],
    keys_values: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> dict[Segment, Tensor]:
    """One call for the rows of several segments of the same samples, (samples, width, H, E) each."""
    out = kernel(torch.cat([q[s] for s in segments], 2), *keys_values, mask)
    parts = torch.split(out, [q[s].shape[2] for s in segments], 1)
    return dict(zip(segments, parts, strict=True))


def _flat(parts: dict[Segment, Tensor]) -> Tensor:
    """The segments' rows one after the other, (1, T, H, E)."""
    return torch.cat([parts[s].flatten(0, 1) for s in sorted(parts)])[None]
