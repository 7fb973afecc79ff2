"""A plain AR step of transformers' BART and of `nn.Transformer`: the shapes, tokens and loss of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import forward_backward
from benchmarks.shapes import BenchShape, special_tokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import MissingDependencyError

OUTSIDERS = ("hf", "hf_eager", "torch")


class TorchSeq2Seq(nn.Module):
    """`nn.Transformer`, post-norm, with learned positions and a tied output layer."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab_size, config.d_model)
        self.position = nn.Embedding(config.max_source_positions, config.d_model)
        self.layers = nn.Transformer(
            config.d_model,
            config.heads,
            config.encoder_layers,
            config.decoder_layers,
            config.ffn_dim,
            config.dropout,
            "gelu" if config.activation == "gelu" else "relu",
            batch_first=True,
        )
        # nn.Transformer has one rate for all; ours has others for attention and inner activations.
        for part in self.layers.modules():
            if isinstance(part, nn.MultiheadAttention):
                part.dropout = config.attention_dropout
            elif isinstance(part, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                part.dropout.p = config.activation_dropout

    def forward(self, source_BS: Tensor, given_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the tokens after the given ones."""
        causal = nn.Transformer.generate_square_subsequent_mask(
            given_BT.shape[1], source_BS.device, self.token.weight.dtype
        )
        source, given = (self.token(x) + self.position.weight[: x.shape[1]] for x in (source_BS, given_BT))
        hidden_BTD = self.layers(source, given, tgt_mask=causal, tgt_is_causal=True)
        return F.linear(hidden_BTD, self.token.weight)


def outsider_step(
    name: str, shape: BenchShape, config: ModelConfig, smoothing: float, device: str, dtype: torch.dtype
) -> Callable[[], None]:
    """Forward, label-smoothed cross-entropy in float32 and backward, of random tokens; hf: by sdpa.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    torch.manual_seed(1)
    model = TorchSeq2Seq(config, shape.vocab_size) if name == "torch" else _bart(name, shape, config)
    model = model.to(device, dtype).train()
    first = special_tokens(shape).mask + 1
    source_BS, target_BT = (
        torch.randint(first, shape.vocab_size, (shape.samples, tokens), device=device)
        for tokens in (shape.source_tokens, shape.target_tokens)
    )

    def loss() -> Tensor:
        logits_BTV = model(source_BS, target_BT[:, :-1])
        return F.cross_entropy(
            logits_BTV.flatten(0, 1).float(), target_BT[:, 1:].flatten(), label_smoothing=smoothing
        )

    return forward_backward(model, loss)


def _bart(name: str, shape: BenchShape, config: ModelConfig) -> nn.Module:
    try:
        from transformers import BartConfig, BartForConditionalGeneration
    except ImportError as error:
        raise MissingDependencyError(
            f"transformers is not installed ({error})", "--also", "install janus_ds[hf], or leave it out"
        ) from error
    bart = BartForConditionalGeneration._from_config(
        BartConfig(
            vocab_size=shape.vocab_size,
            d_model=config.d_model,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers,
            encoder_attention_heads=config.heads,
            decoder_attention_heads=config.heads,
            encoder_ffn_dim=config.ffn_dim,
            decoder_ffn_dim=config.ffn_dim,
            activation_function=config.activation,
            max_position_embeddings=config.max_source_positions,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            use_cache=False,
        ),
        attn_implementation="eager" if name == "hf_eager" else "sdpa",
    )

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bart = bart

        def forward(self, source_BS: Tensor, given_BT: Tensor) -> Any:
            return self.bart(input_ids=source_BS, decoder_input_ids=given_BT).logits

    return Logits()
