"""Modes of a recipe, and the recipes of GLGE."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_ds.cli.train import parse_options
from janus_ds.config.load import load_run_config
from janus_ds.data.prepare.pair_files import GLGE_LIMITS
from janus_ds.errors import ConfigError, UsageError

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
PRESETS = {
    "nar": "cmlm",
    "nar_released": "released_finetune",
    "ar": "ar",
    "ar_query": "ar_query",
    "janus": "paper",
}


@pytest.mark.parametrize("task", GLGE_LIMITS)
def test_glge_recipes_have_the_papers_settings_in_every_mode(task: str) -> None:
    recipe = RECIPES / f"glge_{task}.yaml"
    for mode, preset in PRESETS.items():
        run = load_run_config(recipe, mode=mode)
        plain = mode in ("ar", "ar_query")
        assert run.name == f"glge_{task}_{mode}"
        assert run.objective.preset == preset
        assert run.objective.decoder_start == "eos_bos"
        assert (run.optim.lr, run.optim.warmup_steps) == ((3e-5, 200) if plain else (1e-4, 1000))
        assert run.decode.mode == ("ar" if plain else "nar")
        assert (run.decode.beam, run.decode.length_beam) == (5, 5)
        assert run.data.task == "pair"
        limits = GLGE_LIMITS[task]
        assert limits.target == run.data.block_tokens == run.decode.max_length
        assert limits.source + 2 <= run.model.max_source_positions
        assert run.init_length_head == ("new" if mode.startswith("nar") else "keep")
        modes = {"nar": "nar", "nar_released": "nar", "janus": "ar,nar"}.get(mode, "ar")
        assert (run.train.valid_task, run.train.valid_bleu) == (task, modes)
        assert run.train.keep_best == run.decode.mode
        assert run.masking.target == ("span_union" if mode == "janus" else run.masking.target)
    ratio = load_run_config(recipe).train.max_steps / load_run_config(recipe, mode="ar").train.max_steps
    assert ratio == pytest.approx(5.0, rel=0.01)
    paper = {"xsum": 64, "squadqg": 64, "personachat": 32}
    assert paper.get(task, GLGE_LIMITS[task].target) == GLGE_LIMITS[task].target


def test_other_overrides_win_over_a_mode(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: a\nmodes:\n  x: {name: b, optim: {lr: 1.0e-5}, model: {layernorm_embedding: false}}\n  y:\n"
    )
    run = load_run_config(recipe, ["optim.lr=0.5"], mode="x")
    assert (run.name, run.optim.lr, run.model.layernorm_embedding) == ("b", 0.5, False)
    assert load_run_config(recipe, mode="x").optim.lr == 1e-5
    assert load_run_config(recipe, mode="y") == load_run_config(recipe)
    assert load_run_config(recipe).name == "a"


def test_a_mode_on_the_command_line_comes_before_other_overrides() -> None:
    recipe = RECIPES / "glge_xsum.yaml"
    argv = [
        "--deepspeed_config",
        "x.json",
        "--recipe",
        str(recipe),
        "--init",
        "runs/none",
        "--set",
        "optim.lr=1.0",
    ]
    options = parse_options([*argv, "--mode", "ar"], recipe, "program")
    run = load_run_config(options.recipe, options.overrides, options.mode)
    assert (run.name, run.init, run.optim.lr, run.optim.warmup_steps) == (
        "glge_xsum_ar",
        "runs/none",
        1.0,
        200,
    )
    options = parse_options([*argv, "--mode", "fast"], recipe, "program")
    with pytest.raises(UsageError, match="no mode 'fast'"):
        load_run_config(options.recipe, options.overrides, options.mode)


def test_faults_of_modes(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("modes: {x: {optim: {rate: 1}}}\n")
    with pytest.raises(UsageError, match="no mode 'z'"):
        load_run_config(recipe, mode="z")
    with pytest.raises(ConfigError, match=r"optim\.rate") as caught:
        load_run_config(recipe, mode="x")
    assert caught.value.where == f"{recipe}, mode x: optim.rate"
    recipe.write_text("modes: [x]\n")
    with pytest.raises(ConfigError, match="no mapping"):
        load_run_config(recipe, mode="x")
    recipe.write_text("name: a\n")
    with pytest.raises(UsageError, match="no modes"):
        load_run_config(recipe, mode="x")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(tmp_path / "none.yaml", mode="x")


def test_a_recipe_takes_over_what_its_base_says(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(
        "name: all\noptim: {lr: 0.5, beta2: 0.9}\nmodes: {x: {optim: {lr: 0.25}}, z: {}}\n"
    )
    (tmp_path / "one.yaml").write_text(
        "base: all.yaml\nname: one\noptim: {beta2: 0.8}\nmodes: {x: {name: one_x}, y: {optim: {lr: 0.125}}}\n"
    )
    recipe = tmp_path / "two.yaml"
    recipe.write_text("base: one.yaml\ninit: runs/a\n")
    found = {mode: load_run_config(recipe, mode=mode) for mode in (None, "x", "y", "z")}
    assert {mode: (run.name, run.init, run.optim.lr, run.optim.beta2) for mode, run in found.items()} == {
        None: ("one", "runs/a", 0.5, 0.8),
        "x": ("one_x", "runs/a", 0.25, 0.8),
        "y": ("one", "runs/a", 0.125, 0.8),
        "z": ("one", "runs/a", 0.5, 0.8),
    }
    with pytest.raises(UsageError, match="no mode 'w'") as caught:
        load_run_config(recipe, mode="w")
    assert caught.value.fix == "use x, z, y"


def test_faults_of_a_base_name_its_file(tmp_path: Path) -> None:
    recipe, base = tmp_path / "recipe.yaml", tmp_path / "base.yaml"
    recipe.write_text("base: base.yaml\n")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_run_config(recipe)
    assert caught.value.where == str(base)
    base.write_text("optim: {rate: 1}\n")
    with pytest.raises(ConfigError, match=r"optim\.rate") as caught:
        load_run_config(recipe)
    assert caught.value.where == f"{base}: optim.rate"
    for name in ("base.yaml", "recipe.yaml"):
        base.write_text(f"base: {name}\n")
        with pytest.raises(ConfigError, match="based on itself"):
            load_run_config(recipe)
    for name in ("../base.yaml", "/etc/hostname", "''", "[a]", "7"):
        recipe.write_text(f"base: {name}\n")
        with pytest.raises(ConfigError, match="no name of a recipe"):
            load_run_config(recipe)
