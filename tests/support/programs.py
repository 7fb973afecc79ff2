"""The programs under launch/ and eval/, as modules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def load_program(place: str) -> ModuleType:
    """Import a program by its path in the repository, such as "eval/decode.py"."""
    path = ROOT / place
    spec = importlib.util.spec_from_file_location(place.replace("/", "_").removesuffix(".py"), path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
