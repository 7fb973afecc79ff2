"""Options of every program that decodes: how the model is executed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from janus_ds.errors import MissingDependencyError

if TYPE_CHECKING:
    from janus_ds.model.inference import InferenceOptions

__all__ = ["BOTH_WAYS", "add_both_ways_arguments", "add_inference_arguments", "inference_options"]

_DTYPES = ("fp32", "bf16", "float64")


def add_inference_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--dtype`, `--int8` and `--compile`."""
    add = parser.add_argument
    add("--dtype", choices=_DTYPES, default="fp32", help="precision of decoding (default: fp32)")
    add("--int8", action="store_true", help="int8 weights and activations in linear layers (CPU)")
    add("--compile", action="store_true", help="layers by torch.compile (for GPUs; a CPU is faster without)")


BOTH_WAYS: dict[str, tuple[type, str]] = {
    "rescore": (str, "NAR: ar lets AR score the candidates with the same weights"),
    "rescore_weight": (float, "NAR, rescored: weight of AR's score, NAR's gets the rest"),
    "rescore_samples": (
        int,
        "NAR, rescored: samples of each candidate where NAR is not sure, scored as well",
    ),
    "draft_width": (int, "draft: drafts of a sentence that are checked at once"),
    "temperature": (float, "draft: above 0, exact samples of AR's distribution"),
}
"""Options of decoding both ways at once: fields of `DecodeConfig`, their type and help."""


def add_both_ways_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add an option for each field of :data:`BOTH_WAYS`."""
    for name, (kind, text) in BOTH_WAYS.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=kind, help=f"{text} (default: as the run's recipe says)")


def inference_options(parsed: argparse.Namespace) -> InferenceOptions:
    """What was chosen.

    Raises:
        MissingDependencyError: there is no compiler for the device.
    """
    import torch

    from janus_ds.model.inference import InferenceOptions
    from janus_ds.objective.compiled_chunk import compiler_is_at_hand

    chosen = getattr(parsed, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    if parsed.compile and not compiler_is_at_hand(torch.device(chosen)):
        raise MissingDependencyError(
            f"torch.compile finds no compiler for {chosen}",
            "--compile",
            "install g++ (CPU) or triton (GPU), or leave --compile out",
        )
    return InferenceOptions(parsed.dtype, parsed.int8, parsed.compile)
