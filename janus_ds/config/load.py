"""Recipes: YAML and dotted overrides in, a checked :class:`RunConfig` out.

All faults are reported together: unknown keys (with the nearest known one), values of a wrong type,
values out of range, and values that contradict each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from janus_ds.config.faults import FaultList, nearest, suggestion
from janus_ds.config.fields import coerce, field_table, section_names
from janus_ds.config.initial import follow_init
from janus_ds.config.locations import SECRET_KEYS, public_location
from janus_ds.config.modes import MODES_KEY
from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.rules import check_run, check_values
from janus_ds.config.schema import RunConfig

__all__ = ["fingerprint", "from_dict", "load_run_config", "read_run_config", "to_dict"]


@dataclass(frozen=True)
class _Given:
    """A value that a user gave, and where."""

    value: Any
    origin: str
    from_text: bool = False


def load_run_config(recipe: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a recipe and overrides describe, with every preset written out.

    Args:
        recipe: YAML file; None takes the defaults of the schema.
        overrides: `section.field=value` each; the value is read as YAML. Later ones win.

    Raises:
        ConfigError: anything is wrong; the message names all faults.
    """
    faults = FaultList()
    run = read_run_config(recipe, overrides, faults)
    faults.raise_if_any()
    return run


def read_run_config(recipe: Path | None, overrides: Iterable[str], faults: FaultList) -> RunConfig:
    """As :func:`load_run_config`, but faults are only collected: for reports over several files.

    Where a value cannot be read, the run that is returned has the default in its place.
    """
    given: dict[str, _Given] = {}
    if recipe is not None:
        given |= _read_recipe(recipe, faults)
    for override in overrides:
        given |= _read_override(override, faults)
    return _build(given, str(recipe) if recipe else "the defaults", faults)


def to_dict(run: RunConfig) -> dict[str, Any]:
    """The run as nested plain values, for run.json; secrets of addresses are left out."""
    values = asdict(run)
    for section, name in (key.split(".") for key in SECRET_KEYS):
        if values[section][name] is not None:
            values[section][name] = public_location(values[section][name])
    return values


def from_dict(values: Mapping[str, Any], origin: str = "run.json") -> RunConfig:
    """The run that :func:`to_dict` wrote.

    Raises:
        ConfigError: it holds anything that this version does not know or allow.
    """
    faults = FaultList()
    run = _build(_flatten(dict(values), "", origin, faults), origin, faults)
    faults.raise_if_any()
    return run


RETIRED: dict[str, tuple[tuple[Any, ...], str]] = {
    "decode.length_pruning": ((False,), "candidates that were given up early cost 0.6 to 2.3 BLEU"),
    "decode.confidence": ((None,), "decode.threshold settles single tokens by their probability"),
    "decode.redraft": (("reuse",), "drafting anew was slower than what is left of earlier drafts"),
    "decode.draft_iterations": ((0,), "refined drafts cost more passes than they saved"),
}
"""Fields of older versions: the values under which nothing changes, and why they are gone.

Recipes and runs that hold one of these values are read as if the key were not there.
"""

_NOT_TRAINED = {
    "name",
    "data.path",
    "data.valid_path",
    "data.workers",
    "data.prefetch_steps",
    "data.pad_multiple",
    "data.pack_rows",
    "data.cache_dir",
    "data.cache_gb",
    "data.read_ahead",
    "data.retries",
    "data.stall_seconds",
    "data.on_damage",
    "data.max_damage",
    "train.log_every",
    "train.valid_every",
    "train.valid_samples",
    "train.save_every",
    "train.keep_last",
    "train.keep_every",
    "train.max_failed_saves",
    "train.valid_bleu",
    "train.valid_bleu_samples",
    "train.valid_task",
    "train.valid_bleu_iterations",
    "train.keep_best",
    "train.patience",
    "train.time_limit",
    "train.stall_minutes",
    "train.sample_every",
    "train.max_bad_steps",
    "train.max_overflows",
    "train.spike_action",
    "train.spike_factor",
    "train.spike_window",
    "train.activation_checkpointing",
    "train.attention_backend",
    "train.compile",
}
"""Fields that may change between two starts of a run without changing what it learns."""

_SAME_STREAM_KL = tuple(f"objective.weight_kl_{name}_{name}" for name in ("ar", "nar", "aux"))


def fingerprint(run: RunConfig) -> str:
    """A hash of what is trained: equal for two starts of one run, on any number of ranks.

    Left out are how often things are logged, saved and validated, where the data lies (its own
    manifest identifies it) and how text is decoded; `train.max_steps` counts only where the
    learning rate depends on it, so that other runs can be made longer.
    """
    values = {
        key: _get(run, key)
        for key in field_table()
        if key not in _NOT_TRAINED and not key.startswith("decode.") and key != "model.preset"
    }
    if run.init_length_head == RunConfig.init_length_head:
        # So that runs from before there was a choice go on; so below.
        del values["init_length_head"]
    if not run.data.shuffle_shards:
        del values["data.shuffle_shards"]
    for key in ("objective.ar_loss", "objective.aux_share", "objective.encoder_passes"):
        if values[key] == field_table()[key].default:
            del values[key]
    for key in _SAME_STREAM_KL:
        if not values[key]:
            del values[key]
    if values["masking.aux_order"] == "left_to_right":
        del values["masking.aux_order"]
    if run.optim.schedule != "polynomial":
        del values["train.max_steps"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _get(run: RunConfig, key: str) -> Any:
    value: Any = run
    for name in key.split("."):
        value = getattr(value, name)
    return value


# Reading


class _StrictLoader(yaml.SafeLoader):
    """YAML without the habit of keeping the last of two equal keys."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def _read_recipe(path: Path, faults: FaultList) -> dict[str, _Given]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        fix = suggestion(
            path.name, names, "give the path of a recipe, such as launch/recipes/quickstart.yaml"
        )
        faults.add(f"the recipe cannot be read: {error.strerror}", str(path), fix)
        return {}
    except UnicodeDecodeError as error:
        faults.add(f"the recipe is not UTF-8 text: {error.reason}", str(path), "save it as UTF-8")
        return {}
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        faults.add(f"the recipe is not valid YAML: {problem}", f"{path}{line}", "mend that line")
        return {}
    if not isinstance(values, dict | None):
        faults.add("the recipe is not a mapping of sections", str(path), "write lines such as `model:`")
        return {}
    own = {name: value for name, value in (values or {}).items() if name != MODES_KEY}
    return _flatten(own, "", str(path), faults)


def _flatten(values: dict[Any, Any], prefix: str, origin: str, faults: FaultList) -> dict[str, _Given]:
    table, sections = field_table(), section_names()
    found: dict[str, _Given] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if not prefix and key in sections:
            if isinstance(value, dict):
                found |= _flatten(value, f"{key}.", origin, faults)
            elif value is not None:
                fix = f"write the fields of {key} below it, indented"
                faults.add(f"{key} is a section, not a value", f"{origin}: {key}", fix)
        elif key in table:
            found[key] = _Given(value, origin)
        elif key in RETIRED:
            _check_retired(key, value, f"{origin}: {key}", faults)
        else:
            _unknown(key, origin, faults)
    return found


def _read_override(text: str, faults: FaultList) -> dict[str, _Given]:
    key, equals, raw = text.partition("=")
    key = key.strip()
    origin = f"--set {key}={public_location(raw)}" if key in SECRET_KEYS else f"--set {text}"
    if not equals:
        faults.add("an override has no '='", origin, "write it as section.field=value")
        return {}
    if key in RETIRED:
        _check_retired(key, yaml.safe_load(raw), origin, faults)
        return {}
    if key not in field_table():
        _unknown(key, origin, faults)
        return {}
    if field_table()[key].type is str:
        # `--set name=2024` means the text 2024; `null` and `~` still mean nothing.
        optional = field_table()[key].optional
        return {key: _Given(None if optional and raw in ("null", "~", "") else raw, origin, True)}
    try:
        return {key: _Given(yaml.safe_load(raw), origin, True)}
    except yaml.YAMLError:
        return {key: _Given(raw, origin, True)}


def _check_retired(key: str, value: Any, where: str, faults: FaultList) -> None:
    neutral, reason = RETIRED[key]
    if value not in neutral:
        faults.add(f"{key} {value!r} is no longer known: {reason}", where, f"leave {key} out")


def _unknown(key: str, origin: str, faults: FaultList) -> None:
    known = [*field_table(), *section_names()]
    near = nearest(key, known)
    if key in section_names():
        faults.add(
            f"{key} is a section, not a field", f"{origin}: {key}", f"set one of its fields: {key}.FIELD"
        )
        return
    fix = suggestion(key, known, "`python -m janus_ds explain` lists all keys")
    faults.add(f"unknown key {key!r}", f"{origin}: {key}", fix)
    if near:
        faults.spoilt.add(near)


# Building


def _build(given: dict[str, _Given], source: str, faults: FaultList) -> RunConfig:
    def where(key: str) -> str:
        return f"{given[key].origin if key in given else source}: {key}"

    values: dict[str, Any] = {}
    for key, item in given.items():
        spec = field_table()[key]
        try:
            values[key] = coerce(spec, item.value)
        except ValueError as error:
            faults.add(str(error), where(key), f"write {spec.type_name}")
            faults.spoilt.add(key)
    preset = values.get("model.preset")
    if preset in MODEL_PRESETS:
        shape = {f"model.{name}": value for name, value in MODEL_PRESETS[preset].items()}
        values = shape | values
    check_values(values, where, faults)
    # Defaults stand in for what has been reported, so that the other values are still checked together.
    sound = {key: value for key, value in values.items() if key not in faults.spoilt}
    run: RunConfig = resolve(follow_init(_construct(RunConfig, "", sound)))
    check_run(run, where, faults)
    return run


def _construct(owner: type, prefix: str, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(owner)
    arguments: dict[str, Any] = {}
    for item in fields(owner):
        key = prefix + item.name
        if is_dataclass(hints[item.name]):
            arguments[item.name] = _construct(hints[item.name], f"{key}.", values)
        elif key in values:
            arguments[item.name] = values[key]
    return owner(**arguments)
