"""The decoder rows of one pass of decoding: a block of AR tokens, or all length candidates of NAR or AUX.

Shape letters: B sentences, K beams, T tokens of a block, R = T x K content rows of a step (row t x K + k),
N columns of the cache (see `cache`); of NAR: N candidates of each sentence, L target tokens of each,
X = B x N candidates of all, T rows of a sentence that are computed, P picked rows of all. D width, H heads,
E width of a head, Q query rows. Of AUX: M masked slots of the candidate that has most, C = L + M content rows
and Q query rows of a candidate, R = N x (C + Q) rows of a sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.model.attention import Kernel, RowAttention, additive_mask
from janus_ds.model.decoding.cache import KVCache
from janus_ds.stream_mask import Segment, visible


@dataclass(frozen=True)
class BlockRows:
    """The rows of one AR step: R content rows and, in a two-stream model, as many query rows."""

    token_BQ: Tensor
    position_Q: Tensor
    """Positions, (Q,) where all sentences stand at one point, else (B, Q)."""
    column_BR: Tensor | None
    """Columns of the pool that the content rows take; None: those that end at `end`, in order."""
    mask_B1QN: Tensor | None
    """Additive; None where every row sees all columns."""
    content: int
    """R."""
    end: int
    """Columns of the pool that anything is in."""

    @classmethod
    def build(cls, cache: KVCache, token_BKT: Tensor, positions: int, dtype: torch.dtype) -> BlockRows:
        """Rows for the next tokens of every beam; marks them as the past of their beam.

        Args:
            cache: at the point where the tokens go on.
            token_BKT: the tokens.
            positions: rows of the position table. What stands beyond it can only pad a ragged block.
            dtype: of the mask.
        """
        beams, block, stream = cache.beams, token_BKT.shape[2], cache.stream
        cache.reserve(block)
        content, end = beams * block, (cache.reach + block) * beams
        step_T = torch.arange(block, device=token_BKT.device)
        start = torch.full_like(step_T[:1], cache.reach) if cache.even else cache.taken_B[:, None]
        place = (start + step_T)[..., None]
        column = (place * beams + torch.arange(beams, device=place.device)).flatten(-2)
        own_KR = torch.eye(beams, dtype=torch.bool, device=place.device).repeat(1, block)
        if cache.even:
            cache.past_BKN[:, :, end - content : end] = own_KR
        else:
            index_BKR = column[:, None].expand(-1, beams, -1)
            cache.past_BKN.scatter_(2, index_BKR, own_KR.expand(index_BKR.shape))
        mask = _block_mask(cache, place, end, dtype)
        position = place.expand(*place.shape[:-1], beams).flatten(-2)
        token_BQ = token_BKT.transpose(1, 2).flatten(1)
        if stream.two_stream:
            token_BQ = torch.cat([token_BQ, torch.full_like(token_BQ, stream.query_token)], 1)
            position = torch.cat([position, position + stream.query_offset], -1)
            mask = None if mask is None else mask.repeat(1, 1, 2, 1)
        position = position.clamp_max(positions - 1)
        return cls(token_BQ, position, None if cache.even else column, mask, content, end)


def _block_mask(cache: KVCache, place: Tensor, end: int, dtype: torch.dtype) -> Tensor | None:
    """Which columns the content rows see, (B, 1, R, end): the past of their beam and no later token."""
    beams, block = cache.beams, place.shape[-2]
    if cache.even and block == 1:
        if beams == 1:
            return None
        seen = cache.past_BKN[:, :, :end]
    else:
        column_N = torch.arange(end, device=place.device)
        until = column_N < (place + 1) * beams
        past_B1KN = cache.past_BKN[:, None, :, :end]
        # (B or 1, T, 1, N) and (B, 1, K, N) -> (B, T x K, N)
        seen = (until.view(-1, block, 1, end) & past_B1KN).flatten(1, 2)
    zero = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zero.masked_fill_(~seen, -math.inf)[:, None]


@dataclass(frozen=True)
class CachedRows(RowAttention):
    """Self-attention of the rows of one AR step, in one layer, over the cached past of their beam."""

    keys: Tensor
    values: Tensor
    rows: BlockRows

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHRE: Tensor, v_BHRE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        end, mask = self.rows.end, self.rows.mask_B1QN
        for pool, new in ((self.keys, k_BHRE), (self.values, v_BHRE)):
            if self.rows.column_BR is None:
                pool.narrow(2, end - self.rows.content, self.rows.content).copy_(new)
            else:
                sentence_B1 = torch.arange(len(pool), device=pool.device)[:, None]
                pool[sentence_B1, :, self.rows.column_BR] = new.transpose(1, 2)
        mask = mask[:, :, self.first_row :] if mask is not None and self.first_row else mask
        return kernel(q_BHTE, self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end), mask)


@dataclass(frozen=True)
class CandidateAttention(RowAttention):
    """Self-attention of NAR rows inside each length candidate; candidates are folded into the rows."""

    mask: Tensor
    """Additive, (B x candidates, 1, 1, L)."""
    candidates: int

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        out = kernel(self._apart(q_BHTE), self._apart(k_BHTE), self._apart(v_BHTE), self.mask)
        return out.reshape(-1, self.candidates * out.shape[1], *out.shape[2:])

    def of_picked(self) -> CandidateAttention:
        """The same attention for rows that stand behind the content rows; see :class:`PickedRows`."""
        return replace(self, first_row=self.content_rows)

    def _apart(self, x_BHTE: Tensor) -> Tensor:
        """(B, H, candidates x L, E) -> (B x candidates, H, L, E)."""
        sentences, heads, _, width = x_BHTE.shape
        return x_BHTE.reshape(sentences, heads, self.candidates, -1, width).transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class PickedRows:
    """Rows of length candidates that something is predicted from: all that the last layer computes.

    Every candidate gives as many rows (T, the most that any needs); what stands over is not read.
    """

    row_BT: Tensor
    """Rows to compute, by their place among the content rows of a sentence, candidate by candidate."""
    place_P: Tensor
    """Where each picked row stands among the B x T computed ones."""

    @classmethod
    def build(cls, picked_P: Tensor, shape: tuple[int, int, int]) -> PickedRows:
        """From flat indices into (B, N, L), ascending; asks the device for one number."""
        sentences, candidates, width = shape
        candidate_P, column_P = picked_P // width, picked_P % width
        count_X = candidate_P.bincount(minlength=sentences * candidates)
        most = int(count_X.max())
        rank_P = (
            torch.arange(len(picked_P), device=picked_P.device) - (count_X.cumsum(0) - count_X)[candidate_P]
        )
        column_XT = picked_P.new_zeros(len(count_X), most)
        column_XT[candidate_P, rank_P] = column_P
        start_N1 = torch.arange(candidates, device=picked_P.device)[:, None] * width
        row_BNT = column_XT.view(sentences, candidates, most) + start_N1
        return cls(row_BNT.flatten(1), candidate_P * most + rank_P)

    def behind(self, x_BRD: Tensor) -> Tensor:
        """The content rows, and the picked ones once more behind them."""
        index_BTD = self.row_BT[..., None].expand(-1, -1, x_BRD.shape[2])
        return torch.cat([x_BRD, x_BRD.gather(1, index_BTD)], 1)


@dataclass(frozen=True)
class AuxAttention(CandidateAttention):
    """Self-attention of AUX rows; content rows of all candidates stand before all query rows.

    `mask` is (X, 1, C + Q, C).
    """

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
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
    """The rows of one AUX pass: the original part, a draft as compensation rows, and query rows."""

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
