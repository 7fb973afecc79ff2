"""Self-attention of decoder rows from pieces that need no visibility mask: the back end `split`.

AR content and AR query rows see the same keys under the same causal rule, so they go as one call with
twice the query heads (grouped-query attention). The original part sees itself in both directions. A
compensation or AUX row sees three stretches of keys, and each of them is full or causal:

    CMP, QRY x VIS         full
    CMP      x CMP         causal                          gold j <= i
    QRY      x MSK         causal in turned order          MASK j >= i
    CMP[:-1] x MSK[1:]     causal in turned order          MASK j > i
    QRY[1:]  x CMP[:-1]    causal                          gold j < i

Their outputs are merged by the logarithms of their softmax sums. The backward pass is exact as in ring
attention: every piece gets the merged output and the merged sum, so that its softmax weights are those
over all keys. Only padding is masked, by one row of scores a sample, and not even that where there is none.

Made of torch's CPU kernel, which gives the sums but knows no dropout: attention dropout is refused.
Shape letters as in `row_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from janus_ds.batch import RowLayout, TwoStreamBatch
from janus_ds.errors import ConfigError
from janus_ds.model.row_attention import Kernel, picked_query_mask
from janus_ds.stream_mask import Segment

__all__ = ["Piece", "SplitRows", "merged_attention"]

_HIDDEN = -1e30
"""Score of padding. Finite, so that a piece in which a row sees nothing has the weight 0, and not NaN."""
_HIDDEN_HALF = -6e4
"""The same in float16."""

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Piece:
    """One stretch of keys for one stretch of query rows."""

    rows: slice
    keys: slice
    causal: bool = False
    turned: bool = False
    """Both in reverse order: a rule j >= i becomes j <= i."""
    padding_B11K: Tensor | None = None
    """Scores to add that hide padding, for the keys in their order on paper."""

    def operands(self, q_BHTE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows and keys of the piece, in the order in which it computes."""
        return (
            self.turn(q_BHTE[:, :, self.rows]),
            self.turn(k_BHKE[:, :, self.keys]),
            self.turn(v_BHKE[:, :, self.keys]),
        )

    def mask(self) -> Tensor | None:
        """Padding in the order in which the piece computes."""
        mask = self.padding_B11K
        return mask.flip(-1) if mask is not None and self.turned else mask

    def turn(self, x: Tensor) -> Tensor:
        """From one order to the other, along dimension 2."""
        return x.flip(2) if self.turned else x


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pieces: tuple[Piece, ...], q_BHTE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor
    ) -> Tensor:
        # The first piece covers all rows.
        out, lse_BHT = _forward(pieces[0], q_BHTE, k_BHKE, v_BHKE)
        out_BHTE = out.to(lse_BHT.dtype)
        for piece in pieces[1:]:
            out, lse = _forward(piece, q_BHTE, k_BHKE, v_BHKE)
            before, part = lse_BHT[:, :, piece.rows], out_BHTE[:, :, piece.rows]
            both = torch.logaddexp(before, lse)
            part.mul_((before - both).exp_()[..., None]).add_(out * (lse - both).exp_()[..., None])
            before.copy_(both)
        merged = out_BHTE.to(q_BHTE.dtype)
        ctx.save_for_backward(q_BHTE, k_BHKE, v_BHKE, merged, lse_BHT)
        ctx.pieces = pieces
        return merged

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTE: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTE, k_BHKE, v_BHKE, out_BHTE, lse_BHT = ctx.saved_tensors
        gradients = [torch.zeros_like(x) for x in (q_BHTE, k_BHKE, v_BHKE)]
        for piece in ctx.pieces:
            q, k, v = piece.operands(q_BHTE, k_BHKE, v_BHKE)
            grad, out, lse = (piece.turn(x[:, :, piece.rows]) for x in (grad_BHTE, out_BHTE, lse_BHT))
            parts = _BACKWARD(grad, q, k, v, out, lse.contiguous(), 0.0, piece.causal, attn_mask=piece.mask())
            for whole, part, place in zip(
                gradients, parts, (piece.rows, piece.keys, piece.keys), strict=True
            ):
                whole[:, :, place] += piece.turn(part)
        return None, *gradients


def _forward(piece: Piece, q_BHTE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor) -> tuple[Tensor, Tensor]:
    """Output and logarithm of the softmax sum of one piece's rows."""
    out, lse = _FORWARD(*piece.operands(q_BHTE, k_BHKE, v_BHKE), 0.0, piece.causal, attn_mask=piece.mask())
    return piece.turn(out), piece.turn(lse)


def merged_attention(pieces: tuple[Piece, ...], q_BHTE: Tensor, k_BHKE: Tensor, v_BHKE: Tensor) -> Tensor:
    """Attention of rows whose keys are the union of pieces, which must not overlap.

    Args:
        pieces: the first one covers all rows.
        q_BHTE, k_BHKE, v_BHKE: on a CPU.

    Returns:
        attended values, shape (B, H, T, E).
    """
    merged: Tensor = _Merged.apply(pieces, q_BHTE, k_BHKE, v_BHKE)
    return merged


@dataclass(frozen=True)
class SplitRows:
    """Full and causal pieces, merged."""

    layout: RowLayout
    first_row: int
    original_B11K: Tensor | None
    """Padding among VIS and MSK; None where there is none."""
    pieces: tuple[Piece, ...]
    """Of CMP and QRY rows (QRY rows alone behind `first_row`), over VIS, CMP and MSK."""
    query_mask_B1TK: Tensor | None = None
    """AR queries over ARC where they are picked: those go in a masked call of their own."""

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype) -> SplitRows:
        """All rows of a batch.

        Raises:
            ConfigError: the batch is not on a CPU.
        """
        layout, device = batch.layout, batch.row_token_BR.device
        if device.type != "cpu":
            raise ConfigError(
                f"attention backend 'split' is made for the CPU, the batch is on {device.type}",
                "train.attention_backend",
                "use auto, which takes the fastest right one",
            )
        hidden = _HIDDEN_HALF if dtype == torch.float16 else _HIDDEN

        def padding(length_B: Tensor, width: int) -> Tensor:
            beyond = torch.arange(width) >= length_B[:, None]
            return torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, hidden)[:, None, None]

        visible = masked = None
        if not _is_full(batch):
            visible = padding(batch.visible_length_B, layout.vis)
            masked = padding(batch.masked_length_B, layout.msk)
        original = None if visible is None or masked is None else torch.cat([visible, masked], -1)
        pieces = _pieces(layout, layout.cmp, visible, masked)
        return cls(layout, 0, original, pieces, picked_query_mask(batch, dtype))

    @property
    def content_rows(self) -> int:
        """C: rows that give keys and values."""
        return self.layout.content_rows

    def from_row(self, first_row: int) -> SplitRows:
        """The same attention for the rows [first_row, R), which must start at a segment's start."""
        pieces = self.pieces
        if pieces and first_row > self.layout.start(Segment.CMP):
            visible = pieces[0].padding_B11K
            masked = None if self.original_B11K is None else self.original_B11K[..., self.layout.vis :]
            pieces = _pieces(self.layout, 0, visible, masked)
        return replace(self, first_row=first_row, pieces=pieces)

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        layout = self.layout
        widths = [layout.width(s) if layout.start(s) >= self.first_row else 0 for s in Segment]
        arc, vis, cmp, msk, arq, qry = torch.split(q_BHTE, widths, 2)
        outputs: list[Tensor | None] = [None] * len(Segment)
        if arc.shape[2] or arq.shape[2]:
            k, v = (x[:, :, : layout.arc] for x in (k_BHCE, v_BHCE))
            streams = {s: q for s, q in ((Segment.ARC, arc), (Segment.ARQ, arq)) if q.shape[2]}
            if self.query_mask_B1TK is not None:
                outputs[Segment.ARQ] = kernel(streams.pop(Segment.ARQ), k, v, self.query_mask_B1TK)
            for place, part in zip(streams, _causal_folded(kernel, [*streams.values()], k, v), strict=True):
                outputs[place] = part
        if vis.shape[2] or msk.shape[2]:
            k, v = (_without_cmp(x, layout) for x in (k_BHCE, v_BHCE))
            out_original = kernel(torch.cat([vis, msk], 2), k, v, self.original_B11K)
            sizes = [vis.shape[2], msk.shape[2]]
            outputs[Segment.VIS], outputs[Segment.MSK] = torch.split(out_original, sizes, 1)
        if self.pieces:
            k, v = (x[:, :, layout.arc :] for x in (k_BHCE, v_BHCE))
            merged = merged_attention(self.pieces, torch.cat([cmp, qry], 2), k, v).transpose(1, 2)
            sizes = [cmp.shape[2], qry.shape[2]]
            outputs[Segment.CMP], outputs[Segment.QRY] = torch.split(merged, sizes, 1)
        return torch.cat([out for out in outputs if out is not None], 1)


def _is_full(batch: TwoStreamBatch) -> bool:
    """Whether VIS and MSK hold no padding: from counts of the host, without asking the device."""
    layout, counts = batch.layout, batch.counts
    shown = counts.target_tokens - counts.masked_tokens
    return shown == counts.samples * layout.vis and counts.masked_tokens == counts.samples * layout.msk


def _pieces(layout: RowLayout, cmp: int, visible: Tensor | None, masked: Tensor | None) -> tuple[Piece, ...]:
    """Pieces of the rows CMP (of which there are `cmp`) and QRY over the keys VIS, CMP, MSK."""
    slots, vis, total = layout.cmp, layout.vis, cmp + layout.qry
    if not total:
        return ()
    gold, msk = slice(vis, vis + slots), slice(vis + slots, vis + 2 * slots)
    before_last, after_first = slice(vis, vis + slots - 1), slice(vis + slots + 1, vis + 2 * slots)
    pieces = [Piece(slice(0, total), slice(0, vis), padding_B11K=visible)]
    if cmp:
        pieces.append(Piece(slice(0, cmp), gold, causal=True))
        if slots > 1:
            later = None if masked is None else masked[..., 1:]
            pieces.append(Piece(slice(0, cmp - 1), after_first, True, True, later))
    if layout.qry:
        pieces.append(Piece(slice(cmp, total), msk, True, True, masked))
        if slots > 1:
            pieces.append(Piece(slice(cmp + 1, total), before_last, causal=True))
    return tuple(pieces)


def _causal_folded(kernel: Kernel, streams: list[Tensor], k: Tensor, v: Tensor) -> list[Tensor]:
    """Causal attention of up to two streams of rows over the same keys, in one call.

    Two streams become twice the heads: query heads 2 h and 2 h + 1 share key head h.
    """
    if len(streams) < 2:
        return [kernel(q, k, v, causal=True) for q in streams]
    out_BTHE = kernel(torch.stack(streams, 2).flatten(1, 2), k, v, causal=True)
    return list(out_BTHE.unflatten(2, (-1, 2)).unbind(3))


def _without_cmp(x_BHCE: Tensor, layout: RowLayout) -> Tensor:
    """Keys (or values) of the original part."""
    if not layout.cmp:
        return x_BHCE[:, :, layout.arc :]
    return torch.cat([x_BHCE[:, :, layout.columns(s)] for s in (Segment.VIS, Segment.MSK)], 2)
