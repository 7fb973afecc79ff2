"""Recipes: YAML and dotted overrides in, a checked :class:`RunConfig` out; and back, for run records.

All faults are reported together: unknown keys (with the nearest known one), values of a wrong type,
values out of range, and values that contradict each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from janus_ds.config.faults import FaultList
from janus_ds.config.locations import SECRET_KEYS, public_location
from janus_ds.config.presets import MODEL_PRESETS, follow_data, follow_init, resolve
from janus_ds.config.recipe import Given, flatten, read_override, read_recipe
from janus_ds.config.rules import check_name, check_run, without_effect
from janus_ds.config.schema import FIELDS, SECTIONS, RunConfig


def load_run_config(recipe: Path | None, overrides: Iterable[str] = (), mode: str | None = None) -> RunConfig:
    """The run that a recipe and overrides describe, with every preset written out.

    Args:
        recipe: YAML file; None takes the defaults of the schema.
        overrides: `section.field=value` each; the value is read as YAML. Later ones win.
        mode: a name below the recipe's section `modes`, whose fields win over the recipe's own.

    Raises:
        ConfigError: anything is wrong; the message names all faults.
        UsageError: the recipe has no such mode.
    """
    faults = FaultList()
    run = read_run_config(recipe, overrides, faults, mode)
    faults.raise_if_any()
    return run


def read_run_config(
    recipe: Path | None, overrides: Iterable[str], faults: FaultList, mode: str | None = None
) -> RunConfig:
    """As :func:`load_run_config`, but faults are only collected: for reports over several files.

    Where a value cannot be read, the run that is returned has the default in its place.
    """
    given: dict[str, Given] = {}
    if recipe is not None:
        given |= read_recipe(recipe, mode, faults)
    for override in overrides:
        given |= read_override(override, faults)
    run, where = _build(given, str(recipe) if recipe else "the defaults", faults)
    check_name(run.name, where, faults)
    return run


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The run as nested plain values, for run.json; secrets of addresses are left out."""
    values = asdict(run)
    for section, name in (key.split(".") for key in SECRET_KEYS):
        if values[section][name] is not None:
            values[section][name] = public_location(values[section][name])
    return values


def from_dict(values: Mapping[str, Any], origin: str = "run.json") -> RunConfig:
    """The run that :func:`to_dict` wrote, by this version or an earlier one.

    Raises:
        ConfigError: it holds anything that this version does not know or allow.
    """
    faults = FaultList()
    if not isinstance(values, Mapping):
        faults.add("the recipe in it is not a mapping of sections", origin, "restore the file")
        values = {}
    plain = dict(values)
    if isinstance(plain.get("data"), dict):
        # Packed rows (retired) gave the results of padded ones.
        plain["data"] = {name: value for name, value in plain["data"].items() if name != "pack_rows"}
    run, _ = _build(flatten(plain, origin, faults), origin, faults)
    faults.raise_if_any()
    return run


_NOT_TRAINED = """
    name model.preset data.path data.valid_path data.block_tokens data.workers data.prefetch_steps
    data.pad_multiple data.cache_dir data.cache_gb data.read_ahead data.retries
    data.stall_seconds data.on_damage data.max_damage train.log_every train.monitor train.valid_every
    train.valid_samples train.save_every train.keep_last train.keep_every train.max_failed_saves
    train.valid_bleu train.valid_bleu_samples train.valid_task train.valid_bleu_iterations train.keep_best
    train.patience train.time_limit train.stall_minutes train.sample_every train.max_bad_steps
    train.max_overflows train.spike_action train.spike_factor train.spike_window
    train.activation_checkpointing train.attention_backend train.compile
"""
"""Fields that may change between two starts of a run without changing what it learns."""


def changed_training(saved: RunConfig, now: RunConfig) -> list[str]:
    """Fields that differ in what is trained; empty for two starts of one run, on any number of ranks.

    Left out are how often things are logged, saved and validated, where the data lies and how long its
    blocks are (its own manifest identifies it) and how text is decoded; `train.max_steps` counts only where
    the learning rate depends on it, so that other runs can be made longer.
    """
    left_out = _NOT_TRAINED.split()
    if "polynomial" not in (saved.optim.schedule, now.optim.schedule):
        left_out.append("train.max_steps")
    keys = (key for key in FIELDS if key not in left_out and not key.startswith("decode."))
    return [key for key in keys if field_of(saved, key) != field_of(now, key)]


def field_of(run: RunConfig, key: str) -> Any:
    """The value of a dotted key."""
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


_PATHS = ("init", "data.path", "data.valid_path")
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}


def _build(given: dict[str, Given], source: str, faults: FaultList) -> tuple[RunConfig, Callable[[str], str]]:
    """The run, and what says where the value of a key comes from."""
    values = {key: _as_written(key, item.value) for key, item in given.items()}
    preset = values.get("model.preset")
    shape = MODEL_PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    filled = {f"model.{name}": value for name, value in shape.items()}

    def where(key: str) -> str:
        if key in given:
            return f"{given[key].origin}: {key}"
        name = preset if key in filled else None
        if FIELDS[key].optional and key.startswith(("objective.", "masking.")):
            name = values.get("objective.preset", FIELDS["objective.preset"].default)
        if key == "data.block_tokens" and values.get("data.path"):
            return f"{source}: {key} (from the data's manifest)"
        return f"{source}: {key} ({f'from preset {name}' if name else 'the default'})"

    values = filled | values
    sections = {name: _section(kind, f"{name}.", values, where, faults) for name, kind in SECTIONS.items()}
    fixed = {key for key, item in given.items() if item.origin.startswith("--set")}
    run: RunConfig = follow_init(_section(RunConfig, "", values | sections, where, faults))
    run = resolve(follow_data(run, fixed, faults.notes))
    check_run(run, where, faults)
    faults.notes += [f"{key} has no effect: {why}" for key, why in without_effect(run) if key in fixed]
    return run, where


def _as_written(key: str, value: Any) -> Any:
    if FIELDS[key].type is bool and isinstance(value, str):
        return _TRUTH.get(value.lower(), value)
    if key in _PATHS and isinstance(value, str):
        return os.path.expanduser(value)
    return value


def _section(
    kind: type, prefix: str, values: Mapping[str, Any], where: Callable[[str], str], faults: FaultList
) -> Any:
    """A section, or the run of its sections; defaults stand in for what is wrong, to go on with the rest."""
    names = kind.__pydantic_fields__  # type: ignore[attr-defined]
    own = {name: values[prefix + name] for name in names if prefix + name in values}
    wrong: set[str] = set()
    try:
        kind(**own)
    except ValidationError as error:
        wrong = {f"{prefix}{item['loc'][0]}" for item in error.errors(include_url=False)}
    for key in (prefix + name for name in own):
        if key in wrong:
            what, fix = FIELDS[key].refusal(values[key])
            faults.add(what, where(key), fix)
    faults.spoilt |= wrong
    return kind(**{name: own[name] for name in own if prefix + name not in FIELDS.keys() & faults.spoilt})
