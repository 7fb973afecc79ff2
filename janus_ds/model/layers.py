"""Parts of the model: embeddings with positions, the feed-forward block, the length head, recomputation.

Shape letters: B samples, T rows, S source tokens, D width, K length classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from janus_ds.config.schema import ModelConfig
from janus_ds.model.decoding.cpu_kernels import PreparedLinear
from janus_ds.parallel.layers import ParallelLayers

__all__ = ["InputRows", "LengthHead", "Recompute", "TransformerLayer", "recompute_with"]

Recompute = Callable[..., Tensor]
"""Calls a function with the arguments that follow it, now or once more in the backward pass."""


def recompute_with(parallel: ParallelLayers) -> Recompute:
    """Activation checkpointing that draws the same dropout again, sharded activations included."""
    return partial(checkpoint, use_reentrant=False, context_fn=parallel.recompute_contexts)


def position_table(rows: int, d_model: int, std: float) -> nn.Embedding:
    """Learned absolute positions, 0-based, replicated over tensor-parallel ranks."""
    table = nn.Embedding(rows, d_model, device="meta").to_empty(device="cpu")
    nn.init.normal_(table.weight, 0.0, std)
    return table


def _as_it_is(x: Tensor) -> Tensor:
    return x


class InputRows(nn.Module):
    """What stands between embedded tokens and the first layer: scale, positions, norm, dropout.

    A base class of encoder and decoder, so that their tables are `encoder.positions` and so on.
    """

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__()
        self.positions = position_table(positions, config.d_model, config.init_std)
        self.embedding_norm = nn.LayerNorm(config.d_model) if config.layernorm_embedding else None
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.dropout = config.dropout

    def input_rows(self, embedded_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """Rows that enter the first layer, shape (B, T, D)."""
        rows_BTD = torch.add(self.positions(position_BT), embedded_BTD, alpha=self.scale)
        if self.embedding_norm is not None:
            rows_BTD = self.embedding_norm(rows_BTD)
        return F.dropout(rows_BTD, self.dropout, self.training)


class TransformerLayer(nn.Module):
    """The feed-forward sublayer and the residual form that encoder and decoder layers share.

    Post-norm: every sublayer is norm(x + dropout(f(x))).
    """

    def __init__(self, config: ModelConfig, parallel: ParallelLayers) -> None:
        super().__init__()
        self.fc1 = parallel.column_linear(config.d_model, config.ffn_dim, std=config.init_std)
        self.fc2 = parallel.row_linear(config.ffn_dim, config.d_model, std=config.init_std)
        self.ffn_norm = nn.LayerNorm(config.d_model)
        self.dropout = config.dropout
        self.activation_dropout = config.activation_dropout
        self._activation: Any = F.relu if config.activation == "relu" else F.gelu
        self._activation_name = config.activation
        self._sharded_rng = parallel.sharded_rng

    def prepare_products(self, int8: bool) -> None:
        """Let the first product of the feed-forward block apply the activation, for inference."""
        self.fc1 = PreparedLinear(cast(nn.Linear, self.fc1), int8, self._activation_name)
        self._activation = _as_it_is

    def residual(self, x_BTD: Tensor, change_BTD: Tensor, norm: nn.LayerNorm) -> Tensor:
        """norm(x + dropout(change))."""
        if self.training:
            change_BTD = F.dropout(change_BTD, self.dropout)
        out: Tensor = norm(x_BTD + change_BTD)
        return out

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """The last sublayer."""
        inner = self._activation(self.fc1(x_BTD))
        if self.training and self.activation_dropout:
            with self._sharded_rng():
                inner = F.dropout(inner, self.activation_dropout)
        return self.residual(x_BTD, self.fc2(inner), self.ffn_norm)


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
