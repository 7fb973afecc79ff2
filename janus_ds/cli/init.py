"""`janus-ds init DIR`: recipes and DeepSpeed files of the package, copied out to be changed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from janus_ds.cli.arguments import new_parser
from janus_ds.config.packaged import packaged_folder, user_path
from janus_ds.errors import UsageError
from janus_ds.io import disk_faults

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
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
            shutil.copyfile(file, target)
    example = folder / "recipes" / "quickstart.yaml"
    print(f"copied {len(copies)} files; try: janus-ds check --recipe {example} --deepspeed_config zero2")
    return 0
