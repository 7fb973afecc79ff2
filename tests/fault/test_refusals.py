"""A misspelt key, in any section of either file, is refused, by the program itself quickly."""

from __future__ import annotations

import json
import os
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

LIMIT = 5.0


def seconds_of_work(recipe: Path, engine: Path) -> float:
    """Of a start of Python with the program."""
    command = [sys.executable, "launch/pretrain.py", "--deepspeed_config", engine, "--recipe", recipe]
    process = subprocess.Popen(command, cwd=ROOT, env=program_environment(), stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == ConfigError.exit_code
    return used.ru_utime + used.ru_stime


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


def test_a_misspelt_key_in_any_section_is_refused_in_under_5_seconds(tmp_path: Path, tally: Tally) -> None:
    """Seconds of work, not on the clock: what else runs on the machine is not the program's doing."""
    sound = tmp_path / "sound.yaml"
    sound.write_text("name: sound\n")
    cases = [(path, ROOT / "ds_configs/zero2.json", right) for path, right in recipes(tmp_path).items()]
    cases += [(sound, path, right) for path, right in engines(tmp_path).items()]
    assert len(cases) > 12
    for recipe, engine, right in cases:
        said = refusal(ConfigError, "check", "--recipe", recipe, "--deepspeed_config", engine)
        assert f"did you mean {right!r}?" in said
        assert "unknown key" in said
    work = max(seconds_of_work(*case[:2]) for case in (cases[0], cases[-1]))
    assert work < LIMIT
    count = f"{len(cases)} of {len(cases)}, {work:.1f} s"
    tally("misspelt key in every section of recipe and DeepSpeed file refused", count)
