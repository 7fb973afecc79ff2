"""DeepSpeed files written, read and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from janus_ds.config.deepspeed import ExecutionConfig, check_on_this_machine, read_deepspeed_config
from janus_ds.config.fields import ConfigFaultsError, FaultList
from janus_ds.config.load import load_run_config
from janus_ds.config.schema import RunConfig

RUN = load_run_config(None, ["train.global_batch=48", "data.block_tokens=62"])


def write_engine(folder: Path, **values: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, **values}), encoding="utf-8")
    return path


def load_engine(folder: Path, data_size: int = 2, run: RunConfig = RUN, **values: Any) -> ExecutionConfig:
    execution = read_deepspeed_config(write_engine(folder, **values), run, data_size, FaultList())
    check_on_this_machine(execution)
    return execution


def engine_fault(folder: Path, data_size: int = 2, **values: Any) -> str:
    with pytest.raises(ConfigFaultsError) as caught:
        load_engine(folder, data_size, **values)
    assert caught.value.exit_code == 3
    assert len(caught.value.faults) == 1, caught.value
    return str(caught.value)
