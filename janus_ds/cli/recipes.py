"""`janus-ds init DIR` and `janus-ds explain [KEY]`: recipes to be changed, and what their fields mean."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from janus_ds.cli.arguments import new_parser
from janus_ds.config.faults import suggestion
from janus_ds.config.fields import FieldSpec
from janus_ds.config.packaged import packaged_folder, user_path
from janus_ds.config.presets import MASKING_PRESETS, MODEL_PRESETS, OBJECTIVE_PRESETS
from janus_ds.config.schema import FIELDS, SECTIONS
from janus_ds.errors import UsageError
from janus_ds.io import disk_faults, write_atomic


def copy_files(arguments: Sequence[str] | None = None) -> int:
    """Copy DIR/recipes and DIR/ds_configs; files that are there already are never written over."""
    parser = new_parser("init", "Copy the package's recipes and DeepSpeed files into a folder.")
    parser.add_argument("folder", type=user_path, metavar="DIR", help="folder to copy them to")
    folder = parser.parse_args(arguments).folder
    copies = [
        (file, folder / kind / file.name)
        for kind in ("recipes", "ds_configs")
        for file in sorted(packaged_folder(kind).iterdir())
        if file.is_file() and file.suffix in (".yaml", ".json", ".md")
    ]
    there = [target for _, target in copies if target.exists()]
    if there:
        raise UsageError(f"{len(there)} of the files are there already", str(there[0]), "give another folder")
    for file, target in copies:
        with disk_faults(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, file.read_bytes())
    example = folder / "recipes" / "quickstart.yaml"
    print(f"copied {len(copies)} files; try: janus-ds check --recipe {example} --deepspeed_config zero2")
    return 0


def print_explanation(arguments: Sequence[str]) -> int:
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
    fix, known = "`janus-ds explain` lists all keys", [*FIELDS, *SECTIONS]
    near = [name for name in known if key.lower() in name][:8]
    fix = f"did you mean one of {', '.join(near)}? ({fix})" if len(near) > 1 else suggestion(key, known, fix)
    raise UsageError(f"there is no key {key!r}", "explain", fix)


def _written(value: Any) -> str:
    """A value as a recipe has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _one_line(spec: FieldSpec) -> str:
    summary = spec.text.splitlines()[0]
    return f"{spec.key:<31}{_written(spec.default):<14}{summary}"


def _whole(spec: FieldSpec) -> str:
    lines = [spec.key, f"  type     {spec.type_name}", f"  default  {_written(spec.default)}"]
    if spec.choices:
        lines.append(f"  values   {', '.join(spec.choices)}")
    section, _, name = spec.key.partition(".")
    bundles = {"model": MODEL_PRESETS, "masking": MASKING_PRESETS, "objective": OBJECTIVE_PRESETS}
    presets = {preset: each[name] for preset, each in bundles.get(section, {}).items() if name in each}
    if presets:
        lines.append(
            "  presets  " + "\n           ".join(f"{p}: {_written(value)}" for p, value in presets.items())
        )
    return "\n".join([*lines, "", textwrap.indent(spec.text, "  ")])
