"""Run folders as decoding reads them: `run.json`, `tokenizer/` and `weights.safetensors`, nothing else.

A run folder of training holds its weights in `checkpoints/step-NNNNNNNN/`, a converted one beside its
`run.json`; either the folder or one of its checkpoints may be named. The names "demo" and "denoiser" mean
models that the package ships, unless there is a folder of that name.

:func:`prepare_for_inference` then fits the model to its device: precision, packed or int8 weights.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from janus_ds.batch import SpecialTokens
from janus_ds.checkpoint.manifest import weights_in
from janus_ds.config.deepspeed import fast_precision
from janus_ds.config.load import from_dict
from janus_ds.config.locations import model_path
from janus_ds.config.modes import with_decode
from janus_ds.config.schema import RUN_FILE, RUN_FORMAT_VERSION, ModelConfig, RunConfig
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.decode.text import DICT_NAME, FairseqWords, IdText, TextCodec
from janus_ds.errors import CheckpointError, ConfigError, UsageError
from janus_ds.io import read_json, sha256_of_file
from janus_ds.model.decoding.cpu_kernels import prepare
from janus_ds.model.decoding.native_step import compiled
from janus_ds.model.janus import JanusModel
from janus_ds.model.transformer import EncoderLayer, TransformerLayer
from janus_ds.model.weights import check_shapes, load_weights, readable
from janus_ds.parallel.tensor_parallel import ParallelLayers

_SMALL_WIDTH = 512
"""Below it, threads wait for each other longer than they work; OMP_NUM_THREADS, if set, decides instead."""

_KEYS = ("recipe", "special_tokens", "tokenizer_fingerprint")


@dataclass(frozen=True)
class LoadedRun:
    """A checkpoint ready for decoding.

    Attributes:
        text: the run's tokenizer; None where it has none.
        config: the run as it was trained, presets written out, with decoding options applied.
    """

    model: JanusModel
    text: TextCodec | None
    special: SpecialTokens
    config: RunConfig
    folder: Path
    weights: Path

    @cached_property
    def weights_sha256(self) -> str:
        """Of the file of weights, by which scores tell whose they are."""
        return sha256_of_file(self.weights)

    def codec(self, ids: bool = False) -> TextCodec:
        """The run's tokenizer; with `ids`, texts are token ids written as numbers.

        Raises:
            CheckpointError: it has none.
        """
        text = IdText(self.special) if ids else self.text
        if text is None:
            fix = "convert it again with its tokenizer (--dict or --tokenizer), or decode token ids (--ids)"
            raise CheckpointError("the run has no tokenizer", str(self.folder), fix)
        return text


def load_run(
    path: str | Path, decode: Mapping[str, Any] | None = None, device: torch.device | str | None = "cpu"
) -> LoadedRun:
    """Load a run folder or one of its checkpoints.

    Args:
        path: RUN, RUN/checkpoints/step-NNNNNNNN, "demo" or "denoiser".
        decode: fields of `DecodeConfig` that replace the run's own.
        device: where the model is wanted; None: see :func:`usable_device`.

    Raises:
        CheckpointError: nothing is there, something is damaged or of a newer format, or parts of the
            folder belong to different runs.
        ConfigError: a decoding option that does not exist or cannot have its value.
        UsageError: there is no such device.
    """
    device = usable_device(device)
    folder, weights = find_run(Path(path))
    record = _read_record(folder / RUN_FILE)
    config = from_dict(record["recipe"], str(folder / RUN_FILE))
    special = _special_tokens(record["special_tokens"], str(folder / RUN_FILE))
    config = with_decode(config, decode or {})
    text = _load_text(folder / "tokenizer", special, record["tokenizer_fingerprint"])
    if device.type == "cpu":
        _fit_threads(config.model.d_model)
    model = model_from_file(config.model, special, weights, device)
    return LoadedRun(model, text, special, config, folder, weights)


_threads_before: list[int] = []
"""torch's number of threads where a small model has set it to 1."""


def _fit_threads(width: int) -> None:
    """One thread for a model of small width; for another one after it, as many as before."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    if width >= _SMALL_WIDTH and _threads_before:
        torch.set_num_threads(_threads_before.pop())
    elif width < _SMALL_WIDTH and torch.get_num_threads() > 1:
        _threads_before[:] = [torch.get_num_threads()]
        torch.set_num_threads(1)


def usable_device(name: torch.device | str | None) -> torch.device:
    """The device of this name; for None the first GPU, or else the CPU.

    Raises:
        UsageError: this machine, or this build of torch, has none.
    """
    try:
        device = torch.empty(0, device=name or ("cuda" if torch.cuda.is_available() else "cpu")).device
        if device.type != "meta":
            return device
        reason = "it holds no values"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    fix = "leave the option out, or give cpu"
    raise UsageError(f"there is no device {str(name)!r} ({reason})", "--device", fix)


def find_run(path: Path) -> tuple[Path, Path]:
    """The run folder and the weights file that a path means; a run's newest checkpoint is taken.

    Raises:
        CheckpointError: there is no run, no weights, or the weights are damaged.
    """
    path = model_path(path)
    if not path.is_dir():
        raise CheckpointError(
            "there is no such run folder or checkpoint",
            str(path),
            "give a folder with a run.json, such as runs/quickstart, or one of its checkpoints",
        )
    # A link may be the checkpoint's name, or the place of all checkpoints on another disk.
    above = [place.parent.parent for place in (path.absolute(), path.resolve())]
    folder = next((place for place in (path, *above) if (place / RUN_FILE).is_file()), None)
    if folder is None:
        raise CheckpointError(
            "the folder holds no run.json",
            str(path),
            "give a run folder, or RUN/checkpoints/step-NNNNNNNN inside of one",
        )
    weights = weights_in(path)
    if weights is not None:
        return folder, weights
    raise CheckpointError(
        "the run has no checkpoint yet",
        str(path),
        "wait for its first checkpoint (train.save_every), or give another run",
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path)
        version = int(record["format_version"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"run.json cannot be read ({type(error).__name__}: {error})",
            str(path),
            "restore the file, or take another run",
        ) from error
    if version > RUN_FORMAT_VERSION:
        raise CheckpointError(
            f"the run was written in format {version}; this version reads up to {RUN_FORMAT_VERSION}",
            str(path),
            "use the version of janus_ds that wrote it (see `versions` in run.json), or a newer one",
        )
    missing = [key for key in _KEYS if key not in record]
    if missing:
        raise CheckpointError(
            f"run.json lacks {', '.join(missing)}", str(path), "restore the file, or take another run"
        )
    return record


def _special_tokens(values: Any, where: str) -> SpecialTokens:
    """The special symbols of a record.

    Raises:
        CheckpointError: ids that are missing, no numbers, or beyond the vocabulary.
    """
    names = {field.name for field in fields(SpecialTokens)}
    is_whole = isinstance(values, dict) and all(type(value) is int for value in values.values())
    if is_whole and values.keys() == names:
        special = SpecialTokens(**values)
        if all(0 <= value < special.vocab_size for name, value in values.items() if name != "vocab_size"):
            return special
    raise CheckpointError(
        f"special_tokens does not hold {', '.join(sorted(names))}, with ids below vocab_size",
        where,
        "restore the file, or take another run",
    )


def _load_text(folder: Path, special: SpecialTokens, fingerprint: str) -> TextCodec | None:
    if not folder.is_dir():
        return None
    words = folder / DICT_NAME
    tokenizer = FairseqWords(words, special) if words.is_file() else load_tokenizer(folder)
    if tokenizer.fingerprint != fingerprint:
        raise CheckpointError(
            "the tokenizer is not the one that the run was trained with",
            str(folder),
            "restore the run's own tokenizer folder",
        )
    return tokenizer


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

    def of_modes(self, modes: Collection[str]) -> InferenceOptions:
        """The same for these modes: where there are drafts, `auto` is fp32.

        Whether a token comes from a check or from AR depends on times; in bf16 their sums differ too often.
        """
        drafts = self.dtype == "auto" and "draft" in modes
        return replace(self, dtype="fp32") if drafts else self


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
        options = replace(options, dtype="fp32" if options.int8 else fast_precision(device) or "fp32")
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
    with readable(path, "weights"):
        with safe_open(str(path), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_shapes(shapes, config, special.vocab_size, str(path))
        weights = load_file(str(path))
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
