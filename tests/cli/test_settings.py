"""`janus-ds explain` and `check`: what fields mean, what presets give, and whether a run would start."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
import torch

from janus_ds.__main__ import main
from janus_ds.checkpoint.tensors import write_tensors
from janus_ds.cli.settings import explain
from janus_ds.config.schema import FIELDS
from janus_ds.data.prepare.train_tokenizer import train_sentencepiece
from janus_ds.errors import CheckpointError, ConfigError, DataError, UsageError
from tests.support.commands import SMALL, ZERO2, refusal, say


def test_values_of_the_models_presets_are_shown() -> None:
    assert "           bart_base: 768" in explain("model.d_model").splitlines()


def test_the_command_told_after_init_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "my files")]) == 0
    words = shlex.split(capsys.readouterr().out.partition("try: ")[2])
    assert words[:3] == ["janus-ds", "check", "--recipe"]
    assert Path(words[3]).is_file()


def test_names_that_are_near_are_given() -> None:
    with pytest.raises(UsageError, match=r"did you mean one of objective\.weight_ar, objective\.weight_nar"):
        explain("weight")


def test_home_is_found_behind_an_equals_sign(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("Hallo.\n")
    words = ["--input=~/text.txt", "--output=~/out.txt", "--device", "cpu", "--mode", "ar"]
    assert main(["decode", "--demo", *words]) == 0
    assert len((tmp_path / "out.txt").read_text().splitlines()) == 1


def test_every_path_of_a_command_may_begin_at_home() -> None:
    """Also of the programs of launch/ and eval/, which do not go through `janus-ds`."""
    files = (Path(__file__).parents[2] / "janus_ds" / "cli").glob("*.py")
    assert not [path.name for path in files if "type=Path" in path.read_text(encoding="utf-8")]


def test_nothing_is_written_as_recipes_write_it() -> None:
    assert all("None" not in explain(key) for key in [None, *FIELDS])


def test_explain_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    keys = [line.split()[0] for line in say(capsys, "explain").splitlines()]
    assert keys == list(FIELDS)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--recipe second_stag", "second_stage"),
        ("--recipe iwsl", "iwslt"),
        ("--recipe launch/recipes/nmt_iwsl.yaml", "nmt_iwslt.yaml"),
    ],
)
def test_a_misspelt_recipe_is_told_the_nearest_name(given: str, meant: str) -> None:
    error = refusal(ConfigError, "plan", *given.split())
    assert f"did you mean {meant!r}?" in error
    assert ("second_stage, small_wikipedia" in error) == ("/" not in given)


def test_check_refuses_scores_of_a_mode_that_is_not_trained() -> None:
    pairs = ("--recipe", "iwslt", "--set", "objective.preset=ar")
    said = refusal(ConfigError, "check", "--deepspeed_config", ZERO2, *pairs, "train.batch_groups=1")
    assert "the objective 'ar' does not train mode 'nar'" in said
    assert "set train.valid_bleu to ar" in said


def test_check_and_plan_take_a_mode_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    xsum = ("--recipe", "xsum", "--mode", "ar_query", "--ranks", 2)
    assert "31,900 steps" in say(capsys, "check", "--deepspeed_config", ZERO2, *xsum)
    assert "objective ar_query" in say(capsys, "plan", *xsum)


def test_check_refuses_another_tokenizer(tiny: Path, tmp_path: Path) -> None:
    text = ["another text altogether, with other words in it"] * 9
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    train_sentencepiece(text, "bpe", 40).save(other / "tokenizer")
    said = refusal(DataError, "check", "--deepspeed_config", ZERO2, "--data", other, "--set", *SMALL)
    assert "the tokenizer is not the one that the data was prepared with" in said


def test_check_looks_at_the_weights_to_start_from(tiny: Path, tmp_path: Path) -> None:
    write_tensors(tmp_path / "other.safetensors", {"embedding.weight": torch.zeros(2, 2)})
    given = ("check", "--deepspeed_config", ZERO2, "--set", *SMALL)
    gone = f"init={tmp_path / 'gone'}"
    for command in ((*given, gone), (*given, gone, f"data.path={tiny}")):
        assert "there are no weights here" in refusal(CheckpointError, *command)
    for init, words in (
        ("denoiser", "were trained with another tokenizer than the data has"),
        (tmp_path / "other.safetensors", "the weights do not fit the model"),
    ):
        assert words in refusal(CheckpointError, *given, f"data.path={tiny}", f"init={init}")


def test_check_looks_at_the_text_that_is_scored(
    tiny_pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(tiny_pairs, tmp_path / "data"))
    pairs = ("--data", data, "--set", *SMALL, "data.task=pair", "train.valid_bleu=ar")
    assert "losses before training" in say(capsys, "check", "--deepspeed_config", ZERO2, *pairs)
    (data / "raw" / "valid.de").unlink()
    said = refusal(DataError, "check", "--deepspeed_config", ZERO2, *pairs)
    assert "the sources of split 'valid' are missing" in said
