"""What the released code computed with its own weights, and these weights as a fairseq file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FIXTURE: dict[str, Any] = torch.load(
    Path(__file__).parents[1] / "fixtures" / "janus_tiny_fixture.pt", weights_only=True
)
"""state_dict, config, src_tokens, target, nar_input, and `expect`: logits, losses, decodes."""


def save_fairseq(path: Path, state: dict[str, Tensor], heads: int | None = None, **args: object) -> Path:
    """Write a file as fairseq does; returns its path."""
    if heads is not None:
        args |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads}
    torch.save({"model": state, "args": argparse.Namespace(**args)}, path)
    return path


def released_file(folder: Path) -> Path:
    """The released code's weights."""
    config = FIXTURE["config"]
    state, activation = FIXTURE["state_dict"], config["activation"]
    return save_fairseq(folder / "model.pt", state, config["heads"], activation_fn=activation)
