"""How a run is executed: the DeepSpeed JSON, solved for this run and this many ranks, and checked.

The recipe says what is trained (global batch, optimizer, schedule, clipping); the JSON says how
(ZeRO stage, offload, precision, micro-batch, buckets). This module writes the values of the recipe
into the dictionary for `deepspeed.initialize`; `deepspeed_file.py` reads and checks the JSON.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from janus_ds.config.deepspeed_file import BATCH_KEYS, SUM_TYPES, DeepSpeedFile
from janus_ds.config.fields import FaultList, shown
from janus_ds.config.load import read_run_config
from janus_ds.config.locations import public_location
from janus_ds.config.modes import trained_modes
from janus_ds.config.schema import ModelConfig, RunConfig
from janus_ds.errors import ConfigError

_NEVER = 10**12
_DEEPEST = 7
"""Levels of modules in a training step; the profiler fails at more."""


@dataclass(frozen=True)
class ExecutionConfig:
    """How a run is executed on this many ranks."""

    engine: dict[str, Any]
    """For `deepspeed.initialize(config=...)`: complete, without "auto"."""
    zero_stage: int
    precision: str
    """fp32, bf16 or fp16."""
    micro_batch: int
    """Samples of a micro-batch on one rank; with batches of tokens, of a validation batch."""
    accumulation: int
    """Micro-batches of a step on one rank."""
    data_size: int
    """Data-parallel ranks."""
    offload: bool
    """Whether the optimizer's states live in host memory."""
    source: str
    """The file, for messages."""
    notes: tuple[str, ...] = ()
    """What is not as it was written: positions that the data needs, overrides without effect."""

    @property
    def further(self) -> dict[str, Any]:
        """Values of `engine` by dotted key, but for those that follow from the fields below it."""
        told = {*BATCH_KEYS, "zero_optimization.stage", "bf16.enabled", "fp16.enabled"}
        told |= {"steps_per_print", "zero_force_ds_cpu_optimizer"}
        return {key: value for key, value in _leaves(self.engine) if key not in told}

    @property
    def advice(self) -> str:
        """Says so where gradients of several micro-batches are added up in 16 bits; else empty."""
        summed = self.engine.get("data_types", {}).get("grad_accum_dtype", self.precision)
        if self.accumulation == 1 or summed in SUM_TYPES["fp32"]:
            return ""
        return (
            f"gradients of {self.accumulation} micro-batches are added up in {self.precision}, which loses "
            f'small ones: set "data_types": {{"grad_accum_dtype": "fp32"}} in {self.source}'
        )


@dataclass(frozen=True)
class TrainOptions:
    """What the command line of a training program says."""

    deepspeed_config: Path
    recipe: Path
    overrides: tuple[str, ...]
    """`section.field=value` each; --data and --init are among them."""
    output: Path | None
    tensor_parallel: int
    mode: str | None = None
    """One of the recipe's `modes`; `overrides` win over its fields."""
    stages: Sequence[Any] = ()
    """Of the data pipeline (`janus_ds.data.stream.pipeline`), such as `webdataset.map(function)`."""


def load_setup(
    recipe: Path | None,
    overrides: Iterable[str],
    deepspeed_config: Path,
    data_size: int,
    tensor_size: int = 1,
    mode: str | None = None,
) -> tuple[RunConfig, ExecutionConfig]:
    """As :func:`read_setup`; then DeepSpeed, whose import takes seconds, judges its values and the device."""
    run, execution = read_setup(recipe, overrides, deepspeed_config, data_size, tensor_size, mode)
    check_on_this_machine(execution)
    return run, replace(execution, notes=(*execution.notes, *_notes_of_device(execution)))


def read_setup(
    recipe: Path | None,
    overrides: Iterable[str],
    deepspeed_config: Path,
    data_size: int,
    tensor_size: int = 1,
    mode: str | None = None,
) -> tuple[RunConfig, ExecutionConfig]:
    """What is trained and how it is executed, from both files.

    Args:
        overrides: `section.field=value` each.
        tensor_size: tensor-parallel ranks that share a copy of the model.

    Raises:
        ConfigError: anything is wrong in either; the message names all faults.
        UsageError: the recipe has no such mode.
    """
    faults = FaultList()
    run = read_run_config(recipe, overrides, faults, mode)
    check_shares(run.model, tensor_size, faults)
    if run.train.monitor != "none" and find_spec(run.train.monitor) is None:
        faults.add(
            f"train.monitor is {run.train.monitor}, which is not installed here",
            f"train.monitor, {sys.executable}",
            f"pip install 'janus_ds[{run.train.monitor}]' there, or leave the field out",
            ["train.monitor"],
        )
    trained = trained_modes(run.objective)
    untrained = [mode for mode in run.train.valid_bleu.split(",") if mode not in (*trained, "none")]
    if untrained:
        faults.add(
            f"the objective {run.objective.preset!r} does not train mode {untrained[0]!r}",
            f"train.valid_bleu: {run.train.valid_bleu}",
            f"set train.valid_bleu to {','.join(trained) or 'none'}",
            ["train.valid_bleu", "objective.preset"],
        )
    # Not a rule of the run itself: older runs that have both can still be read.
    if run.data.valid_path is not None and run.train.valid_bleu != "none":
        faults.add(
            "train.valid_bleu scores the validation text in data.path, but losses would be those of the "
            "samples in data.valid_path",
            f"data.valid_path: {public_location(run.data.valid_path)}, train.valid_bleu: "
            f"{run.train.valid_bleu}",
            "leave data.valid_path out, or set train.valid_bleu to none",
            ["data.valid_path", "train.valid_bleu"],
        )
    if tensor_size > 1:
        _check_compiled(run, f"--tensor-parallel {tensor_size}", faults)
    return run, read_deepspeed_config(deepspeed_config, run, data_size, faults)


def _check_compiled(run: RunConfig, shards: str, faults: FaultList) -> None:
    """Refuse a compiled model whose weights are sharded."""
    if run.train.compile == "model":
        faults.add(
            "train.compile 'model' cannot be used with ZeRO-3 or tensor parallelism, which exchange "
            "weights and activations inside of the model",
            f"train.compile, {shards}",
            "use train.compile head, or ZeRO stage 2 with --tensor-parallel 1",
            ["train.compile"],
        )


def check_shares(model: ModelConfig, tensor_size: int, faults: FaultList) -> None:
    """Refuse a shape that so many tensor-parallel ranks cannot share."""
    for name in ("heads", "ffn_dim", "vocab_multiple"):
        key, value = f"model.{name}", getattr(model, name)
        if value % tensor_size:
            faults.add(
                f"{key} is {value}, which {tensor_size} tensor-parallel ranks cannot share",
                f"--tensor-parallel {tensor_size} with {key}",
                f"choose a size that divides {value}, or another {key}",
                [key],
            )


def read_deepspeed_config(path: Path, run: RunConfig, data_size: int, faults: FaultList) -> ExecutionConfig:
    """The DeepSpeed JSON for a resolved run on `data_size` data-parallel ranks.

    Args:
        data_size: number of data-parallel ranks (all ranks / tensor-parallel size).
        faults: what is wrong with the recipe already; reported together with what is wrong here.
    """
    file = DeepSpeedFile(path, run, faults)
    stage, precision = file.zero_stage(), file.precision()
    if stage == 0 and precision in ("bf16", "fp16"):
        file.refuse(
            "zero_optimization.stage",
            f"ZeRO stage 0 with {precision} trains wrongly: DeepSpeed's 16-bit optimizer makes an extra "
            "step when it is built, and losses drift from the right ones",
            "use stage 1 (the same on one rank), or fp32",
        )
    bucket = file.section("zero_optimization").get("allgather_bucket_size")
    if stage in (1, 2) and isinstance(bucket, int) and bucket % 2:
        key = "zero_optimization.allgather_bucket_size"
        file.refuse(key, f"{key} is {shown(bucket)}, but DeepSpeed needs an even one", "make it even")
    if stage == 3:
        _check_compiled(run, f"{path}: zero_optimization.stage", faults)
    file.check_supported(stage, precision)
    micro_batch, accumulation = file.batch(data_size)
    if not any(key.startswith("optim.") or key == "train.max_steps" for key in faults.spoilt):
        file.check_repeated()
    faults.raise_if_any()
    offload = file.section("zero_optimization").get("offload_optimizer") or {}
    on_host = offload.get("device") not in (None, "none")
    engine = _engine(file.values, run, on_host)
    # DeepSpeed only multiplies these; with batches of tokens there is no number of samples to tell.
    engine["train_micro_batch_size_per_gpu"] = 1 if run.data.batch == "tokens" else micro_batch
    engine["gradient_accumulation_steps"] = accumulation
    engine["train_batch_size"] = engine["train_micro_batch_size_per_gpu"] * accumulation * data_size
    sizes = (micro_batch, accumulation, data_size)
    return ExecutionConfig(engine, stage, precision, *sizes, on_host, str(path), tuple(faults.notes))


def _leaves(values: dict[str, Any], section: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{section}{key}.")
        else:
            yield f"{section}{key}", value


def _engine(values: dict[str, Any], run: RunConfig, on_host: bool) -> dict[str, Any]:
    engine = copy.deepcopy(values)
    # Optimizer and schedule are built from the recipe and handed to DeepSpeed as objects.
    engine.pop("optimizer", None)
    engine.pop("scheduler", None)
    engine["gradient_clipping"] = run.optim.clip_norm
    engine["zero_allow_untested_optimizer"] = True
    if on_host:
        # DeepSpeed's own CPU Adam would be compiled at the first start; torch's AdamW does the same.
        engine["zero_force_ds_cpu_optimizer"] = False
    engine["steps_per_print"] = engine["steps_per_print"] or _NEVER
    return engine


def fast_precision(device: str) -> str | None:
    """bf16 where the device, `cpu` or `cuda`, has products of it, else fp32; None where nothing tells.

    On a CPU these are AMX's or AVX512-BF16's; with the latter all modes were faster (docs/measured.md).
    """
    import torch

    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    # Older versions of torch, and CPUs of other kinds, do not tell.
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if known.get("amx_bf16") or known.get("avx512_bf16"):
        return "bf16"
    return "fp32" if "avx2" in known else None


def _notes_of_device(execution: ExecutionConfig) -> Iterator[str]:
    """Says so where a CPU would train in a precision that it can only imitate."""
    from deepspeed.accelerator import get_accelerator

    if (get_accelerator().device_name(), execution.precision) == ("cpu", "bf16") and (
        fast_precision("cpu") == "fp32"
    ):
        yield (
            "this CPU has no products of bf16 numbers and imitates them, many times slower than fp32: "
            "take ds_configs/zero2.json unless that is what you want"
        )


class _Switches(BaseModel):
    """Plain keys that DeepSpeed takes as they are, and fails or errs over in the midst of a run."""

    model_config = ConfigDict(strict=True)
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False


class _FlopsProfiler(BaseModel):
    """A section of the same kind."""

    model_config = ConfigDict(strict=True)
    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: int = 1
    module_depth: Annotated[int, Field(le=_DEEPEST)] = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


def check_on_this_machine(execution: ExecutionConfig) -> None:
    """Final check: DeepSpeed's own models read its sections, and the device must have the precision.

    Raises:
        ConfigError: a value is of a wrong type or out of range (all of them are named), or the device
            cannot train in bf16 or fp16.
    """
    from deepspeed.accelerator import get_accelerator
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    faults = FaultList()
    models: dict[str, Callable[..., Any]] = {
        "": _Switches,
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "flops_profiler": _FlopsProfiler,
    }
    for section, model in models.items():
        try:
            model(**(execution.engine.get(section, {}) if section else execution.engine))
        except ValidationError as error:
            for item in error.errors():
                key = ".".join([section] * bool(section) + [str(part) for part in item["loc"]])
                what = f"{key} is {shown(item['input'])}: {item['msg']}"
                fix = "give a value that DeepSpeed accepts, or leave the key out"
                faults.add(what, f"{execution.source}: {key}", fix)
    faults.raise_if_any()
    accelerator, precision = get_accelerator(), execution.precision
    can = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if precision in can and not can[precision]():
        others = "zero2_bf16.json or zero2.json" if precision == "fp16" else "zero2.json"
        raise ConfigError(
            f"this machine's device ({accelerator.device_name()}) cannot train in {precision}",
            f"{execution.source}: {precision}.enabled",
            f"use another precision, for example ds_configs/{others}",
        )
