"""Lengths that a recipe leaves open come from the manifest of its data; what is given stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from janus_ds.config.deepspeed import read_setup
from janus_ds.config.load import from_dict, load_run_config, to_dict
from janus_ds.config.locations import packaged_folder
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError
from janus_ds.train.state import changed_training

REQUESTS = {
    "blocks": ({"settings": {"block_tokens": 510}}, (510, 510)),
    "pairs": ({"settings": {"max_tokens": 254}}, (254, 254)),
    "glge": ({"settings": {"limits": {"source": 510, "target": 64}}}, (510, 64)),
    "distilled": ({"prepared": {"settings": {"max_tokens": 40}}, "distilled": {}}, (40, 40)),
}


def data(folder: Path, request: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"settings": {"request": request}}))
    return f"data.path={folder}"


def lengths(run: RunConfig) -> tuple[int, int, int]:
    return run.data.block_tokens, run.model.max_source_positions, run.model.max_target_positions


@pytest.mark.parametrize("kind", REQUESTS)
def test_blocks_and_position_tables_fit_the_data(tmp_path: Path, kind: str) -> None:
    request, (source, target) = REQUESTS[kind]
    quickstart = packaged_folder("recipes") / "quickstart.yaml"
    run = load_run_config(quickstart, [data(tmp_path, request)])
    assert lengths(run) == (target, max(128, source + 2), max(128, target + 2))
    assert run.model.length_classes == run.model.max_target_positions
    assert lengths(from_dict(to_dict(run))) == lengths(run)
    # The longest of several sources counts.
    both = f"{data(tmp_path, request)}=0.5,{data(tmp_path / 'b', REQUESTS['blocks'][0])[10:]}=0.5"
    assert load_run_config(quickstart, [both]).data.block_tokens == 510


def test_longer_tables_than_the_recipes_are_said(tmp_path: Path) -> None:
    recipe, engine = (
        packaged_folder("recipes") / "nmt_multi30k.yaml",
        packaged_folder("ds_configs") / "zero1.json",
    )
    for kind, said in (
        ("pairs", "source 256, not 128; target 256, not 128"),
        ("glge", "source 512, not 128"),
    ):
        _, execution = read_setup(recipe, [data(tmp_path, REQUESTS[kind][0])], engine, 1)
        assert execution.notes == (f"the model gets the positions that the data was prepared for: {said}",)
    assert read_setup(recipe, [data(tmp_path, REQUESTS["distilled"][0])], engine, 1)[1].notes == ()


def test_what_is_given_stays(tmp_path: Path) -> None:
    place = data(tmp_path, REQUESTS["blocks"][0])
    small = ["model.preset=quickstart", place]
    assert lengths(load_run_config(None, [*small, "data.block_tokens=99"])) == (99, 256, 256)
    with pytest.raises(ConfigError, match=r"model\.max_target_positions is 300") as caught:
        load_run_config(None, [*small, "model.max_target_positions=300"])
    assert "from the data's manifest" in caught.value.where
    with pytest.raises(ConfigError, match=r"model\.max_target_positions is 256"):
        load_run_config(None, [*small, "init=denoiser"])


@pytest.mark.parametrize("manifest", [None, "{", "[]", '{"settings": {}}', '{"settings": {"request": 3}}'])
def test_without_a_manifest_the_model_says_how_long_targets_may_be(
    tmp_path: Path, manifest: str | None
) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    for place in (str(tmp_path), "http://127.0.0.1:9/x", "pipe:cat x/{}"):
        assert lengths(load_run_config(None, [f"data.path={place}"])) == (1022, 1024, 1024)
    assert lengths(load_run_config(None)) == (30, 1024, 1024)


def test_a_run_goes_on_whatever_said_how_long_its_blocks_are(tmp_path: Path) -> None:
    old = load_run_config(None, ["data.block_tokens=126"])
    now = load_run_config(None, [data(tmp_path, REQUESTS["distilled"][0])])
    assert changed_training(old, now) == []
    assert changed_training(old, load_run_config(None, ["optim.lr=1", "name=x"])) == ["optim.lr"]
