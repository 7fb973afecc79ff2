"""The last look at an execution: DeepSpeed's own opinion of the values, and what the device can do.

It needs DeepSpeed imported (seconds), so it comes after everything that can be known without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from janus_ds.config.faults import FaultList
from janus_ds.errors import ConfigError

if TYPE_CHECKING:
    from janus_ds.config.deepspeed import ExecutionConfig

__all__ = ["check_device", "check_values_with_deepspeed"]


def check_values_with_deepspeed(engine: dict[str, Any], source: str) -> None:
    """Let DeepSpeed's own models read the sections, for types and ranges of their values.

    Raises:
        ConfigError: a value is of a wrong type or out of range; all of them are named.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    faults = FaultList()
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
    }
    for section, model in models.items():
        try:
            model(**engine.get(section, {}))
        except ValidationError as error:
            for item in error.errors():
                key = ".".join([section, *(str(part) for part in item["loc"])])
                what = f"{key} is {item['input']!r}: {item['msg']}"
                faults.add(
                    what, f"{source}: {key}", "give a value that DeepSpeed accepts, or leave the key out"
                )
    faults.raise_if_any()


def check_device(execution: ExecutionConfig) -> None:
    """Refuse a precision that the accelerator of this machine does not have.

    Raises:
        ConfigError: the device cannot train in bf16 or fp16.
    """
    if execution.precision == "fp32":
        return
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    asked = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if not asked[execution.precision]():
        others = "zero2_bf16.json or zero2.json" if execution.precision == "fp16" else "zero2.json"
        raise ConfigError(
            f"this machine's device ({accelerator.device_name()}) cannot train in {execution.precision}",
            f"{execution.source}: {execution.precision}.enabled",
            f"use another precision, for example ds_configs/{others}",
        )
