"""A run as plain values, and what of it is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from janus_ds.config.load import changed_training, from_dict, load_run_config, to_dict
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


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("name=other", True),
        ("data.path=/elsewhere", True),
        ("data.workers=3", True),
        ("train.save_every=7", True),
        ("train.max_steps=600", True),
        ("train.activation_checkpointing=true", True),
        ("decode.iterations=10", True),
        ("train.stall_minutes=0", True),
        ("train.spike_action=skip", True),
        ("train.max_overflows=9", True),
        ("train.seed=2", False),
        ("train.global_batch=64", False),
        ("optim.lr=1e-3", False),
        ("objective.weight_aux=0.5", False),
        ("masking.target_share=0.4", False),
        ("model.dropout=0", False),
        ("data.shuffle_window=9", False),
    ],
)
def test_what_is_trained_is_told_from_the_rest(override: str, same: bool) -> None:
    changed = changed_training(load_run_config(None), load_run_config(None, [override]))
    assert changed == ([] if same else [override.partition("=")[0]])


def test_it_does_not_matter_how_a_value_was_given() -> None:
    given_by_preset = load_run_config(None, ["model.preset=quickstart"])
    shape = to_dict(given_by_preset)["model"]
    written_out = [f"model.{key}={value}" for key, value in shape.items() if key != "preset"]
    assert changed_training(load_run_config(None, written_out), given_by_preset) == []


def test_the_polynomial_schedule_ties_the_length_of_the_run() -> None:
    short, long = (
        load_run_config(None, ["optim.schedule=polynomial", f"train.max_steps={n}"]) for n in (300, 600)
    )
    assert changed_training(short, long) == ["train.max_steps"]
