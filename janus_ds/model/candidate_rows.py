"""The rows of one NAR pass: all length candidates of a sentence side by side.

Shape letters: B sentences, N candidates of each, L target tokens of each, X = B x N candidates of all,
R rows of a sentence, T rows of a sentence that are computed, P picked rows of all, D width, H heads,
E width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.model.row_attention import Kernel

__all__ = ["CandidateRows", "PickedRows"]


@dataclass(frozen=True)
class CandidateRows:
    """Self-attention of NAR rows inside each length candidate; candidates are folded into the rows."""

    mask: Tensor
    """Additive, (B x candidates, 1, 1, L)."""
    content_rows: int
    candidates: int
    first_row: int = 0

    def attend(self, kernel: Kernel, q_BHTE: Tensor, k_BHTE: Tensor, v_BHTE: Tensor) -> Tensor:
        """See :class:`janus_ds.model.attention.RowAttention`."""
        out = kernel(self._apart(q_BHTE), self._apart(k_BHTE), self._apart(v_BHTE), self.mask)
        return out.reshape(-1, self.candidates * out.shape[1], *out.shape[2:])

    def of_picked(self) -> CandidateRows:
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
