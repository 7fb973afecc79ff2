"""Reading recipes and overrides: YAML files and `section.field=value` in, dotted keys with their origins out.

A recipe has sections of fields, `modes` (fields that stand instead of its own where `--mode NAME` asks for
them) and `base` (another recipe in the same folder, whose fields it takes over where it has none).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from janus_ds.config.faults import FaultList, nearest, read_text, suggestion
from janus_ds.config.fields import shown
from janus_ds.config.locations import SECRET_KEYS, public_location
from janus_ds.config.schema import FIELDS, RETIRED, SECTIONS
from janus_ds.errors import UsageError

_MODES = "modes"
"""Section of a recipe with fields that stand instead of its own where `--mode NAME` asks for them."""
_BASE = "base"
"""Key of a recipe: another one in the same folder, whose fields and modes it takes over where it has none."""


class Given(NamedTuple):
    """A value that a user gave, and where."""

    value: Any
    origin: str


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


def read_recipe(path: Path, mode: str | None, faults: FaultList) -> dict[str, Given]:
    """Every field that a recipe, the recipes it is based on and one of its modes give.

    Raises:
        UsageError: there is no such mode; other faults are collected.
    """
    layers = _recipe_layers(path, faults)
    given: dict[str, Given] = {}
    for file, values, _ in layers:
        given |= flatten(values, str(file), faults)
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
        given |= flatten(modes.get(mode) or {}, f"{file}, mode {mode}", faults)
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


def flatten(values: dict[Any, Any], origin: str, faults: FaultList) -> dict[str, Given]:
    """Sections to dotted keys; unknown keys are faults."""
    found: dict[str, Given] = {}
    for name, value in values.items():
        if name not in SECTIONS:
            found |= _known(str(name), value, origin, faults)
        elif isinstance(value, dict):
            for field, inner in value.items():
                found |= _known(f"{name}.{field}", inner, origin, faults)
        elif value is not None:
            fix = f"write the fields of {name} below it, indented"
            faults.add(f"{name} is a section, not a value", f"{origin}: {name}", fix)
    return found


def read_override(text: str, faults: FaultList) -> dict[str, Given]:
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


def _known(key: str, value: Any, origin: str, faults: FaultList) -> dict[str, Given]:
    """The value of a key that there is; nothing for retired keys at their neutral value, and for faults."""
    if key in FIELDS:
        return {key: Given(value, origin)}
    if key in RETIRED:
        neutral, reason = RETIRED[key]
        if value != neutral or (type(value) is bool) != (type(neutral) is bool):
            what = f"{key} {shown(value)} is no longer known: {reason}"
            faults.add(what, f"{origin}: {key}", f"leave {key} out")
        return {}
    known = [*FIELDS, *SECTIONS]
    fix = suggestion(key, known, "`janus-ds explain` lists all keys")
    faults.add(f"unknown key {shown(key)}", f"{origin}: {shown(key)[1:-1]}", fix)
    if near := nearest(key, known):
        faults.spoilt.add(near)
    return {}
