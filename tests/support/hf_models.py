"""Random-weight BART models of transformers, saved as folders, and sources for them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]


@dataclass(frozen=True)
class Shape:
    """What differs between the models of the parity tests."""

    encoder_layers: int = 2
    decoder_layers: int = 2
    d_model: int = 32
    heads: int = 4
    ffn_dim: int = 64
    positions: int = 64
    vocab_size: int = 101
    activation: str = "gelu"
    scale_embedding: bool = False


SHAPES = {
    "small": Shape(),
    "lopsided": Shape(encoder_layers=3, decoder_layers=1, heads=2, ffn_dim=48, vocab_size=96),
    "relu-scaled": Shape(activation="relu", scale_embedding=True, d_model=24, heads=3, vocab_size=77),
    "long": Shape(positions=512, vocab_size=203),
}


def build_bart(shape: Shape, seed: int = 0) -> Any:
    """A `BartForConditionalGeneration` in evaluation mode.

    Weights are larger than at initialisation and depend much on the position, so that its distributions
    are not flat and it does not repeat one token; biases and norms are moved too.
    """
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=shape.vocab_size,
        d_model=shape.d_model,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_ffn_dim=shape.ffn_dim,
        decoder_ffn_dim=shape.ffn_dim,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        max_position_embeddings=shape.positions,
        activation_function=shape.activation,
        scale_embedding=shape.scale_embedding,
    )
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() == 1:
                parameter.normal_(0.0, 0.02)
            elif "embed_positions" in name:
                parameter.normal_(0.0, 2.0)
            elif "layers" in name:
                parameter.normal_(0.0, 0.7 / parameter.shape[1] ** 0.5)
            else:
                parameter.normal_(0.0, 0.25)
        # So that hypotheses end at various lengths.
        model.model.shared.weight[2] *= 1.35
    model.generation_config.forced_bos_token_id = 0
    return model


def padded_sources(vocab_size: int, lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Sources with bos, eos and padding (1), and their mask; inner tokens are no special symbols."""
    torch.manual_seed(seed)
    source = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(source, lengths, strict=True):
        row[0], row[length - 1] = 0, 2
        row[1 : length - 1] = torch.randint(4, vocab_size - 1, (length - 2,))
    return source, (source != 1).long()


def letters_tokenizer(folder: Path, vocab_size: int) -> Path:
    """`vocab.json` and `merges.txt` of a byte-level BPE of letters with ids as BART has them."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = [(a, b) for a in LETTERS for b in LETTERS]
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS, "Ġ", "Ċ", "."]
    merged = [a + b for a, b in pairs][: vocab_size - len(symbols) - 1]
    symbols += [*merged, "<mask>"]
    (folder / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    lines = [f"{m[0]} {m[1]}" for m in merged]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    return folder
