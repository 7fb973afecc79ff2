"""Values and files that look like one thing and are another: understood, or refused in three parts."""

from __future__ import annotations

import json
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from janus_ds.config.deepspeed import read_deepspeed_config
from janus_ds.config.fields import ConfigFaultsError, FaultList
from janus_ds.config.load import from_dict, load_run_config, to_dict
from janus_ds.config.locations import parse_locations, tokenizer_name, user_path
from janus_ds.config.presets import record_of
from janus_ds.config.schema import FIELDS, RETIRED, Retired, RunConfig
from janus_ds.errors import ConfigError

DIGITS = "7" * 5000


def both_ways(folder: Path, key: str, text: str) -> list[RunConfig | ConfigError]:
    """What a value in a recipe and the same after --set become."""
    section, _, name = key.rpartition(".")
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"{section}:\n  {name}: {text}\n" if section else f"{name}: {text}\n")
    found: list[RunConfig | ConfigError] = []
    for path, overrides in ((recipe, []), (None, [f"{key}={text}"])):
        try:
            found.append(load_run_config(path, overrides))
        except ConfigError as error:
            found.append(error)
    return found


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "1E-4", 1e-4),
        ("optim.lr", "+.5e-3", 5e-4),
        ("optim.lr", "1", 1.0),
        ("train.spike_action", "off", "off"),
        ("name", "2024-01-01", "2024-01-01"),
        ("name", "1:30", "1:30"),
        ("name", "on", "on"),
        ("name", "0x10", "0x10"),
        ("init", "null", None),
        ("data.path", "/data/x=y", "/data/x=y"),
        ("model.length_classes", "~", 1024),
        ("model.layernorm_embedding", "false", False),
        ("objective.weight_aux", "2", 2.0),
        ("model.scale_embedding", "yes", True),
        ("model.scale_embedding", "Off", False),
        ("train.seed", "9223372036854775807", 2**63 - 1),
        ("objective.weight_aux", "~", 1.0),
    ],
)
def test_understood(tmp_path: Path, key: str, text: str, value: object) -> None:
    for run in both_ways(tmp_path, key, text):
        assert isinstance(run, RunConfig), run
        assert attrgetter(key)(run) == value
        assert type(attrgetter(key)(run)) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("train.max_steps", "1:30", "not '1:30' (text)"),
        ("train.max_steps", "010", "not '010' (text)"),
        ("train.max_steps", "1_000", "not '1_000' (text)"),
        ("train.max_steps", "0x10", "not '0x10' (text)"),
        ("train.max_steps", "2024-01-01", "not '2024-01-01' (text)"),
        ("train.max_steps", '"10"', "not '10' (text)"),
        ("train.max_steps", "1e3", "not 1000.0 (a number)"),
        ("train.max_steps", "yes", "not 'yes' (text)"),
        ("train.max_steps", "true", "not True (true or false)"),
        ("train.max_steps", DIGITS, "must be a whole number"),
        ("train.max_steps", "!!int x", None),
        ("train.max_steps", "!!python/object:os.system x", None),
        ("train.seed", "18446744073709551617", "at most 2^63 - 1"),
        ("decode.seed", "18446744073709551617", "at most 2^63 - 1"),
        ("train.seed", "-1", "at least 0"),
        ("optim.lr", ".inf", "more than 0"),
        ("optim.lr", "1e999", "more than 0"),
        ("optim.lr", ".nan", "more than 0"),
        ("optim.lr", "true", "must be a number"),
        ("optim.lr", '"1e-4"', "must be a number, not '1e-4' (text)"),
        ("optim.lr", DIGITS, "must be a number"),
        ("train.stall_minutes", ".inf", "finite and at least 0"),
        ("optim.lr", "[" * 800 + "]" * 800, None),
        ("optim.lr", "{a: 1}", "not a section"),
        ("optim.lr", "[1]", "not a list"),
    ],
)
def test_refused(tmp_path: Path, key: str, text: str, words: str | None) -> None:
    for error in both_ways(tmp_path, key, text):
        assert isinstance(error, ConfigError)
        assert words is None or words in error.what, error.what
        assert error.exit_code == 3
        assert error.where
        assert error.fix
        assert len(str(error)) < 1000


@pytest.mark.parametrize(
    "name", ["../../x/tiny", "a/b", "a\\b", "..", ".hidden", "", "x\ny", "x" * 101, "a ", "a\u200b"]
)
def test_a_run_cannot_be_named_as_a_path(tmp_path: Path, name: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: {json.dumps(name)}\n")
    with pytest.raises(ConfigError, match="it names the folder") as caught:
        load_run_config(recipe)
    assert "name" in caught.value.where
    # Runs of earlier versions that had such names can still be decoded.
    assert from_dict({"name": name}).name == name


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a: [" * 5000, "nested too deeply"),
        (b"[1, 2]: 3\n", "is a list or a mapping"),
        (b"? {a: 1}\n: 3\n", "is a list or a mapping"),
        (b"train: !!float abc\n", "not valid YAML"),
        (b"train: !!timestamp abc\n", "not valid YAML"),
        (b"train: !!bool abc\n", "not valid YAML"),
        (b"train: !!int\n", "not valid YAML"),
        (b"name: \x00\n", "NUL bytes"),
        ("name: x\n".encode("utf-16-le"), "NUL bytes, as UTF-16"),
        (b"\xff\xfen\x00a\x00", "not UTF-8"),
        (b"#" * (1 << 20) + b"#\n", "larger than"),
        (b"%s: 1\n" % (b"x" * 1000), "unknown key"),
        (b"<<: 3\n", "not valid YAML"),
        (b"model: [", "not valid YAML"),
        (b"- 1\n- 2\n", "not a mapping"),
        (b"name: a\nname: b\n", "the key 'name' is given twice"),
        (b"optim:\n  lr: 1\n  lr: 2\n", "the key 'lr' is given twice"),
    ],
)
def test_recipes_that_are_none(tmp_path: Path, data: bytes, words: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(data)
    with pytest.raises(ConfigFaultsError, match=words) as caught:
        load_run_config(recipe)
    assert str(recipe) in caught.value.where
    assert len(str(caught.value)) < 1000


def test_a_byte_order_mark_is_no_fault_of_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: marked\n", encoding="utf-8-sig")
    assert load_run_config(recipe).name == "marked"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("// my config\n{}", "it has a comment"),
        ('{\n  /* how */ "fp16": {}\n}', "it has a comment"),
        ('{"fp16": {}, # how\n}', "it has a comment"),
        ("\xef\xbb\xbf{}", "save it as UTF-8 without BOM: sed -i"),
        (" \n", "it is empty"),
        ('{"a": ', "not valid JSON"),
        ("[1]", "not a JSON object"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "the key 'steps_per_print' is given twice"),
        ('{"steps_per_print": "\xff"}', "not UTF-8"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
        (f'{{"train_batch_size": {DIGITS}}}', "digits"),
        (f'{{"train_batch_size": {DIGITS[:4000]}}}', "train_batch_size is a number of more than 60 digits"),
        ('{"gradient_clipping": NaN}', "NaN is no number of JSON"),
        ('{"gradient_clipping": 1e999}', "gradient_clipping is inf"),
        ('{"optimizer": {"params": {"lr": -Infinity}}}', "-Infinity is no number of JSON"),
        ('{"zero_optimization": {"stage": [1]}}', "there is no ZeRO stage [1]"),
        ('{"gradient_clipping": [1]}', "gradient_clipping is [1]"),
        ('{"train_batch_size": {"a": 1}}', "train_batch_size is {'a': 1}"),
        ('{"optimizer": {"type": [1], "params": {"betas": 3}}}', "optimizer.type is [1]"),
        ('{"scheduler": {"type": {"a": 1}}}', "scheduler.type is {'a': 1}"),
        ('{"zero_optimization": {"offload_optimizer": 3}}', "offload_optimizer must be an object"),
    ],
)
def test_deepspeed_files_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigFaultsError) as caught:
        read_deepspeed_config(path, load_run_config(None), 1, FaultList())
    assert words in str(caught.value)
    assert str(path) in caught.value.where
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("values", [[], 3, "x", {"model": 3}, {"model": {"d_model": 10**400}}, {3: 4}])
def test_records_that_are_none(values: Any) -> None:
    with pytest.raises(ConfigFaultsError):
        from_dict(values)


@pytest.mark.parametrize("text", ["[" * 200_000, "[]", '{"recipe": 3}', '{"recipe": {"objective": []}}', ""])
def test_a_run_to_start_from_with_a_broken_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert isinstance(record_of(tmp_path), dict)
    run = load_run_config(None, [f"init={tmp_path}", "data.task=pair"])
    assert run.objective.decoder_start == "bos"


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    run = load_run_config(None, ["data.path=~/data", "init=~/runs/a", "data.valid_path=~/valid"])
    assert (run.data.path, run.init) == ("/home/me/data", "/home/me/runs/a")
    assert run.data.valid_path == "/home/me/valid"
    mixed = parse_locations("~/a=0.5,~/b=0.5")
    assert [place.location for place in mixed] == ["/home/me/a", "/home/me/b"]
    long = ",".join(f"source-{n:03}=0.5" for n in range(50))
    assert len(parse_locations(long)) == 50
    assert str(user_path("~/x.yaml")) == "/home/me/x.yaml"
    assert os.fspath(user_path("x~")) == "x~"
    assert tokenizer_name("~/x") == "/home/me/x"
    assert tokenizer_name("sentencepiece-bpe") == "sentencepiece-bpe"


def test_each_value_has_its_origin(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {preset: bart_base}\nobjective: {preset: released}\n")
    origins = {
        "model.heads=7": "--set model.heads=7: model.heads",
        "model.d_model=500": f"{recipe}: model.heads (from preset bart_base)",
        "optim.lr=1e-9": f"{recipe}: optim.warmup_init_lr (the default)",
        "data.task=pair objective.weight_ar=0 objective.weight_nar=0 objective.weight_kl_ar_ar=0 "
        "objective.encoder_passes=2": "--set objective.encoder_passes=2: objective.encoder_passes",
        "masking.source_share=0.4 masking.target=infilling": "--set masking.source_share=0.4: "
        "masking.source_share",
        "masking.target=infilling masking.target_share=0.2": f"{recipe}: masking.source_share "
        "(from preset released)",
    }
    for overrides, origin in origins.items():
        with pytest.raises(ConfigFaultsError) as caught:
            load_run_config(recipe, overrides.split())
        assert caught.value.where == origin


def test_retired_keys_are_taken_at_the_value_that_means_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RETIRED, "objective.old", Retired(0.5, "it cost 3 BLEU"))
    monkeypatch.setitem(RETIRED, "decode.old", Retired(False, "it was not faster"))
    plain = load_run_config(None)
    assert load_run_config(None, ["objective.old=.5", "decode.old=false"]) == plain
    values = to_dict(plain)
    values["objective"]["old"] = 0.5
    assert from_dict(values) == plain
    refused = {"objective.old=1": "3 BLEU", "decode.old=true": "faster", "decode.old=0": "decode.old 0"}
    for override, reason in refused.items():
        with pytest.raises(ConfigError, match="is no longer known") as caught:
            load_run_config(None, [override])
        assert caught.value.exit_code == 3
        assert reason in caught.value.what
        assert override in caught.value.where


def test_retired_keys_are_gone_or_neutral_by_default() -> None:
    for key, retired in RETIRED.items():
        assert key not in FIELDS or FIELDS[key].default == retired.neutral


def test_a_named_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(ConfigError, match="the recipe is a named pipe"):
        load_run_config(tmp_path / "recipe.yaml", [])
