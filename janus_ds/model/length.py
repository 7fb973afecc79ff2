"""The length head: how many tokens the target has, from the encoder states."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["LengthHead"]


class LengthHead(nn.Module):
    """Mean of the encoder states over real source tokens, then a linear layer without bias.

    What the classes mean (inner length, or length with specials) is the objective's convention.
    """

    def __init__(self, d_model: int, classes: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, d_model).normal_(0.0, std))

    def forward(self, states_BSD: Tensor, valid_BS: Tensor) -> Tensor:
        """Logits over the classes, shape (B, K).

        Args:
            states_BSD: encoder output.
            valid_BS: False for padding.
        """
        share_BS = valid_BS.to(states_BSD.dtype)
        # Dividing first keeps the sum inside the range of fp16.
        share_BS = share_BS / share_BS.sum(1, keepdim=True).clamp_min(1.0)
        pooled_BD = torch.bmm(share_BS[:, None], states_BSD).squeeze(1)
        return nn.functional.linear(pooled_BD, self.weight)
