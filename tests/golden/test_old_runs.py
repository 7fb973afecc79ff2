"""What commit 5c5119c wrote to disk: a run is continued, data directories are read, recipes mean the same.

`frozen/run` was trained for 20 steps by `frozen/recipe.yaml` on `frozen/data`; `frozen/continued.json` holds
steps 21 to 30 of a run that went on at once. Keys that were retired since stand in recipe and run.json at the
values that change nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from janus_ds.errors import ConfigError
from janus_ds.observe import read_metrics
from tests.support.commands import ZERO2, refusal
from tests.support.launch import ROOT
from tests.support.warm import warm_starter

FROZEN = "tests/golden/frozen"
TRAIN = ["launch/pretrain.py", "--deepspeed_config", "ds_configs/zero2.json"]
# Key, and a value that asks for what is gone; the recipe above holds the values that do not.
RETIRED = {
    "data.pack_rows": "true",
    "objective.ar_loss": "masked",
    "objective.aux_share": "0.5",
    "decode.length_pruning": "true",
    "decode.confidence": "0.9",
    "decode.draft_iterations": "2",
    "decode.redraft": "nar",
    "decode.draft_width": "2",
}


def restored_run(folder: Path) -> Path:
    """A copy of the frozen run to work with; its tokenizer is the one of its data."""
    shutil.copytree(ROOT / FROZEN / "run", folder / "run")
    shutil.copytree(ROOT / FROZEN / "data" / "tokenizer", folder / "run" / "tokenizer")
    return folder / "run"


def test_a_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    run, log = restored_run(tmp_path), tmp_path / "log"
    words = [*TRAIN, "--recipe", f"{FROZEN}/recipe.yaml", "--data", f"{FROZEN}/data", "--output", str(run)]
    assert warm_starter().start(words, log).wait(600) == 0, log.read_text()
    assert "resuming from step 20" in log.read_text()
    golden = json.loads((ROOT / FROZEN / "continued.json").read_text())
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))
    for line, expected in zip(lines[20:], golden, strict=True):
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=2e-4, abs=1e-5)
    record = json.loads((run / "run.json").read_text())
    assert len(record["attempts"]) == 2


@pytest.mark.parametrize(("key", "value"), RETIRED.items())
def test_a_retired_key_is_refused_by_name_at_another_value(key: str, value: str, tmp_path: Path) -> None:
    section, _, field = key.partition(".")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: old\n{section}: {{{field}: {value}}}\n")
    said = refusal(ConfigError, "check", "--recipe", recipe, "--deepspeed_config", ZERO2)
    assert key in said
    assert "retired" in said or "no longer" in said or "removed" in said
