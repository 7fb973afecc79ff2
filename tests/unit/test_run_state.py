"""Which checkpoints a start may continue, and what it says of the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus_ds.config.presets import resolve
from janus_ds.config.schema import RunConfig
from janus_ds.errors import CheckpointError, ConfigError, JanusError
from janus_ds.train.state import Meters, RunIdentity, check_resumable

FOLDER = Path("runs/x/checkpoints/step-00000010")
NOW = RunIdentity(resolve(RunConfig()), "aa" * 32, "bb" * 32, 2, 1, 2, "fp32")


def state(**changes: Any) -> dict[str, Any]:
    """A state as it comes back from disk."""
    loaded: dict[str, Any] = json.loads(json.dumps(NOW.state(10, Meters(samples=320))))
    return {**loaded, **changes}


def refused(saved: dict[str, Any], now: RunIdentity = NOW) -> JanusError:
    with pytest.raises(JanusError) as caught:
        check_resumable(saved, now, FOLDER)
    assert str(FOLDER) in caught.value.where
    assert caught.value.fix
    return caught.value


def changed(section: str, **values: Any) -> RunIdentity:
    recipe = replace(NOW.recipe, **{section: replace(getattr(NOW.recipe, section), **values)})
    return replace(NOW, recipe=recipe)


def test_the_same_start_continues() -> None:
    check_resumable(state(), NOW, FOLDER)
    assert state()["position"] == 10 * NOW.recipe.train.global_batch


def test_how_long_and_how_often_may_change() -> None:
    check_resumable(state(), changed("train", max_steps=999, save_every=7, log_every=5), FOLDER)
    check_resumable(state(), changed("data", workers=3), FOLDER)


def test_a_newer_format_is_refused() -> None:
    error = refused(state(format_version=2))
    assert isinstance(error, CheckpointError)
    assert error.what == "the checkpoint has format version 2, this program knows versions up to 1"


def test_another_model_shape_is_refused_with_both_values() -> None:
    error = refused(state(), changed("model", d_model=256, heads=8))
    assert isinstance(error, CheckpointError)
    assert "d_model 128 -> 256, heads 4 -> 8" in error.what


def test_another_number_of_ranks_is_refused_in_words() -> None:
    error = refused(state(), replace(NOW, world_size=4, zero_stage=3))
    assert isinstance(error, CheckpointError)
    assert error.what == "the checkpoint was written with 2 ranks, not 4; ZeRO stage 2, not 3"
    assert "--init" in error.fix


def test_another_tokenizer_is_refused() -> None:
    error = refused(state(), replace(NOW, tokenizer_fingerprint="cc" * 32))
    assert isinstance(error, CheckpointError)
    assert "another tokenizer" in error.what


def test_other_data_or_another_recipe_is_refused() -> None:
    assert isinstance(refused(state(), replace(NOW, data_fingerprint="cc")), ConfigError)
    error = refused(state(), changed("optim", lr=1.0))
    assert isinstance(error, ConfigError)
    assert "optim.lr 0.0005 -> 1.0" in error.what
