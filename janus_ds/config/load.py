"""Recipes: YAML and dotted overrides in, a checked :class:`RunConfig` out; and back, for run records.

A recipe has sections of fields, `modes` (fields that stand instead of its own where `--mode NAME` asks for
them) and `base` (another recipe in the same folder, whose fields it takes over where it has none).

All faults are reported together: unknown keys (with the nearest known one), values of a wrong type,
values out of range, and values that contradict each other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from janus_ds.config.fields import FaultList, shown
from janus_ds.config.locations import SECRET_KEYS, public_location, read_text
from janus_ds.config.presets import MODEL_PRESETS, follow_data, follow_init, resolve
from janus_ds.config.rules import check_name, check_run, without_effect
from janus_ds.config.schema import FIELDS, RETIRED, SECTIONS, RunConfig
from janus_ds.errors import UsageError, nearest, suggestion


class _Given(NamedTuple):
    """A value that a user gave, and where."""

    value: Any
    origin: str


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
    given = _read_given(recipe, overrides, faults, mode)
    run, where = _build(given, str(recipe) if recipe else "the defaults", faults)
    check_name(run.name, where, faults)
    return run


def given_keys(recipe: Path | None, overrides: Iterable[str], mode: str | None = None) -> set[str]:
    """Dotted keys that a recipe and overrides give a value, whatever presets and `init` fill in."""
    given = _read_given(recipe, overrides, FaultList(), mode)
    return {key for key, item in given.items() if item.value is not None}


def _read_given(
    recipe: Path | None, overrides: Iterable[str], faults: FaultList, mode: str | None
) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    if recipe is not None:
        given |= _read_recipe(recipe, mode, faults)
    for override in overrides:
        given |= _read_override(override, faults)
    return given


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
    run, _ = _build(_flatten(values, origin, faults, recorded=True), origin, faults)
    faults.raise_if_any()
    return run


# Recipes and overrides: dotted keys with their origins

_MODES = "modes"
"""Section of a recipe with fields that stand instead of its own where `--mode NAME` asks for them."""
_BASE = "base"
"""Key of a recipe: another one in the same folder, whose fields and modes it takes over where it has none."""


class _Loader(yaml.SafeLoader):
    """YAML without surprises: equal keys are a fault, and plain text means what it looks like.

    YAML 1.1 reads `1:30` as 90, `010` as 8, `off` as false, `1e-4` as text and `2024-01-01` as a date. Here,
    as in YAML 1.2, numbers are decimal, only true and false are truth values, and all else is text.
    """


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # Forty digits: longer ones are refused as text, before they are made a number.
    ("int", r"[-+]?(0|[1-9][0-9]{0,39})", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key, problem = str(key_node.value)[:60], "is given twice"
        if not isinstance(key_node, yaml.ScalarNode):
            key, problem = "", "is a list or a mapping"
        if problem == "is given twice" and key_node.value not in seen:
            seen.add(key_node.value)
            continue
        raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} {problem}", key_node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)

# What PyYAML raises beside its own errors: a tag with a value that is none of its kind, deep nesting.
_YAML_ERRORS = (
    yaml.YAMLError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    LookupError,
    RecursionError,
)


def _read_recipe(path: Path, mode: str | None, faults: FaultList) -> dict[str, _Given]:
    """Every field that a recipe, the recipes it is based on and one of its modes give.

    Raises:
        UsageError: there is no such mode; other faults are collected.
    """
    layers = _recipe_layers(path, faults)
    given: dict[str, _Given] = {}
    for file, values, _ in layers:
        given |= _flatten(values, str(file), faults)
    names = list(dict.fromkeys(name for _, _, modes in layers for name in modes))
    if mode is None or (faults.faults and not names):
        return given
    if mode not in names:
        what = f"no mode {mode!r}" if names else "no modes"
        fix = "leave --mode out, or give one of launch/recipes/glge_*.yaml"
        raise UsageError(
            f"the recipe has {what}", str(path), f"use {', '.join(map(str, names))}" if names else fix
        )
    for file, _, modes in layers:
        given |= _flatten(modes.get(mode) or {}, f"{file}, mode {mode}", faults)
    return given


_Layer = tuple[Path, dict[Any, Any], dict[Any, Any]]
"""A file of a recipe, its own fields, and its modes."""


def _recipe_layers(path: Path, faults: FaultList, below: tuple[Path, ...] = ()) -> list[_Layer]:
    """The recipe and the recipes that it is based on, the most general one first."""
    values = _recipe_values(path, faults)
    modes = values.pop(_MODES, None) or {}
    if not isinstance(modes, dict) or not all(isinstance(m, dict | None) for m in modes.values()):
        what = "the section is no mapping of modes to fields"
        faults.add(what, f"{path}: {_MODES}", "see launch/recipes/glge_base.yaml")
        modes = {}
    layer = (path, values, modes)
    base = values.pop(_BASE, None)
    if base is None:
        return [layer]
    if not isinstance(base, str) or not base or Path(base).name != base:
        fix = "write the name of a recipe in the same folder, such as glge_base.yaml"
        faults.add(f"{shown(base)} is no name of a recipe to start from", f"{path}: {_BASE}", fix)
        return [layer]
    if path.with_name(base) in (path, *below):
        faults.add("the recipe is based on itself", f"{path}: {_BASE}", f"leave {_BASE} out")
        return [layer]
    return [*_recipe_layers(path.with_name(base), faults, (path, *below)), layer]


def _recipe_values(path: Path, faults: FaultList) -> dict[Any, Any]:
    text = read_text(path, "the recipe", "a recipe, such as launch/recipes/quickstart.yaml", faults)
    if text is None:
        return {}
    try:
        values = yaml.load(text, Loader=_Loader)
    except _YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = (getattr(error, "problem", None) or str(error))[:200]
        if isinstance(error, RecursionError):
            problem = "it is nested too deeply"
        faults.add(f"the recipe is not valid YAML: {problem}", f"{path}{line}", "mend that line")
        return {}
    if not isinstance(values, dict | None):
        faults.add("the recipe is not a mapping of sections", str(path), "write lines such as `model:`")
        return {}
    return values or {}


def _flatten(
    values: Mapping[Any, Any], origin: str, faults: FaultList, recorded: bool = False
) -> dict[str, _Given]:
    """Sections to dotted keys, of a recipe or of the record of a run; unknown keys are faults."""
    found: dict[str, _Given] = {}
    for name, value in values.items():
        if name not in SECTIONS:
            found |= _known(str(name), value, origin, faults, recorded)
        elif isinstance(value, dict):
            for field, inner in value.items():
                found |= _known(f"{name}.{field}", inner, origin, faults, recorded)
        elif value is not None:
            fix = f"write the fields of {name} below it, indented"
            faults.add(f"{name} is a section, not a value", f"{origin}: {name}", fix)
    return found


def _read_override(text: str, faults: FaultList) -> dict[str, _Given]:
    """The field of one `section.field=value`; nothing where it is at fault."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    origin = f"--set {key}={public_location(raw)}" if key in SECRET_KEYS else f"--set {shown(text)[1:-1]}"
    if not equals:
        faults.add("an override has no '='", origin, "write it as section.field=value")
        return {}
    if key in SECTIONS:
        fix = f"set one of its fields: {key}.FIELD"
        faults.add(f"{key} is a section, not a field", f"{origin}: {key}", fix)
        return {}
    value: Any = raw
    if key in FIELDS and FIELDS[key].type is str:
        # `--set name=2024` means the text 2024; `null` and `~` still mean nothing.
        value = None if FIELDS[key].optional and raw in ("null", "~", "") else raw
    else:
        try:
            value = yaml.load(raw, Loader=_Loader)
        except _YAML_ERRORS:
            value = raw
    return _known(key, value, origin, faults)


def _known(key: str, value: Any, origin: str, faults: FaultList, recorded: bool = False) -> dict[str, _Given]:
    """The value of a known key; nothing for a retired one that asks for nothing else, and for faults."""
    if key in FIELDS:
        return {key: _Given(value, origin)}
    if key in RETIRED:
        neutral, reason, harmless = RETIRED[key]
        same = value == neutral and (type(value) is bool) == (type(neutral) is bool)
        if not (same or (recorded and harmless)):
            what = f"{key} {shown(value)} is no longer known: {reason}"
            faults.add(what, f"{origin}: {key}", f"leave {key} out")
        return {}
    known = [*FIELDS, *SECTIONS]
    fix = suggestion(key, known, "`janus-ds explain` lists all keys")
    faults.add(f"unknown key {shown(key)}", f"{origin}: {shown(key)[1:-1]}", fix)
    if near := nearest(key, known):
        faults.spoilt.add(near)
    return {}


# Dotted keys to a run

_PATHS = ("init", "data.path", "data.valid_path")
_TRUTH = {"yes": True, "on": True, "no": False, "off": False}


def _build(
    given: dict[str, _Given], source: str, faults: FaultList
) -> tuple[RunConfig, Callable[[str], str]]:
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
    run: RunConfig = _section(RunConfig, "", values | sections, where, faults)
    run = follow_init(run, given, faults.notes)
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
