"""The owner of the DeepSpeed JSON: how a run is executed, and that it contradicts nothing.

The recipe says what is trained (global batch, optimizer, schedule, clipping); the JSON says how
(ZeRO stage, offload, precision, micro-batch, buckets). This module solves
`global batch = micro-batch x accumulation x data-parallel ranks`, writes the values of the recipe
into the dictionary for `deepspeed.initialize`, and refuses every key that DeepSpeed would ignore.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ds.config.batch_size import solve_batch
from janus_ds.config.deepspeed_keys import KNOWN, REFUSED, SECTIONS
from janus_ds.config.engine_check import check_device, check_values_with_deepspeed
from janus_ds.config.faults import FaultList, suggestion
from janus_ds.config.optimizer_block import check_optimizer, check_scheduler
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError

__all__ = ["ExecutionConfig", "load_deepspeed_config", "read_deepspeed_config"]

_NEVER = 10**12


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


def load_deepspeed_config(path: Path, run: RunConfig, data_size: int) -> ExecutionConfig:
    """The DeepSpeed JSON for a run on `data_size` data-parallel ranks.

    Args:
        path: the JSON file.
        run: what is trained, resolved.
        data_size: number of data-parallel ranks (all ranks / tensor-parallel size).

    Raises:
        ConfigError: anything is wrong; the message names all faults. Whether the device has the
            precision asked for is looked at last, since it takes importing DeepSpeed.
    """
    faults = FaultList()
    execution = read_deepspeed_config(path, run, data_size, faults)
    faults.raise_if_any()
    if execution is None:
        raise ConfigError(
            "the DeepSpeed configuration cannot be used", str(path), "report this: no fault was found"
        )
    check_values_with_deepspeed(execution.engine, execution.source)
    check_device(execution)
    return execution


def read_deepspeed_config(
    path: Path, run: RunConfig, data_size: int, faults: FaultList
) -> ExecutionConfig | None:
    """As :func:`load_deepspeed_config`, but faults are only collected and no device is asked.

    Returns:
        None if anything in the file is at fault.
    """
    before = len(faults.faults)
    config = _read_json(path, faults)
    if config is None:
        return None
    source = str(path)
    _check_keys(config, source, faults)
    if len(faults.faults) > before:
        _drop_unreadable(config)
    stage, precision = _zero_stage(config, source, faults), _precision(config, source, faults)
    if stage == 0 and precision in ("bf16", "fp16"):
        faults.add(
            f"ZeRO stage 0 with {precision} trains wrongly: DeepSpeed's 16-bit optimizer makes an extra "
            "step when it is built, and losses drift from the right ones",
            f"{source}: zero_optimization.stage",
            "use stage 1 (the same on one rank), or fp32",
        )
    _check_guards(config, source, faults)
    batch = solve_batch(config, run, data_size, source, faults)
    if not any(key.startswith("optim.") or key == "train.max_steps" for key in faults.spoilt):
        check_optimizer(config.get("optimizer"), run, source, faults)
        check_scheduler(config.get("scheduler"), run, source, faults)
        _check_clipping(config, run, source, faults)
    if len(faults.faults) > before or batch is None:
        return None
    offload = _offload_device(config) not in (None, "none")
    engine = _engine_dict(config, run, offload)
    # DeepSpeed only multiplies these; with batches of tokens there is no number of samples to tell.
    engine["train_micro_batch_size_per_gpu"] = 1 if run.data.batch == "tokens" else batch[0]
    engine["gradient_accumulation_steps"] = batch[1]
    engine["train_batch_size"] = engine["train_micro_batch_size_per_gpu"] * batch[1] * data_size
    return ExecutionConfig(engine, stage, precision, batch[0], batch[1], data_size, offload, source)


def _read_json(path: Path, faults: FaultList) -> dict[str, Any] | None:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in dict.fromkeys(n for n in names if names.count(n) > 1):
            faults.add(f"the key {name!r} is given twice", f"{path}: {name}", "keep one of them")
        return dict(pairs)

    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=mapping)
    except OSError as error:
        names = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
        fix = suggestion(path.name, names, "give the path of a file such as ds_configs/zero2.json")
        faults.add(f"the DeepSpeed configuration cannot be read: {error.strerror}", str(path), fix)
        return None
    except json.JSONDecodeError as error:
        where = f"{path}:{error.lineno}"
        faults.add(f"the DeepSpeed configuration is not valid JSON: {error.msg}", where, "mend that line")
        return None
    except UnicodeDecodeError as error:
        faults.add(
            f"the DeepSpeed configuration is not UTF-8 text: {error.reason}", str(path), "save it as UTF-8"
        )
        return None
    if not isinstance(config, dict):
        faults.add("the DeepSpeed configuration is not a JSON object", str(path), "start it with {")
        return None
    return config


def _check_keys(config: dict[str, Any], source: str, faults: FaultList) -> None:
    for key in config:
        if key in REFUSED:
            faults.add(f"the key {key!r} of DeepSpeed is not used here", f"{source}: {key}", REFUSED[key])
        elif key not in KNOWN:
            fix = suggestion(key, KNOWN, "see ds_configs/README.md for the keys that may be used")
            faults.add(f"unknown key {key!r}", f"{source}: {key}", fix)
    for section, keys in SECTIONS.items():
        values: Any = config
        for name in section.split("."):
            values = values.get(name) if isinstance(values, dict) else None
        if values is None:
            continue
        if not isinstance(values, dict):
            faults.add(f"{section} must be an object", f"{source}: {section}", f'write "{section}": {{...}}')
            continue
        for key in values:
            if key not in keys:
                fix = suggestion(key, keys, f"{section} has the keys {', '.join(keys)}")
                faults.add(f"unknown key {key!r} in {section}", f"{source}: {section}.{key}", fix)


def _drop_unreadable(config: dict[str, Any]) -> None:
    # Sections that are no objects have been reported; later checks need not meet them again.
    for section in SECTIONS:
        if "." not in section and not isinstance(config.get(section, {}), dict):
            del config[section]


def _zero_stage(config: dict[str, Any], source: str, faults: FaultList) -> int:
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is int and 0 <= stage <= 3:
        return stage
    faults.add(f"there is no ZeRO stage {stage!r}", f"{source}: zero_optimization.stage", "use 0, 1, 2 or 3")
    return 1


def _precision(config: dict[str, Any], source: str, faults: FaultList) -> str:
    on = []
    for name in ("bf16", "fp16"):
        enabled = config.get(name, {}).get("enabled", False)
        if not isinstance(enabled, bool):
            where = f"{source}: {name}.enabled"
            faults.add(f"{name}.enabled must be true or false, not {enabled!r}", where, "write true or false")
        elif enabled:
            on.append(name)
    if len(on) == 2:
        fix = "switch one of them off; bf16 needs no loss scale"
        faults.add("bf16 and fp16 are both switched on", f"{source}: bf16.enabled, fp16.enabled", fix)
    return on[0] if on else "fp32"


def _check_guards(config: dict[str, Any], source: str, faults: FaultList) -> None:
    for section, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        values = config.get(section)
        if isinstance(values, dict) and values.get(key, True) is not True:
            faults.add(
                f"{section}.{key} is off: a gradient that is not finite would go into the weights unseen",
                f"{source}: {section}.{key}",
                "leave it out, or write true",
            )


def _check_clipping(config: dict[str, Any], run: RunConfig, source: str, faults: FaultList) -> None:
    given = config.get("gradient_clipping", "auto")
    if given != "auto" and given != run.optim.clip_norm:
        faults.add(
            f"gradient_clipping is {given!r}, but the recipe has optim.clip_norm {run.optim.clip_norm}",
            f"{source}: gradient_clipping",
            'write "auto", or set optim.clip_norm in the recipe',
        )


def _offload_device(config: dict[str, Any]) -> Any:
    offload = config.get("zero_optimization", {}).get("offload_optimizer")
    return offload.get("device") if isinstance(offload, dict) else None


def _engine_dict(config: dict[str, Any], run: RunConfig, offload: bool) -> dict[str, Any]:
    engine = copy.deepcopy(config)
    # Optimizer and schedule are built from the recipe and handed to DeepSpeed as objects.
    engine.pop("optimizer", None)
    engine.pop("scheduler", None)
    engine["gradient_clipping"] = run.optim.clip_norm
    engine["zero_allow_untested_optimizer"] = True
    if offload:
        # DeepSpeed's own CPU Adam would be compiled at the first start; torch's AdamW does the same.
        engine["zero_force_ds_cpu_optimizer"] = False
    engine.setdefault("steps_per_print", _NEVER)
    return engine
