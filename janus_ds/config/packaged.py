"""Recipes, DeepSpeed files and models that come with the package: by path, or by name (`--recipe iwslt`)."""

from __future__ import annotations

import os
from pathlib import Path

DEMO, DENOISER = "demo", "denoiser"
"""The models that the package ships: German to English, both ways; an English AR denoiser to start from."""

_PACKAGE = Path(__file__).parents[1]
_IN_CHECKOUT = {"recipes": "launch/recipes", "ds_configs": "ds_configs"}
_SUFFIXES = {"recipes": ".yaml", "ds_configs": ".json"}
_PREFIXES = ("", "nmt_", "glge_")


def user_path(text: str) -> Path:
    """A path from the command line; a leading ~ is the user's home, also in `--option=~/file`."""
    return Path(os.path.expanduser(text))


def packaged_folder(kind: str) -> Path:
    """The folder of "recipes" or "ds_configs": beside the modules if installed, else in the checkout."""
    installed = _PACKAGE / kind
    return installed if installed.is_dir() else _PACKAGE.parent / _IN_CHECKOUT[kind]


def recipe_file(text: str) -> Path:
    """The recipe that is meant: a path, or a name such as quickstart, iwslt or xsum."""
    return _named(text, "recipes")


def deepspeed_file(text: str) -> Path:
    """The DeepSpeed file that is meant: a path, or a name such as zero2."""
    return _named(text, "ds_configs")


def model_path(path: str | Path) -> Path:
    """The run that is meant: a path, or the name of a model that the package ships, if no folder has it."""
    path = user_path(str(path))
    return _PACKAGE / "assets" / path if str(path) in (DEMO, DENOISER) and not path.is_dir() else path


def tokenizer_name(text: str) -> str:
    """A tokenizer as it was named; for a model that the package ships, the folder of its tokenizer."""
    model = model_path(text)
    return text if model == Path(text) else str(model / "tokenizer")


def packaged_names(suffix: str) -> list[str]:
    """The names of the recipes (".yaml") or DeepSpeed files (".json") that come with the package."""
    kind = next(kind for kind, ending in _SUFFIXES.items() if ending == suffix)
    stems = [file.stem for file in packaged_folder(kind).glob(f"*{suffix}")]
    return sorted({stem.removeprefix("nmt_").removeprefix("glge_") for stem in stems})


def _named(text: str, kind: str) -> Path:
    path = user_path(text)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    files = (packaged_folder(kind) / f"{prefix}{text}{_SUFFIXES[kind]}" for prefix in _PREFIXES)
    return next((file for file in files if file.is_file()), path)
