"""Command-line arguments that name a recipe: equal for training and for the tools."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add_override_argument", "add_recipe_arguments"]


def add_recipe_arguments(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """`--recipe` and `--set` (as `overrides`).

    Args:
        parser: to add to.
        default: the recipe where none is given; None: the program looks for the quickstart's.
    """
    shown = f"launch/recipes/{default.name}" if default else "launch/recipes/quickstart.yaml"
    parser.add_argument(
        "--recipe",
        type=Path,
        default=default,
        metavar="YAML",
        help=f"what is trained (default: {shown})",
    )
    add_override_argument(parser, "override fields of the recipe, such as train.max_steps=20")


def add_override_argument(parser: argparse.ArgumentParser, help_line: str) -> None:
    """`--set KEY=VALUE ...`, as `overrides`."""
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help=help_line,
    )
