"""Options of every program that decodes: how the model is executed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from janus_ds.model.inference import InferenceOptions

__all__ = ["add_inference_arguments", "inference_options"]

_DTYPES = ("fp32", "bf16", "float64")


def add_inference_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--dtype` and `--int8`."""
    add = parser.add_argument
    add("--dtype", choices=_DTYPES, default="fp32", help="precision of decoding (default: fp32)")
    add("--int8", action="store_true", help="int8 weights and activations in linear layers (CPU)")


def inference_options(parsed: argparse.Namespace) -> InferenceOptions:
    """What was chosen."""
    from janus_ds.model.inference import InferenceOptions

    return InferenceOptions(parsed.dtype, parsed.int8)
