"""Experimental: self-attention of decoder rows by torch's FlexAttention, one call that skips empty blocks.

The kernel asks :func:`janus_ds.stream_mask.visible` itself. Lengths and ranks are tensors that it reads, so
batches of one shape need no new compilation. No dropout of attention weights, and on a CPU no gradients:
torch has neither. Meant for GPUs, where it has not been measured yet, so that nothing chooses it by itself.
Shape letters as in `attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from janus_ds.batch import TwoStreamBatch
from janus_ds.errors import ConfigError
from janus_ds.model.attention import Kernel, RowAttention
from janus_ds.stream_mask import Segment, visible

BLOCK = 128
"""Rows and keys of a block."""


@dataclass(frozen=True)
class FlexRows(RowAttention):
    """One call over all rows."""

    batch: TwoStreamBatch
    blocks: BlockMask

    @classmethod
    def build(
        cls, batch: TwoStreamBatch, dtype: torch.dtype, block: int = BLOCK, first_row: int = 0
    ) -> FlexRows:
        """The rows of a batch from one on.

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
        segment_R = torch.cat([torch.full((layout.width(s),), s.value, device=device) for s in Segment])
        rank_BR, valid_BC = batch.row_rank_BR, batch.content_valid_BC()

        def sees(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            row = q + first_row
            rule = visible(segment_R[row], rank_BR[b, row], segment_R[kv], rank_BR[b, kv])
            return cast(Tensor, rule & valid_BC[b, kv])

        shape = len(rank_BR), None, layout.rows - first_row, layout.content_rows
        blocks = create_block_mask(sees, *shape, device=str(device), BLOCK_SIZE=block)
        return cls(layout.content_rows, first_row, batch, blocks)

    def from_row(self, first_row: int) -> FlexRows:
        """The same attention for the rows [first_row, R)."""
        return FlexRows.build(self.batch, torch.float32, self.blocks.BLOCK_SIZE[0], first_row)

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHCE: Tensor, v_BHCE: Tensor) -> Tensor:
        """See :class:`RowAttention`; `kernel` is not used."""
        # Inside of a compiled model the call is compiled with it.
        fused = q_BHTE.is_cuda and not torch.compiler.is_compiling()
        call: Callable[..., Tensor] = _compiled() if fused else cast(Any, flex_attention)
        return call(q_BHTE, k_BHCE, v_BHCE, block_mask=self.blocks).transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return cast(Callable[..., Tensor], torch.compile(flex_attention))
