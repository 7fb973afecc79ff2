"""Recipes for several ways of training one task: the section `modes`.

    modes:
      ar:
        objective: {preset: ar}
        optim: {lr: 3.0e-5, warmup_steps: 200}

The fields below `modes.ar` stand instead of the recipe's own where mode `ar` is asked for
(`launch/finetune.py --mode ar`); without a mode the section counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from janus_ds.errors import ConfigError, UsageError

__all__ = ["MODES_KEY", "mode_overrides"]

MODES_KEY = "modes"


def mode_overrides(recipe: Path, mode: str) -> list[str]:
    """What a recipe sets for one mode, as `section.field=value` each; to be put before other overrides.

    Raises:
        ConfigError: the recipe cannot be read, or its section is no mapping of modes.
        UsageError: the recipe has no such mode.
    """
    try:
        values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the recipe cannot be read: {error}", str(recipe), "give the path of a recipe"
        ) from None
    modes = (values or {}).get(MODES_KEY) if isinstance(values, dict | None) else None
    if modes is None:
        raise UsageError(
            "the recipe has no modes",
            str(recipe),
            "leave --mode out, or give one of launch/recipes/glge_*.yaml",
        )
    if not isinstance(modes, dict) or not all(isinstance(m, dict | None) for m in modes.values()):
        raise ConfigError(
            "the section is no mapping of modes to fields", f"{recipe}: {MODES_KEY}", "see glge_xsum.yaml"
        )
    if mode not in modes:
        raise UsageError(f"the recipe has no mode {mode!r}", f"{recipe}", f"use {', '.join(modes)}")
    return [f"{key}={value}" for key, value in _fields(modes[mode] or {}, "")]


def _fields(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            # As YAML writes it: repr(3e-5) would be read as text.
            yield f"{prefix}{name}", yaml.safe_dump(value).splitlines()[0]
