"""A misspelt key, in any section of either file, is refused by the program itself, before slow imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from janus_ds.config.deepspeed_file import SECTIONS as ENGINE_SECTIONS
from janus_ds.config.schema import FIELDS, SECTIONS
from janus_ds.errors import ConfigError
from tests.conftest import Tally
from tests.support.commands import refusal
from tests.support.programs import ROOT, program_environment

SLOW = {"torch", "deepspeed", "megatron", "numpy", "transformers"}
"""Packages that take seconds to import."""


def modules_of_a_start(recipe: Path, engine: Path) -> set[str]:
    """What a start of Python with the program imports, until it refuses."""
    program = ["launch/pretrain.py", "--deepspeed_config", str(engine), "--recipe", str(recipe)]
    command = [sys.executable, "-X", "importtime", *program]
    done = subprocess.run(command, cwd=ROOT, env=program_environment(), capture_output=True, text=True)
    assert done.returncode == ConfigError.exit_code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip() for line in lines}


def misspelt(key: str) -> str:
    """The key without its last letter but one."""
    return key[:-2] + key[-1]


def recipes(folder: Path) -> dict[Path, str]:
    """A recipe with a misspelt key for the top and for each section."""
    found = {}
    for section in ("", *SECTIONS):
        names = [key for key in FIELDS if key.rpartition(".")[0] == section and len(key) > 3]
        right = max(names, key=len)
        name = misspelt(right.rpartition(".")[2])
        path = folder / f"{section or 'top'}.yaml"
        path.write_text(yaml.safe_dump({section: {name: 1}} if section else {name: 1}))
        found[path] = right
    return found


def engines(folder: Path) -> dict[Path, str]:
    """The same for the DeepSpeed file, whose messages name a key within its section."""
    found = {folder / "top.json": "zero_optimization"}
    (folder / "top.json").write_text(json.dumps({misspelt("zero_optimization"): {"stage": 2}}))
    for section, keys in ENGINE_SECTIONS.items():
        right = max(keys, key=len)
        values: object = {misspelt(right): 1}
        for name in reversed(section.split(".")):
            values = {name: values}
        path = folder / f"{section}.json"
        path.write_text(json.dumps(values))
        found[path] = right
    return found


def test_a_misspelt_key_in_any_section_is_refused_before_the_slow_imports(
    tmp_path: Path, tally: Tally
) -> None:
    sound = tmp_path / "sound.yaml"
    sound.write_text("name: sound\n")
    cases = [(path, ROOT / "ds_configs/zero2.json", right) for path, right in recipes(tmp_path).items()]
    cases += [(sound, path, right) for path, right in engines(tmp_path).items()]
    assert len(cases) > 12
    for recipe, engine, right in cases:
        said = refusal(ConfigError, "check", "--recipe", recipe, "--deepspeed_config", engine)
        assert f"did you mean {right!r}?" in said
        assert "unknown key" in said
    for case in (cases[0], cases[-1]):
        modules = modules_of_a_start(*case[:2])
        assert "janus_ds.errors" in modules
        assert not modules & SLOW
    count = f"{len(cases)} of {len(cases)}"
    tally("misspelt key in every section of recipe and DeepSpeed file refused, nothing slow imported", count)
