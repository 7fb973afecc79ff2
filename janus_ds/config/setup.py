"""Recipe and DeepSpeed JSON together, so that the faults of both come in one message."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from janus_ds.config.deepspeed import ExecutionConfig, read_deepspeed_config
from janus_ds.config.engine_check import check_device, check_values_with_deepspeed
from janus_ds.config.faults import FaultList
from janus_ds.config.load import read_run_config
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError

__all__ = ["load_setup", "read_setup"]


def load_setup(
    recipe: Path | None,
    overrides: Iterable[str],
    deepspeed_config: Path,
    data_size: int,
    tensor_size: int = 1,
) -> tuple[RunConfig, ExecutionConfig]:
    """What is trained and how it is executed, from both files.

    Args:
        recipe: YAML file; None takes the defaults of the schema.
        overrides: `section.field=value` each.
        deepspeed_config: the DeepSpeed JSON.
        data_size: number of data-parallel ranks.
        tensor_size: tensor-parallel ranks that share a copy of the model.

    Raises:
        ConfigError: anything is wrong in either; the message names all faults.
    """
    run, execution = read_setup(recipe, overrides, deepspeed_config, data_size, tensor_size)
    check_values_with_deepspeed(execution.engine, execution.source)
    check_device(execution)
    return run, execution


def read_setup(
    recipe: Path | None,
    overrides: Iterable[str],
    deepspeed_config: Path,
    data_size: int,
    tensor_size: int = 1,
) -> tuple[RunConfig, ExecutionConfig]:
    """As :func:`load_setup`, without what takes importing DeepSpeed."""
    faults = FaultList()
    run = read_run_config(recipe, overrides, faults)
    _check_tensor_parallel(run, tensor_size, faults)
    execution = read_deepspeed_config(deepspeed_config, run, data_size, faults)
    faults.raise_if_any()
    if execution is None:
        raise ConfigError(
            "the DeepSpeed configuration cannot be used",
            str(deepspeed_config),
            "report this: no fault was found",
        )
    return run, execution


def _check_tensor_parallel(run: RunConfig, tensor_size: int, faults: FaultList) -> None:
    keys = {"model.heads": run.model.heads, "model.ffn_dim": run.model.ffn_dim}
    keys["model.vocab_multiple"] = run.model.vocab_multiple
    for key, value in keys.items():
        if value % tensor_size:
            faults.add(
                f"{key} is {value}, which {tensor_size} tensor-parallel ranks cannot share",
                f"--tensor-parallel {tensor_size} with {key}",
                f"choose a size that divides {value}, or another {key}",
                [key],
            )
