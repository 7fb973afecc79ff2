"""`optimizer` and `scheduler` blocks of a DeepSpeed JSON: allowed where they repeat the recipe.

The trainer builds AdamW and the schedule from the recipe. Files made for other programs often
carry these blocks, so equal values (and "auto") pass; anything else is refused.
"""

from __future__ import annotations

import math
from typing import Any

from janus_ds.config.faults import FaultList, suggestion
from janus_ds.config.schema import RunConfig

__all__ = ["check_optimizer", "check_scheduler"]

_FIX = 'leave the block out, write "auto", or change the recipe'
_SCHEDULER_OF = {"polynomial": "WarmupDecayLR", "constant": "WarmupLR"}


def check_optimizer(block: Any, run: RunConfig, source: str, faults: FaultList) -> None:
    """Refuse an optimizer block that is not the recipe's AdamW."""
    if not isinstance(block, dict):
        return
    kind = block.get("type", "AdamW")
    if str(kind).lower() not in ("adamw", "adam", "auto"):
        what = f"optimizer.type is {kind!r}, but the recipe trains with AdamW"
        faults.add(what, f"{source}: optimizer.type", _FIX)
    optim = run.optim
    expected = {
        "lr": optim.lr,
        "betas": [optim.beta1, optim.beta2],
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        # Decoupled decay and bias correction are what AdamW means; torch_adam is how it is run.
        "adam_w_mode": True,
        "bias_correction": True,
        "torch_adam": True,
    }
    _compare("optimizer", block.get("params"), expected, source, faults)


def check_scheduler(block: Any, run: RunConfig, source: str, faults: FaultList) -> None:
    """Refuse a scheduler block that is not the recipe's schedule."""
    if not isinstance(block, dict):
        return
    kind, schedule = block.get("type", "auto"), run.optim.schedule
    if kind not in ("auto", _SCHEDULER_OF.get(schedule)):
        what = f"scheduler.type is {kind!r}, but the recipe has optim.schedule {schedule!r}"
        faults.add(what, f"{source}: scheduler.type", _FIX)
        return
    expected = {
        "warmup_min_lr": run.optim.warmup_init_lr,
        "warmup_max_lr": run.optim.lr,
        "warmup_num_steps": run.optim.warmup_steps,
        "total_num_steps": run.train.max_steps,
        "warmup_type": "linear",
    }
    _compare("scheduler", block.get("params"), expected, source, faults)


def _compare(name: str, params: Any, expected: dict[str, Any], source: str, faults: FaultList) -> None:
    if params is None or params == "auto":
        return
    if not isinstance(params, dict):
        faults.add(f"{name}.params must be an object", f"{source}: {name}.params", _FIX)
        return
    for key, value in params.items():
        where = f"{source}: {name}.params.{key}"
        if key not in expected:
            faults.add(f"unknown key {key!r} in {name}.params", where, suggestion(key, expected, _FIX))
        elif value != "auto" and not _same(value, expected[key]):
            what = f"{name}.params.{key} is {value!r}, but the recipe says {expected[key]!r}"
            faults.add(what, where, _FIX)


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        pairs = (
            zip(given, expected, strict=True)
            if isinstance(given, list) and len(given) == len(expected)
            else ()
        )
        return isinstance(given, list) and len(given) == len(expected) and all(_same(a, b) for a, b in pairs)
    numbers = isinstance(given, int | float) and isinstance(expected, int | float)
    if numbers and not isinstance(expected, bool):
        return math.isclose(given, expected, rel_tol=1e-9)
    return bool(given == expected)
