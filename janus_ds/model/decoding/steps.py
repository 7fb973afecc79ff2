"""The decoder rows of one pass of decoding: a block of AR tokens, or all length candidates of NAR or AUX.

Shape letters: B sentences, K beams, T tokens of a block, R = T x K content rows of a step (row t x K + k),
N columns of the cache (see `cache`); of NAR: N candidates of each sentence, L target tokens of each,
X = B x N candidates of all, T rows of a sentence that are computed, P picked rows of all. D width, H heads,
E width of a head, Q query rows. Of AUX: M masked slots of the candidate that has most, C = L + M content rows
and Q query rows of a candidate, R = N x (C + Q) rows of a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from janus_ds.model.attention import Kernel, KeysValues, RowAttention, additive_mask
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
    kept: list[KeysValues] | None = field(default=None, kw_only=True)
    """Takes keys and values of each layer, (B x candidates, H, L, E), if wanted."""

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        k_XHLE, v_XHLE = self._apart(k_BHTE), self._apart(v_BHTE)
        if self.kept is not None:
            self.kept.append((k_XHLE, v_XHLE))
        out = kernel(self._apart(q_BHTE), k_XHLE, v_XHLE, self.mask)
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
    def build(cls, picked_P: Tensor, most: int, shape: tuple[int, int, int]) -> PickedRows:
        """From flat indices into (B, N, L), ascending, and the largest number of them in a candidate."""
        sentences, candidates, width = shape
        candidate_P, column_P = picked_P // width, picked_P % width
        count_X = picked_P.new_zeros(sentences * candidates)
        count_X.scatter_add_(0, candidate_P, torch.ones_like(candidate_P))
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
    """Self-attention of AUX rows, in one layer, over what a pool keeps; content rows stand before query rows.

    `mask` is (X, 1, T content rows and T query rows, N).
    """

    keys: Tensor
    values: Tensor
    column_XT: Tensor
    """Columns of the pool that the content rows take."""

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        """See :class:`RowAttention`."""
        row_X1 = torch.arange(len(self.keys), device=self.keys.device)[:, None]
        for pool, new in ((self.keys, k_BHTE), (self.values, v_BHTE)):
            pool[row_X1, :, self.column_XT] = self._apart(new).transpose(1, 2)
        parts = q_BHTE.tensor_split([self.content_rows - self.first_row], 2)
        q_XHTE = torch.cat([self._apart(part) for part in parts if part.shape[2]], 2)
        mask = self.mask[:, :, -q_XHTE.shape[2] :]
        out_XTHE = kernel(q_XHTE, self.keys, self.values, mask)
        halves = out_XTHE.split(self.column_XT.shape[1], 1)
        return torch.cat([x.reshape(len(q_BHTE), -1, *x.shape[2:]) for x in halves], 1)


@dataclass(frozen=True)
class AuxPool:
    """What AUX passes keep of X candidates: keys and values of the original part and of gold tokens.

    The original part sees itself alone, and a gold token's row what stands before it: as long as these stay,
    so do their keys and values. Column l < L is that of the original part, L + j that of gold token j.
    """

    keys: tuple[Tensor, ...]
    """For each layer (X, H, N = L + M, E)."""
    values: tuple[Tensor, ...]
    slot_XM: Tensor
    """Columns of masked slots, in target order; then others, which pad."""
    kind_XN: Tensor
    rank_XN: Tensor
    valid_XN: Tensor

    @classmethod
    def build(cls, original: Sequence[KeysValues], slot_XL: Tensor, length_X: Tensor, most: int) -> AuxPool:
        """From the original part, as a NAR pass has computed it, and its masked slots: M = `most`."""
        count_X, column_L = slot_XL.sum(1), torch.arange(slot_XL.shape[1], device=slot_XL.device)
        slot_XM = (~slot_XL).long().sort(dim=1, stable=True).indices[:, :most]
        kind_XL = torch.where(slot_XL, Segment.MSK.value, Segment.VIS.value)
        rank_M = column_L[:most].expand_as(slot_XM)
        return cls(
            tuple(F.pad(k, (0, 0, 0, most)) for k, _ in original),
            tuple(F.pad(v, (0, 0, 0, most)) for _, v in original),
            slot_XM,
            torch.cat([kind_XL, torch.full_like(slot_XM, Segment.CMP.value)], 1),
            torch.cat([slot_XL.cumsum(1) - 1, rank_M], 1),
            torch.cat([column_L < length_X[:, None], rank_M < count_X[:, None]], 1),
        )

    def ordered(self, rank_XL: Tensor) -> AuxPool:
        """The pool with its slots in another order; no gold token's row may have been computed."""
        most, width = self.slot_XM.shape[1], rank_XL.shape[1]
        apart_XL = self.kind_XN[:, :width] != Segment.MSK.value
        slot_XM = rank_XL.masked_fill(apart_XL, width).sort(dim=1, stable=True).indices[:, :most]
        return replace(self, slot_XM=slot_XM, rank_XN=torch.cat([rank_XL, self.rank_XN[:, width:]], 1))

    def select(self, index_X: Tensor) -> AuxPool:
        """The pool of some candidates only."""
        keys, values = (tuple(x[index_X] for x in layers) for layers in (self.keys, self.values))
        rest = (x[index_X] for x in (self.slot_XM, self.kind_XN, self.rank_XN, self.valid_XN))
        return AuxPool(keys, values, *rest)


@dataclass(frozen=True)
class AuxRows:
    """The rows of one AUX pass: T gold tokens of each candidate, and as many query rows, one slot later."""

    token_BR: Tensor
    position_BR: Tensor
    column_XT: Tensor
    mask_X1QN: Tensor
    content: int

    @classmethod
    def build(cls, pool: AuxPool, token_BNL: Tensor, settled_BN: Tensor, block: int, mask: int) -> AuxRows:
        """Rows for the `block` slots of each candidate from the first open one on.

        The last settled token goes with them: it may be another than its row was computed for. What stands
        behind a candidate's last slot pads the block; no row sees it.
        """
        sentences, step_T = len(token_BNL), torch.arange(block, device=token_BNL.device)
        most, last = pool.slot_XM.shape[1], pool.slot_XM.shape[1] - 1
        query_XT = settled_BN.flatten()[:, None] + step_T
        gold_XT = (query_XT - 1).clamp_max(last)
        slot_XT = pool.slot_XM.gather(1, gold_XT)
        token_XT = token_BNL.flatten(0, 1).gather(1, slot_XT.clamp_max(token_BNL.shape[2] - 1))
        asked_XT = pool.slot_XM.gather(1, query_XT.clamp_max(last))
        kinds = [torch.full_like(step_T, kind.value) for kind in (Segment.CMP, Segment.QRY)]
        seen = visible(
            torch.cat(kinds)[:, None],
            torch.cat([gold_XT, query_XT], 1)[..., None],
            pool.kind_XN[:, None],
            pool.rank_XN[:, None],
        )

        def joined(content: Tensor, query: Tensor) -> Tensor:
            """All content rows of a sentence, candidate by candidate, then all its query rows."""
            return torch.cat([x.reshape(sentences, -1) for x in (content, query)], 1)

        return cls(
            joined(token_XT, torch.full_like(query_XT, mask)),
            joined(slot_XT, asked_XT),
            pool.kind_XN.shape[1] - most + gold_XT,
            additive_mask((seen & pool.valid_XN[:, None])[:, None], pool.keys[0].dtype),
            block * len(gold_XT) // sentences,
        )
