"""The fields of a run as a flat table of dotted keys, read from the dataclasses of `schema.py`.

The loader needs type and default of a key, `python -m janus_ds explain` its text as well. The text
is the string below a field in the source, which Python itself throws away, so it is read by `ast`.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from janus_ds.config import decode_schema, schema
from janus_ds.config.schema import RunConfig

__all__ = ["FieldSpec", "coerce", "field_docs", "field_table", "section_names"]

_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class FieldSpec:
    """One field of a run: its dotted key, type and default."""

    key: str
    type: type
    optional: bool
    default: Any

    @property
    def type_name(self) -> str:
        """The type in words."""
        return _WORDS[self.type] + (" or null" if self.optional else "")


def section_names() -> tuple[str, ...]:
    """The sections of a recipe: model, data, masking and so on."""
    hints = get_type_hints(RunConfig)
    return tuple(f.name for f in fields(RunConfig) if is_dataclass(hints[f.name]))


@cache
def field_table() -> dict[str, FieldSpec]:
    """Every field of a run by its dotted key, in the order of the schema."""
    return {spec.key: spec for spec in _specs(RunConfig, "")}


def _specs(owner: type, prefix: str) -> list[FieldSpec]:
    hints = get_type_hints(owner)
    found: list[FieldSpec] = []
    for item in fields(owner):
        hint = hints[item.name]
        if is_dataclass(hint):
            found += _specs(hint, f"{item.name}.")  # type: ignore[arg-type]
            continue
        choices = [t for t in get_args(hint) if t is not NoneType] or [hint]
        default = None if item.default is MISSING else item.default
        found.append(FieldSpec(prefix + item.name, choices[0], NoneType in get_args(hint), default))
    return found


def coerce(spec: FieldSpec, value: Any) -> Any:
    """A value from YAML as the type of its field.

    Whole numbers serve as numbers, and `1e-4`, which YAML 1.1 reads as text, is the number it
    looks like.

    Raises:
        ValueError: the value is of another type; the message says which.
    """
    if value is None and spec.optional:
        return None
    if spec.type is float:
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                pass
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif type(value) is spec.type:
        return value
    raise ValueError(f"{spec.key} must be {spec.type_name}, not {_describe(value)}")


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict | list):
        return "a section" if isinstance(value, dict) else "a list"
    return f"{value!r} ({_WORDS.get(type(value), type(value).__name__)})"


@cache
def field_docs() -> dict[str, str]:
    """The text of every field and section, by dotted key (a section's own text under its name)."""
    docs: dict[str, dict[str, str]] = {}
    nodes = [n for module in (schema, decode_schema) for n in ast.parse(inspect.getsource(module)).body]
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            docs[node.name] = _class_docs(node)
    hints = get_type_hints(RunConfig)
    table: dict[str, str] = {}
    for name, text in docs["RunConfig"].items():
        if name:
            table[name] = text
    for section in section_names():
        for name, text in docs[hints[section].__name__].items():
            table[f"{section}.{name}" if name else section] = text
    return table


def _class_docs(node: ast.ClassDef) -> dict[str, str]:
    found = {"": inspect.cleandoc(ast.get_docstring(node) or "")}
    for item, after in zip(node.body, node.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and is_text:
            found[item.target.id] = inspect.cleandoc(str(after.value.value))  # type: ignore[attr-defined]
    return found
