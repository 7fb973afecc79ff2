"""Experimental: self-attention of decoder rows by torch's FlexAttention, one call that skips empty blocks.

Which blocks of (rows x keys) hold visible pairs is worked out in closed form, on the batch's device and
without waiting for it: the keys that a row sees are at most three stretches of columns (:func:`_stretches`),
so their number in each block of columns follows from the stretches' ends. That is rows x key blocks of
arithmetic, where `create_block_mask` evaluates rows x keys. Inside of partly visible blocks the kernel asks
:func:`janus_ds.stream_mask.visible` itself. Lengths and ranks are tensors that the rule reads, so batches of
one shape need no new compilation.

No dropout of attention weights, and on a CPU no gradients: torch has neither. Meant for GPUs, where it has
not been measured yet, so that nothing chooses it by itself. Shape letters as in `attention`; N key
blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from janus_ds.batch import TwoStreamBatch
from janus_ds.errors import ConfigError
from janus_ds.model.attention import Kernel, RowAttention
from janus_ds.stream_mask import Segment, visible

BLOCK = 128
"""Rows and keys of a block."""

Stretch = tuple[Tensor, Tensor]
"""First column and the one behind the last, both (B, T)."""


@dataclass(frozen=True)
class MaskRule:
    """Segment and rank of every row, and which content rows are padding: what the rule reads."""

    segment_R: Tensor
    rank_BR: Tensor
    valid_BC: Tensor
    first_row: int = 0

    def function(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The rule as FlexAttention asks for it: (sample, head, row, key) to visible or not."""
        q_segment_T, q_rank_BT = self.segment_R[self.first_row :], self.rank_BR[:, self.first_row :]
        segment_R, rank_BR, valid_BC = self.segment_R, self.rank_BR, self.valid_BC

        def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            rule = visible(q_segment_T[q], q_rank_BT[b, q], segment_R[kv], rank_BR[b, kv])
            return cast(Tensor, rule & valid_BC[b, kv])

        return sees


@dataclass(frozen=True)
class FlexRows(RowAttention):
    """One call over all rows."""

    batch: TwoStreamBatch
    rule: MaskRule
    blocks: BlockMask

    @classmethod
    def build(cls, batch: TwoStreamBatch, dtype: torch.dtype, block: int = BLOCK) -> FlexRows:
        """All rows of a batch.

        Raises:
            ConfigError: gradients are wanted on a CPU.
        """
        layout, device = batch.layout, batch.row_token_BR.device
        if device.type == "cpu" and torch.is_grad_enabled():
            raise ConfigError(
                "attention backend 'flex' gives no gradients on a CPU",
                "train.attention_backend",
                "use auto, or train on a GPU",
            )
        # Made there: a copy from the host, or a repetition of unknown length, would wait.
        kinds = [torch.full((layout.width(s),), s.value, device=device) for s in Segment]
        segment_R = torch.cat(kinds)
        rule = MaskRule(segment_R, batch.row_rank_BR, batch.content_valid_BC())
        return cls(layout.content_rows, 0, batch, rule, _blocks(batch, rule, block))

    def from_row(self, first_row: int) -> FlexRows:
        """The same attention for the rows [first_row, R)."""
        rule = MaskRule(self.rule.segment_R, self.rule.rank_BR, self.rule.valid_BC, first_row)
        blocks = _blocks(self.batch, rule, self.blocks.BLOCK_SIZE[0])
        return FlexRows(self.content_rows, first_row, self.batch, rule, blocks)

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`; `kernel` is not used."""
        # Inside of a compiled model the call is compiled with it.
        fused = q_BHTE.is_cuda and not torch.compiler.is_compiling()
        call: Callable[..., Tensor] = _compiled() if fused else cast(Any, flex_attention)
        return call(q_BHTE, k_BHCE, v_BHCE, block_mask=self.blocks).transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.compile(flex_attention))


def _stretches(batch: TwoStreamBatch, rule: MaskRule) -> list[Stretch]:
    """The columns that each row sees, as three stretches (some empty) that do not overlap.

    AR rows see AR content up to their rank; rows of the original part the visible tokens and all MASKs;
    compensation rows the visible tokens, later MASKs and gold up to their own; AUX rows the visible tokens,
    MASKs from their own on and gold before it.
    """
    layout = batch.layout
    kind_T = rule.segment_R[rule.first_row :]
    rank_BT = rule.rank_BR[:, rule.first_row :]
    ar_T = (kind_T == Segment.ARC.value) | (kind_T == Segment.ARQ.value)
    cmp_T, qry_T = kind_T == Segment.CMP.value, kind_T == Segment.QRY.value
    lengths = (batch.ar_length_B, batch.visible_length_B, batch.masked_length_B)
    ar_B1, shown_B1, masked_B1 = (length_B[:, None] for length_B in lengths)
    # Of a compensation or AUX row: how many gold tokens it sees, and the first MASK that it sees.
    seen_BT = torch.where(cmp_T, rank_BT + 1, torch.where(qry_T, rank_BT, 0))
    arc, vis, cmp, msk = (layout.start(s) for s in (Segment.ARC, Segment.VIS, Segment.CMP, Segment.MSK))
    first = (
        torch.where(ar_T, arc, vis).expand_as(rank_BT),
        torch.where(ar_T, arc + torch.minimum(rank_BT + 1, ar_B1), vis + shown_B1),
    )
    masks = (msk + seen_BT, torch.where(ar_T, msk, msk + masked_B1))
    gold = (torch.full_like(rank_BT, cmp), cmp + torch.minimum(seen_BT, masked_B1))
    return [first, masks, gold]


def _blocks(batch: TwoStreamBatch, rule: MaskRule, block: int) -> BlockMask:
    """Which blocks are wholly or partly visible."""
    rows, keys = batch.layout.rows - rule.first_row, batch.layout.content_rows
    starts_N = torch.arange(0, keys, block, device=rule.rank_BR.device)
    pairs_BTN = torch.zeros((), dtype=torch.int64, device=starts_N.device)
    for start_BT, stop_BT in _stretches(batch, rule):
        low = torch.maximum(start_BT[..., None], starts_N)
        high = torch.minimum(stop_BT[..., None], starts_N + block)
        pairs_BTN = pairs_BTN + (high - low).clamp_min(0)
    padded = F.pad(pairs_BTN, (0, 0, 0, -rows % block))
    pairs_BQN = padded.unflatten(1, (-1, block)).sum(2)[:, None]
    full = pairs_BQN == block * block
    partial = (pairs_BQN > 0) & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), block, rule.function(), seq_lengths=(rows, keys)
    )


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row of blocks are chosen, and their numbers first."""
    number = chosen.sum(-1, dtype=torch.int32)
    order = torch.argsort(chosen.to(torch.int32), dim=-1, descending=True, stable=True)
    return number, order.to(torch.int32)
