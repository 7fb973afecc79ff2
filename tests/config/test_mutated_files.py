"""Recipes, DeepSpeed files and run records with bytes changed: read, or refused in words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from janus_ds.config.deepspeed import read_setup
from janus_ds.config.load import from_dict, load_run_config, to_dict
from tests.support.hostile import CHANGES, changed, taken_or_refused
from tests.support.launch import ROOT

RECIPE = (ROOT / "launch" / "recipes" / "nmt_iwslt.yaml").read_bytes()
ENGINE = (ROOT / "ds_configs" / "zero2_bf16.json").read_bytes()
RECORD = json.dumps(to_dict(load_run_config(None))).encode()


@given(recipe=CHANGES, engine=CHANGES)
def test_changed_files_of_settings(
    tmp_path_factory: pytest.TempPathFactory,
    recipe: list[tuple[int, int, bytes]],
    engine: list[tuple[int, int, bytes]],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "recipe.yaml").write_bytes(changed(RECIPE, recipe))
    (folder / "engine.json").write_bytes(changed(ENGINE, engine))
    with taken_or_refused():
        read_setup(folder / "recipe.yaml", [], folder / "engine.json", 2)


@given(CHANGES)
def test_changed_records(changes: list[tuple[int, int, bytes]]) -> None:
    try:
        values = json.loads(changed(RECORD, changes))
    except ValueError:
        return
    with taken_or_refused():
        from_dict(values)
