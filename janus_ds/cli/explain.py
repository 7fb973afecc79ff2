"""`python -m janus_ds explain [KEY]`: what a field of the recipe means."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence

from janus_ds.cli.arguments import new_parser
from janus_ds.config.faults import suggestion
from janus_ds.config.fields import FieldSpec
from janus_ds.config.presets import OBJECTIVE_PRESETS
from janus_ds.config.schema import FIELDS, SECTIONS
from janus_ds.errors import UsageError

__all__ = ["explain", "main"]


def main(arguments: Sequence[str]) -> int:
    """Print the text of a key, of a section, or of everything."""
    parser = new_parser("explain", "What a field of the recipe means, its type and default.")
    parser.add_argument(
        "key", nargs="?", help="such as objective.weight_aux, or a section; none: list all keys"
    )
    print(explain(parser.parse_args(arguments).key))
    return 0


def explain(key: str | None) -> str:
    """The text below a key; of all fields of a section; or the first line of every field.

    Raises:
        UsageError: there is no such key; the nearest one is named.
    """
    if key is None:
        return "\n".join(_one_line(spec) for spec in FIELDS.values())
    if key in FIELDS:
        return _whole(FIELDS[key])
    if key in SECTIONS:
        fields = [_one_line(spec) for spec in FIELDS.values() if spec.key.startswith(f"{key}.")]
        return "\n".join([f"{key}: {inspect.cleandoc(SECTIONS[key].__doc__ or '')}", "", *fields])
    known = [*FIELDS, *SECTIONS]
    fix = suggestion(key, known, "`python -m janus_ds explain` lists all keys")
    raise UsageError(f"there is no key {key!r}", "explain", fix)


def _default(spec: FieldSpec) -> str:
    return (
        "null"
        if spec.default is None
        else str(spec.default).lower()
        if spec.type is bool
        else str(spec.default)
    )


def _one_line(spec: FieldSpec) -> str:
    summary = spec.text.splitlines()[0]
    return f"{spec.key:<31}{_default(spec):<14}{summary}"


def _whole(spec: FieldSpec) -> str:
    lines = [spec.key, f"  type     {spec.type_name}", f"  default  {_default(spec)}"]
    if spec.choices:
        lines.append(f"  values   {', '.join(spec.choices)}")
    section, _, name = spec.key.partition(".")
    presets = {preset: values[name] for preset, values in OBJECTIVE_PRESETS.items() if name in values}
    if section == "objective" and presets:
        lines.append("  presets  " + "\n           ".join(f"{p}: {value}" for p, value in presets.items()))
    return "\n".join([*lines, "", textwrap.indent(spec.text, "  ")])
