"""Which checkpoints a start may continue, and what it says of the others."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from janus_ds.config.load import load_run_config, to_dict
from janus_ds.config.presets import resolve
from janus_ds.config.schema import RunConfig
from janus_ds.errors import CheckpointError, ConfigError, JanusError
from janus_ds.train.state import (
    Meters,
    RunIdentity,
    changed_execution,
    changed_training,
    check_form,
    check_resumable,
    read_resumable,
)
from tests.support.deepspeed_files import load_engine
from tests.support.hostile import ODD, PATHS, attacks, mutated, taken_or_refused

FOLDER = Path("runs/x/checkpoints/step-00000010")
NOW = RunIdentity(resolve(RunConfig()), "aa" * 32, "bb" * 32, 2, 1, 2, "fp32")


def state(**changes: Any) -> dict[str, Any]:
    """A state as it comes back from disk."""
    loaded: dict[str, Any] = json.loads(json.dumps(NOW.state(10, Meters(samples=320))))
    return {**loaded, "optimizer": {"adam_steps": 10, "loss_scale": None}, **changes}


def refused(saved: dict[str, Any], now: RunIdentity = NOW) -> JanusError:
    with pytest.raises(JanusError) as caught:
        check_resumable(saved, now, FOLDER)
    assert str(FOLDER) in caught.value.where
    assert caught.value.fix
    return caught.value


def changed(section: str, **values: Any) -> RunIdentity:
    recipe = replace(NOW.recipe, **{section: replace(getattr(NOW.recipe, section), **values)})
    return replace(NOW, recipe=recipe)


def test_how_long_and_how_often_may_change() -> None:
    check_resumable(state(), NOW, FOLDER)
    check_resumable(state(), changed("train", max_steps=999, save_every=7, log_every=5), FOLDER)
    check_resumable(state(), changed("data", workers=3), FOLDER)


def test_padding_may_change_only_where_it_cuts_no_batches() -> None:
    check_resumable(state(), changed("data", pad_multiple=2), FOLDER)
    tokens = changed("data", batch="tokens")
    saved = {**state(), **tokens.state(10, Meters())}
    check_resumable(saved, tokens, FOLDER)
    error = refused(saved, changed("data", batch="tokens", pad_multiple=2))
    assert isinstance(error, ConfigError)
    assert "data.pad_multiple 8 -> 2" in error.what


def test_a_newer_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match="has format version 3, this program knows versions up to 2"):
        check_form(state(format_version=3), FOLDER)


def test_other_ranks_continue_and_are_named() -> None:
    now = replace(NOW, world_size=4, tensor_size=2, zero_stage=3, precision="bf16")
    check_resumable(state(), now, FOLDER)
    assert changed_execution(state(), now) == [
        "2 ranks, not 4",
        "tensor-parallel size 1, not 2",
        "ZeRO stage 2, not 3",
        "precision fp32, not bf16",
    ]
    assert changed_execution(state(), NOW) == []
    # Another micro-batch draws other dropout. Earlier versions did not note it.
    other = replace(NOW, accumulation=4, device="cpu", engine={"data_types.grad_accum_dtype": "fp32"})
    assert changed_execution(state(device="cuda"), other) == [
        "1 micro-batches a step on a rank, not 4",
        "device cuda, not cpu",
        "data_types.grad_accum_dtype unset, not fp32",
    ]
    newer = {"torch": "2.14.0", "deepspeed": "0.18.2"}
    saved = state(versions={**newer, "torch": "2.13.0"})
    assert changed_execution(saved, replace(NOW, versions=newer)) == ["torch 2.13.0, not 2.14.0"]
    early = {k: state()[k] for k in set(state()) - {"accumulation", "device", "engine", "versions"}}
    assert changed_execution(early, replace(other, versions=newer)) == []


def test_what_may_change_speed_or_rounding_is_named(tmp_path: Path) -> None:
    """Offload and sums of the DeepSpeed file, and fields of the recipe; passwords of addresses are not."""
    first, second = (
        replace(NOW, engine=load_engine(tmp_path, zero_optimization={"stage": 2, **zero}).further)
        for zero in ({}, {"offload_optimizer": {"device": "cpu"}})
    )
    place = "https://me:secret@host/x"
    saved = state(**replace(changed("data", path=place), engine=first.engine).state(10, Meters()))
    recipe = replace(NOW.recipe, train=replace(NOW.recipe.train, compile="head", max_steps=600))
    recipe = replace(recipe, data=replace(recipe.data, path=place))
    now = replace(second, recipe=recipe)
    check_resumable(saved, now, FOLDER)
    assert changed_execution(saved, now) == [
        "train.max_steps 300, not 600",
        "train.compile none, not head",
        "zero_optimization.offload_optimizer.device unset, not cpu",
    ]


def test_format_1_is_refused_before_anything_is_unpickled(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state(format_version=1)))
    (tmp_path / "engine").mkdir()
    with pytest.raises(CheckpointError, match="can run code when they are read") as caught:
        read_resumable(tmp_path, NOW)
    assert "--init" in caught.value.fix


def test_weights_without_the_optimizers_state_are_refused_before_a_model_is_built(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(state()))
    with pytest.raises(CheckpointError, match="no state of the optimizer") as caught:
        read_resumable(tmp_path, NOW)
    assert caught.value.where.endswith("optimizer.safetensors")
    (tmp_path / "optimizer.safetensors").touch()
    assert read_resumable(tmp_path, NOW)["step"] == 10
    assert read_resumable(None, NOW)["step"] == 0


def test_another_tokenizer_is_refused() -> None:
    error = refused(state(), replace(NOW, tokenizer_fingerprint="cc" * 32))
    assert isinstance(error, CheckpointError)
    assert "another tokenizer" in error.what


def test_other_data_or_another_recipe_is_refused() -> None:
    assert isinstance(refused(state(), replace(NOW, data_fingerprint="cc")), ConfigError)
    error = refused(state(), changed("optim", lr=1.0))
    assert isinstance(error, ConfigError)
    assert "optim.lr 0.0005 -> 1.0" in error.what
    error = refused(state(), changed("model", d_model=256, heads=8))
    assert isinstance(error, ConfigError)
    assert "model.d_model 128 -> 256, model.heads 4 -> 8" in error.what


SCALE = {"cur_scale": 256.0, "cur_iter": 3, "last_overflow_iter": -1, "cur_hysteresis": 2}


def test_states_have_the_form() -> None:
    check_form(state(), FOLDER)
    check_form(state(optimizer={"adam_steps": 3, "loss_scale": SCALE}), FOLDER)
    # As earlier releases wrote it: fewer meters.
    check_form(state(meters={"samples": 5, "tokens": 7, "seconds": 1, "skipped_steps": 0}), FOLDER)
    waiting = asdict(Meters(unvalidated={"loss": 1.0}, recent_losses=[1.0, 2]))
    check_form(state(meters=waiting), FOLDER)


DAMAGED: dict[str, dict[str, Any]] = {
    "no step": {"step": None},
    "step below 0": {"step": -1},
    "huge step": {"step": 10**30},
    "true for the step": {"step": True},
    "unknown meter": {"meters": {"samples": 1, "evil": 2}},
    "losses are text": {"meters": {"recent_losses": ["a"]}},
    "no ranks": {"world_size": 0},
    "ZeRO stage 9": {"zero_stage": 9},
    "recipe is text": {"recipe": "x"},
    "recipe without a model": {"recipe": {}},
    "no optimizer": {"optimizer": None},
    "steps below 0": {"optimizer": {"adam_steps": -1, "loss_scale": None}},
    "scale of 0": {"optimizer": {"adam_steps": 1, "loss_scale": {**SCALE, "cur_scale": 0}}},
    "scale lacks a value": {"optimizer": {"adam_steps": 1, "loss_scale": {"cur_scale": 1.0}}},
    "DeepSpeed's values are a number": {"engine": 3},
    "version is text": {"format_version": "2"},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_refused_in_words(tmp_path: Path, damage: str) -> None:
    """Behind a checksum that fits, as `read_resumable` meets it."""
    (tmp_path / "optimizer.safetensors").touch()
    (tmp_path / "state.json").write_text(json.dumps(state(**DAMAGED[damage])))
    with pytest.raises(CheckpointError) as caught:
        read_resumable(tmp_path, NOW)
    assert caught.value.fix
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["[]", "1", "null", "{", "\xff", "[" * 200_000, "{}", '{"step": ' + "9" * 5000]
)
def test_a_state_that_is_none_is_refused_in_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError):
        read_resumable(tmp_path, NOW)


@attacks(100)
@given(PATHS, ODD)
def test_any_change_of_a_state_is_taken_or_refused_in_words(path: list[int], odd: Any) -> None:
    """One value anywhere is replaced by another kind of value, or left out."""
    saved = mutated(state(optimizer={"adam_steps": 3, "loss_scale": dict(SCALE)}), path, odd)
    with taken_or_refused():
        check_form(saved, FOLDER)
        check_resumable(saved, NOW, FOLDER)
        changed_execution(saved, NOW)
        Meters(**saved["meters"])


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


BEST = {"best_bleu": 30.0, "best_loss": 2.0, "best_step": 8, "best_scores": {"ar": 31.0}}
WAITED: dict[str, Any] = {**BEST, "stale_validations": 3, "finished": True}


def meters_at_a_start(
    tmp_path: Path, saved: dict[str, Any], rest: dict[str, Any] | None = None, **train: Any
) -> Meters:
    (tmp_path / "optimizer.safetensors").touch()
    (tmp_path / "state.json").write_text(json.dumps(state(meters=saved, **(rest or {}))))
    return Meters(**read_resumable(tmp_path, changed("train", **train))["meters"])


def test_a_best_figure_of_another_measure_is_forgotten(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"valid_bleu": "ar,nar", "keep_best": "nar", "patience": 3}
    old = meters_at_a_start(tmp_path, WAITED, **settings)
    assert (old.best_bleu, old.best_step, old.stale_validations, old.finished) == (30.0, 8, 3, True)
    assert old.measure == "nmt by nar, 4 iterations, all samples"
    same = meters_at_a_start(tmp_path, asdict(old), **settings, log_every=7)
    assert same == old
    changes = {"valid_task": "xsum", "keep_best": "loss", "valid_bleu_iterations": 9, "valid_bleu_samples": 5}
    for name, value in changes.items():
        now = meters_at_a_start(tmp_path, asdict(old), **{**settings, name: value})
        assert (now.best_bleu, now.best_step, now.best_scores) == (-1.0, 0, {}), name
        assert (now.stale_validations, now.finished) == (0, False)
    assert meters_at_a_start(tmp_path, asdict(old)).best_step == 8


def test_a_best_loss_of_other_held_out_samples_is_forgotten(tmp_path: Path) -> None:
    before = {**BEST, "measure": "loss of 512 samples"}
    same, other = ({"valid_fingerprint": text} for text in (NOW.valid_fingerprint, "another index"))
    start = partial(meters_at_a_start, tmp_path, keep_best="loss", valid_samples=512)
    assert start(before, same).best_step == 8
    now = start(before, other)
    assert (now.best_step, now.measure) == (0, "loss of 512 samples")
    # Also where a start in between kept no best one.
    between = asdict(meters_at_a_start(tmp_path, before, other))
    assert start(between, same).best_step == 0


def test_more_patience_lets_a_finished_run_go_on(tmp_path: Path) -> None:
    settings = {"keep_best": "loss"}
    assert meters_at_a_start(tmp_path, WAITED, patience=3, **settings).finished
    assert not meters_at_a_start(tmp_path, WAITED, patience=4, **settings).finished
    assert not meters_at_a_start(tmp_path, WAITED, patience=0, **settings).finished
    assert meters_at_a_start(tmp_path, {**WAITED, "finished": False}, patience=2, **settings).finished
