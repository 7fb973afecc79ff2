"""The decoder rows of one AUX pass: the original part, a draft as compensation rows, and AUX query rows.

Shape letters: B sentences, N candidates of each, X = B x N candidates of all, L target tokens, M masked slots
of the candidate that has most, C = L + M content rows of a candidate, Q query rows of a candidate, P picked
rows of all, R = N x (C + Q) rows of a sentence; H heads, E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.model.attention import Kernel, additive_mask
from janus_ds.model.decoding.steps import CandidateAttention
from janus_ds.stream_mask import Segment, visible

__all__ = ["AuxAttention", "AuxRows"]


@dataclass(frozen=True)
class AuxAttention(CandidateAttention):
    """Self-attention inside each candidate; content rows of all candidates stand before all query rows.

    `mask` is (X, 1, C + Q, C).
    """

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        """See :class:`janus_ds.model.attention.RowAttention`."""
        if self.first_row:
            return super().attend(kernel, q_BHTE, k_BHTE, v_BHTE)
        content, query = q_BHTE.tensor_split([self.content_rows], 2)
        q_XHTE = torch.cat([self._apart(content), self._apart(query)], 2)
        out_XTHE = kernel(q_XHTE, self._apart(k_BHTE), self._apart(v_BHTE), self.mask)
        parts = out_XTHE.tensor_split([self.content_rows // self.candidates], 1)
        return torch.cat([x.reshape(len(q_BHTE), -1, *x.shape[2:]) for x in parts], 1)

    def of_queries(self) -> AuxAttention:
        """The same attention for the query rows alone."""
        first = self.content_rows // self.candidates
        return replace(self, first_row=self.content_rows, mask=self.mask[:, :, first:])


@dataclass(frozen=True)
class AuxRows:
    """Tokens, positions and attention of the rows of one pass."""

    token_BR: Tensor
    position_BR: Tensor
    attention: AuxAttention
    place_P: Tensor
    """Where each picked row stands among the X x Q query rows."""

    @classmethod
    def build(
        cls,
        token_BNL: Tensor,
        draft_BNL: Tensor,
        length_BN: Tensor,
        picked_P: Tensor,
        mask: int,
        dtype: torch.dtype,
    ) -> AuxRows:
        """Rows for candidates whose picked slots are the last ones of each (see `JanusModel.aux_rows`)."""
        sentences, candidates, width = token_BNL.shape
        token_XL, draft_XL = token_BNL.flatten(0, 1), draft_BNL.flatten(0, 1)
        column_L = torch.arange(width, device=token_XL.device)
        slot_XL = token_XL == mask
        count_X = slot_XL.sum(1)
        rank_XL = slot_XL.cumsum(1) - 1
        # Columns of the slots, in target order; then others, which pad.
        column_XM = (~slot_XL).long().sort(dim=1, stable=True).indices[:, : int(count_X.max())]
        rank_M = column_L[: column_XM.shape[1]]
        picked_X = picked_P // width
        wanted_X = picked_X.bincount(minlength=len(count_X))
        first_X1 = (count_X - wanted_X)[:, None]
        rank_XQ = first_X1 + column_L[: int(wanted_X.max())]
        column_XQ = column_XM.gather(1, rank_XQ.clamp_max(len(rank_M) - 1))

        kind_XL = torch.where(slot_XL, Segment.MSK.value, Segment.VIS.value)
        kind_XM = torch.full_like(column_XM, Segment.CMP.value)
        key_kind, key_rank = (
            torch.cat([kind_XL, kind_XM], 1)[:, None],
            torch.cat([rank_XL, rank_M.expand_as(column_XM)], 1)[:, None],
        )
        valid = torch.cat([column_L < length_BN.flatten()[:, None], rank_M < count_X[:, None]], 1)[:, None]
        row_kind = torch.cat([key_kind[:, 0], torch.full_like(rank_XQ, Segment.QRY.value)], 1)[..., None]
        row_rank = torch.cat([key_rank[:, 0], rank_XQ], 1)[..., None]
        seen = visible(row_kind, row_rank, key_kind, key_rank) & valid

        def joined(content: tuple[Tensor, Tensor], query_XQ: Tensor) -> Tensor:
            """All content rows of a sentence, candidate by candidate, then all its query rows."""
            both = (torch.cat(content, 1), query_XQ)
            return torch.cat([x.reshape(sentences, -1) for x in both], 1)

        content = candidates * (width + len(rank_M))
        return cls(
            joined((token_XL, draft_XL.gather(1, column_XM)), torch.full_like(rank_XQ, mask)),
            joined((column_L.expand_as(token_XL), column_XM), column_XQ),
            AuxAttention(content, 0, additive_mask(seen[:, None], dtype), candidates),
            picked_X * rank_XQ.shape[1] + rank_XL.flatten()[picked_P] - first_X1[picked_X, 0],
        )
