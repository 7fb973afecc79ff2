"""A model for decoding: whole weights of a `weights.safetensors`, on one device, in evaluation mode.

:func:`prepare_for_inference` then fits it to the device: precision, packed or int8 weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError, ConfigError
from janus_ds.model.decoding.cpu_kernels import prepare
from janus_ds.model.decoding.native_step import compiled
from janus_ds.model.janus import JanusModel
from janus_ds.model.transformer import EncoderLayer, TransformerLayer
from janus_ds.model.weights import check_shapes, load_weights
from janus_ds.parallel.tensor_parallel import ParallelLayers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}
"""Precisions of decoding by the names of `--dtype`."""


@dataclass(frozen=True)
class InferenceOptions:
    """How a model is executed in decoding; what it computes stays the same but for rounding.

    Attributes:
        dtype: fp32, bf16, float64 (exact, for comparisons), or auto: :func:`fast_precision` of the device.
        int8: linear layers on int8 weights and activations (CPU, fp32 otherwise).
        compiled: encoder layers and feed-forward blocks by torch.compile, for any shapes, instead of
            packed weights. Meant for GPUs: on a CPU packed weights were twice as fast.
    """

    dtype: str = "fp32"
    int8: bool = False
    compiled: bool = False


def fast_precision(device: str) -> str:
    """bf16 where the device, `cpu` or `cuda`, has products of it, else fp32.

    On a CPU these are AMX's or AVX512-BF16's; with the latter all modes were faster (docs/measured.md).
    """
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Older versions of torch do not tell.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if known.get("amx_bf16") or known.get("avx512_bf16") else "fp32"


def prepare_for_inference(model: JanusModel, options: InferenceOptions | None = None) -> JanusModel:
    """Fit a model to its device, in place; it can no longer be trained.

    Args:
        model: whole, on its device.
        options: None: float32 with packed weights.

    Raises:
        ConfigError: a precision that does not exist, int8 where it cannot be had or with compilation.
    """
    options = options or InferenceOptions()
    device = next(model.parameters()).device.type
    if options.dtype == "auto":
        options = replace(options, dtype="fp32" if options.int8 else fast_precision(device))
    if options.dtype not in DTYPES:
        raise ConfigError(
            f"there is no precision {options.dtype!r}", "--dtype", f"use one of auto, {', '.join(DTYPES)}"
        )
    model.to(DTYPES[options.dtype])
    if options.int8 and (options.dtype != "fp32" or device != "cpu" or compiled() is None):
        raise ConfigError(
            "int8 needs fp32 beside it, a CPU, and a C++ compiler for its kernels",
            f"--int8 with --dtype {options.dtype} on {device}",
            "leave --int8 out, or install g++ and decode with --device cpu --dtype fp32",
        )
    if options.int8 and options.compiled:
        raise ConfigError(
            "int8 products are made already: there is nothing to compile", "--int8 --compile", "leave one out"
        )
    model.requires_grad_(False)
    if options.compiled:
        _compile_layers(model)
    elif device == "cpu":
        prepare(model, options.int8)
    return model


def _compile_layers(model: JanusModel) -> None:
    """Compile what has tensors alone as inputs. All layers of a kind share their code."""
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            name = "forward" if isinstance(module, EncoderLayer) else "feed_forward"
            setattr(module, name, torch.compile(getattr(module, name), dynamic=True))


def model_from_file(
    config: ModelConfig, special: SpecialTokens, path: Path, device: torch.device | str = "cpu"
) -> JanusModel:
    """Build a model of a shape and fill it from a file.

    Args:
        path: a safetensors file with whole matrices under our names.

    Raises:
        CheckpointError: the file cannot be read, is of another shape, or holds values that are not finite.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_shapes(shapes, config, special.vocab_size, str(path))
        weights = load_file(str(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the weights cannot be read ({error})", str(path), "take another checkpoint of the run"
        ) from error
    broken = [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise CheckpointError(
            f"{len(broken)} weights are not finite, first {broken[0]}: training had diverged",
            str(path),
            "take an earlier checkpoint of the run",
        )
    model = JanusModel(config, special, ParallelLayers())
    load_weights(model, weights, str(path))
    return model.to(device).eval()
