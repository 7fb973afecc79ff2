"""What a run takes over from the run it starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from janus_ds.config.initial import record_of
from janus_ds.config.load import from_dict, load_run_config, to_dict
from janus_ds.tools.convert import main
from tests.support.hf_folder import hub_folder

PAIR = ["data.task=pair"]


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("initial")
    main(["--from", "hf", str(hub_folder(folder / "hub")), "--to", str(folder / "bart")])
    return folder / "bart"


def test_pairs_start_as_the_run_they_come_from(bart: Path) -> None:
    assert load_run_config(None, PAIR).objective.decoder_start == "bos"
    followed = load_run_config(None, [*PAIR, f"init={bart}"])
    assert followed.objective.decoder_start == "eos_bos"
    assert from_dict(to_dict(followed)) == followed
    own = load_run_config(None, [*PAIR, f"init={bart}", "objective.decoder_start=bos"])
    assert own.objective.decoder_start == "bos"
    nothing = load_run_config(None, [*PAIR, f"init={bart.parent}"])
    assert nothing.objective.decoder_start == "bos"


def test_the_record_is_found_from_every_way_to_name_weights(bart: Path, tmp_path: Path) -> None:
    name = record_of(bart)["name"]
    checkpoint = bart / "checkpoints" / "step-00000001"
    for place in (bart / "weights.safetensors", checkpoint, checkpoint / "weights.safetensors"):
        assert record_of(place)["name"] == name
    assert record_of(tmp_path / "none") == {}
