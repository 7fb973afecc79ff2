"""A run as plain values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from janus_ds.config.load import from_dict, load_run_config, to_dict
from janus_ds.errors import ConfigError
from tests.support.launch import ROOT

RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


def test_run_json_gives_the_run_back(tmp_path: Path) -> None:
    for recipe in (None, *RECIPES):
        run = load_run_config(recipe)
        assert from_dict(to_dict(run)) == run
    values = to_dict(run)
    del values["train"]["log_every"]
    # A field of earlier versions, which made no difference to what is learnt.
    values["data"]["pack_rows"] = True
    assert from_dict(values) == replace(run, train=replace(run.train, log_every=1))
    values["model"]["depth"] = 3
    with pytest.raises(ConfigError, match=r"unknown key 'model\.depth'"):
        from_dict(values)
