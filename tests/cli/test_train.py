"""Faults in recipe and DeepSpeed file, said by each rank for itself before anything heavy is imported."""

from __future__ import annotations

import pytest

from janus_ds.cli import train
from janus_ds.cli.train import check_faults, parse_options, refusing_faults
from janus_ds.config.load import load_run_config
from janus_ds.errors import ConfigError, UsageError
from tests.support.programs import ROOT, python

ZERO2 = str(ROOT / "ds_configs" / "zero2.json")
RECIPE = ROOT / "launch" / "recipes" / "quickstart.yaml"
LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")


@pytest.fixture(autouse=True)
def _not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train, "_FOLLOWER_DELAY", 0.0)


def leaving(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and what was said; 0 where the program goes on."""
    try:
        with refusing_faults():
            check_faults(parse_options(["--deepspeed_config", ZERO2, *words], RECIPE, "Test."))
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().err
    return 0, capsys.readouterr().err


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_the_batch_is_judged_for_the_ranks_that_launchers_name(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = ("--set", "train.global_batch=8")
    monkeypatch.setenv(variable, "3")
    code, said = leaving(capsys, *batch)
    assert code == ConfigError.exit_code
    assert "cannot be shared by 3 data-parallel ranks" in said
    monkeypatch.setenv(variable, "4")
    assert leaving(capsys, *batch, "--tensor-parallel", "2") == (0, "")
    # What cannot be is said later, by the module that knows of ranks.
    assert leaving(capsys, *batch, "--tensor-parallel", "3") == (0, "")


def test_one_rank_a_host_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ("--set", "model.heds=3")
    assert "did you mean 'model.heads'?" in leaving(capsys, *wrong)[1]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert leaving(capsys, *wrong) == (ConfigError.exit_code, "")


def test_an_address_in_place_of_a_path_is_refused_in_words() -> None:
    options = ["--deepspeed_config", "zero2", "--output", "s3://bucket/run"]
    for rank, said in (("0", "error: this has to be a path on this machine"), ("1", "")):
        done = python("launch/pretrain.py", *options, LOCAL_RANK=rank)
        assert done.returncode == UsageError.exit_code
        assert done.stderr[: len(said)] == said
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("option", ["--data", "--init", "--output", "--recipe"])
def test_a_variable_that_is_not_set_is_not_taken_for_no_option(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = leaving(capsys, option, "")
    assert code == UsageError.exit_code
    assert "variable of the shell is not set" in said


def test_init_none_means_random_weights() -> None:
    given = ["--deepspeed_config", ZERO2]
    recipe = RECIPE.with_name("second_stage.yaml")
    assert load_run_config(recipe, parse_options(given, recipe, "Test.").overrides).init == "denoiser"
    scratch = parse_options([*given, "--init", "none"], recipe, "Test.")
    assert load_run_config(recipe, scratch.overrides).init is None
