"""Encoder and two-stream decoder, post-norm, as in BART and in the NMT Transformer; the length head.

The decoder makes one pass over all rows (Figure 2 of the paper): content rows give keys and values, query
rows queries alone, and the last layer computes only the rows that something is predicted from.

Shape letters: B samples, S source tokens, R decoder rows, T computed rows, D width, H heads, E width of
a head, K length classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from janus_ds.config.schema import ModelConfig
from janus_ds.model.attention import (
    KeysValues,
    MultiHeadAttention,
    RowAttention,
    RowsOfBatch,
    attend_source,
    dropout,
)
from janus_ds.model.decoding.cpu_kernels import PreparedLinear
from janus_ds.model.decoding.native_step import NativeLayers
from janus_ds.parallel.tensor_parallel import ParallelLayers, drawn_embedding

Recompute = Callable[..., Tensor]
"""Calls a function with the arguments that follow it, now or once more in the backward pass."""


def recompute_with(parallel: ParallelLayers) -> Recompute:
    """Activation checkpointing that draws the same dropout again, sharded activations included."""
    # torch.compile, which only whole models have, takes no contexts that are methods.
    sharded: dict[str, Any] = {"context_fn": parallel.recompute_contexts} if parallel.size > 1 else {}
    return partial(checkpoint, use_reentrant=False, **sharded)


def _as_it_is(x: Tensor) -> Tensor:
    return x


class InputRows(nn.Module):
    """What stands between embedded tokens and the first layer: scale, positions, norm, dropout.

    A base class of encoder and decoder, so that their tables are `encoder.positions` and so on.
    """

    def __init__(self, config: ModelConfig, positions: int) -> None:
        super().__init__()
        # Learned, absolute, from 0; the same on all tensor-parallel ranks.
        self.positions = drawn_embedding(positions, config.d_model, config.init_std)
        self.embedding_norm = nn.LayerNorm(config.d_model) if config.layernorm_embedding else None
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.dropout = config.dropout
        self.layers = nn.ModuleList()
        self.native: NativeLayers | None = None
        """Computes all layers in decoding, where it can."""

    def prepare_products(self, int8: bool) -> None:
        """Compute all layers in one call, for inference."""
        self.native = NativeLayers(self, int8)

    def input_rows(self, embedded_BTD: Tensor, position_BT: Tensor) -> Tensor:
        """Rows that enter the first layer, shape (B, T, D)."""
        rows_BTD = torch.add(self.positions(position_BT), embedded_BTD, alpha=self.scale)
        if self.embedding_norm is not None:
            rows_BTD = self.embedding_norm(rows_BTD)
        return dropout(rows_BTD, self.dropout) if self.training else rows_BTD


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
        self.activation_name = config.activation
        self._sharded_rng = parallel.sharded_rng

    def prepare_products(self, int8: bool) -> None:
        """Let the first product of the feed-forward block apply the activation, for inference."""
        self.fc1 = PreparedLinear(cast(nn.Linear, self.fc1), int8, self.activation_name)
        self._activation = _as_it_is

    def residual(self, x_BTD: Tensor, change_BTD: Tensor, norm: nn.LayerNorm) -> Tensor:
        """norm(x + dropout(change))."""
        if self.training:
            change_BTD = dropout(change_BTD, self.dropout)
        out: Tensor = norm(x_BTD + change_BTD)
        return out

    def feed_forward(self, x_BTD: Tensor) -> Tensor:
        """The last sublayer."""
        inner = self._activation(self.fc1(x_BTD))
        if self.training and self.activation_dropout:
            with self._sharded_rng():
                inner = dropout(inner, self.activation_dropout)
        return self.residual(x_BTD, self.fc2(inner), self.ffn_norm)


def _attention(config: ModelConfig, parallel: ParallelLayers) -> MultiHeadAttention:
    return MultiHeadAttention(
        config.d_model, config.heads, config.attention_dropout, config.init_std, parallel
    )


class EncoderLayer(TransformerLayer):
    """Self-attention and feed-forward."""

    def __init__(self, config: ModelConfig, parallel: ParallelLayers) -> None:
        super().__init__(config, parallel)
        self.self_attention = _attention(config, parallel)
        self.self_attention_norm = nn.LayerNorm(config.d_model)

    def forward(self, x_BSD: Tensor, mask_B11S: Tensor | None) -> Tensor:
        """States after this layer, shape (B, S, D), from those before it."""
        attention = self.self_attention
        out = attention.kernel(*attention.queries_keys_values(x_BSD), mask_B11S)
        x_BSD = self.residual(x_BSD, attention.merge(out), self.self_attention_norm)
        return self.feed_forward(x_BSD)


class DecoderLayer(TransformerLayer):
    """Self-attention over content rows, cross-attention over the source, feed-forward."""

    def __init__(self, config: ModelConfig, parallel: ParallelLayers) -> None:
        super().__init__(config, parallel)
        self.self_attention = _attention(config, parallel)
        self.self_attention_norm = nn.LayerNorm(config.d_model)
        self.cross_attention = _attention(config, parallel)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        x_BRD: Tensor,
        rows: RowAttention,
        sources: Sequence[KeysValues],
        source_mask: Tensor | None,
        runs: Sequence[int] = (),
    ) -> Tensor:
        """Rows [first_row, R) after this layer, shape (B, T, D).

        Args:
            x_BRD: all rows, content rows first.
            rows: which rows are computed, and what they see of the content rows.
            sources: keys and values of the encoder states; with two dropout draws, of both.
            runs: with two draws, how the computed rows alternate between them (:func:`attend_source`).
        """
        attention, x_BTD = self.self_attention, x_BRD
        if rows.content_rows == x_BRD.shape[1] and not rows.first_row:
            projected = attention.queries_keys_values(x_BRD)
        else:
            content = x_BRD[:, : rows.content_rows].contiguous()
            x_BTD = x_BRD[:, rows.first_row :].contiguous()
            projected = (attention.queries(x_BTD), *attention.keys_values(content))
        out = rows.attend(attention.kernel, *projected)
        x_BTD = self.residual(x_BTD, attention.merge(out), self.self_attention_norm)
        cross = self.cross_attention
        out = attend_source(cross.kernel, cross.queries(x_BTD), sources, source_mask, runs)
        x_BTD = self.residual(x_BTD, cross.merge(out), self.cross_attention_norm)
        return self.feed_forward(x_BTD)

    def kept_keys_values(self, states_BSD: Tensor) -> KeysValues:
        """Keys and values of the encoder states for many steps: laid out head by head."""
        k_BHSE, v_BHSE = self.cross_attention.keys_values(states_BSD)
        return k_BHSE.contiguous(), v_BHSE.contiguous()

    def with_states(
        self,
        x_BRD: Tensor,
        rows: RowAttention,
        states: Sequence[Tensor],
        source_mask: Tensor | None,
        runs: Sequence[int] = (),
    ) -> Tensor:
        """:meth:`forward` from encoder states, (B, S, D) each: the unit of recomputation in training."""
        sources = [self.cross_attention.keys_values(states_BSD) for states_BSD in states]
        return self.forward(x_BRD, rows, sources, source_mask, runs)


class Encoder(InputRows):
    """All encoder layers."""

    def __init__(self, config: ModelConfig, parallel: ParallelLayers) -> None:
        super().__init__(config, config.max_source_positions)
        self.layers = nn.ModuleList(EncoderLayer(config, parallel) for _ in range(config.encoder_layers))

    def forward(
        self, embedded_BSD: Tensor, mask_B11S: Tensor | None, recompute: Recompute | None = None
    ) -> Tensor:
        """Encoder states, shape (B, S, D)."""
        position_S = torch.arange(embedded_BSD.shape[1], device=embedded_BSD.device)
        # Padding may reach past the table; its positions do not matter.
        x_BSD = self.input_rows(embedded_BSD, position_S.clamp_max(self.positions.num_embeddings - 1))
        if self.native is not None:
            self.native.prepare()
            if self.native.takes(x_BSD, x_BSD.shape[1]):
                return self.native.bidirectional(x_BSD, mask_B11S)[0].view_as(x_BSD)
        for layer in self.layers:
            x_BSD = recompute(layer, x_BSD, mask_B11S) if recompute else layer(x_BSD, mask_B11S)
        return x_BSD


class Decoder(InputRows):
    """All decoder layers, over all rows of the two streams."""

    def __init__(self, config: ModelConfig, parallel: ParallelLayers) -> None:
        super().__init__(config, config.max_target_positions)
        self.layers = nn.ModuleList(DecoderLayer(config, parallel) for _ in range(config.decoder_layers))

    def forward(
        self,
        x_BRD: Tensor,
        rows: RowsOfBatch,
        states: Sequence[Tensor],
        source_mask: Tensor | None,
        recompute: Recompute | None = None,
    ) -> Tensor:
        """Hidden rows to predict from, the columns from the layout's `predicted_start` on, shape (B, T, D).

        Args:
            x_BRD: rows from :meth:`input_rows`.
            rows: self-attention of all rows and of the predicted ones.
            states: encoder states, (B, S, D) each: one dropout draw, or AR's and that of all other rows.
        """
        last = len(self.layers) - 1
        for number, layer in enumerate(self.decoder_layers()):
            attention = rows.predicted if number == last else rows.every
            runs = rows.predicted_runs if number == last else rows.every_runs
            if recompute:
                x_BRD = recompute(layer.with_states, x_BRD, attention, states, source_mask, runs)
            else:
                x_BRD = layer.with_states(x_BRD, attention, states, source_mask, runs)
        return x_BRD

    def decoder_layers(self) -> list[DecoderLayer]:
        """The layers in order."""
        return [cast(DecoderLayer, layer) for layer in self.layers]


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
            valid_BS: False for padding.
        """
        share_BS = valid_BS.to(states_BSD.dtype)
        # Dividing first keeps the sum inside the range of fp16.
        share_BS = share_BS / share_BS.sum(1, keepdim=True).clamp_min(1.0)
        pooled_BD = torch.bmm(share_BS[:, None], states_BSD).squeeze(1)
        return F.linear(pooled_BD, self.weight)
