"""The demonstration model: its making from a run, `--demo`, and the shipped one itself."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import demo_asset
import pytest
import torch
from demo_asset import MOST_BYTES, folder_bytes, ship

from janus_ds.checkpoint.manifest import WEIGHTS_FILE
from janus_ds.checkpoint.tensors import read_weights
from janus_ds.cli import decode
from janus_ds.cli.decode import DEMO_SENTENCES
from janus_ds.cli.demo import Demo
from janus_ds.config.load import load_run_config, to_dict
from janus_ds.config.locations import DEMO, DENOISER, model_path, packaged_folder
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run
from janus_ds.errors import CheckpointError
from tests.support.tiny_run import make_run

SENTENCES = {
    "Ich habe ein neues Auto.": {"car"},
    "Meine Mutter ist krank.": {"mother"},
    "Wo ist der Bahnhof?": {"where", "station"},
    "Ich trinke gern Kaffee.": {"coffee"},
    "Er hat drei Brüder.": {"three", "brothers"},
    "Das Wasser ist kalt.": {"water", "cold"},
}
"""Words that a translation of each must have one of."""


@pytest.fixture(scope="module")
def run(tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("demo") / "run", tiny_pairs, "paper", positions=80)


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(text: str) -> None:
        stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(text.encode())))
        monkeypatch.setattr(sys, "stdin", stream)

    return give


def test_a_run_becomes_a_folder_to_ship(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "asset"
    output.mkdir()
    (output / "README.md").write_text("stays")
    about = {"data": "tiny"}
    shipped = ship(run, output, average=8, about=about)
    assert shipped["training"] == {"data": "tiny", "averaged_steps": [5, 10]}
    weights = read_weights(output / WEIGHTS_FILE)
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    old = [read_weights(run / "checkpoints" / f"step-{step:08d}" / WEIGHTS_FILE) for step in (5, 10)]
    for name, value in weights.items():
        torch.testing.assert_close(value.float(), (old[0][name] + old[1][name]) / 2, rtol=1e-2, atol=1e-3)
    text = (output / "run.json").read_text()
    assert str(tmp_path) not in text
    assert str(run.parent) not in text
    assert (output / "README.md").read_text() == "stays"
    assert load_run(output).config.data.path is None
    # Twice gives the same bytes; a model too large is refused and leaves what is there.
    before = (output / WEIGHTS_FILE).read_bytes()
    assert ship(run, output, average=2, about=about) == shipped
    assert (output / WEIGHTS_FILE).read_bytes() == before
    monkeypatch.setattr(demo_asset, "MOST_BYTES", 1000)
    with pytest.raises(CheckpointError, match="more than the 1,000 that may be shipped"):
        ship(run, output, average=1, about=about)
    assert (output / WEIGHTS_FILE).read_bytes() == before


def test_the_name_demo_means_the_shipped_folder(
    run: Path,
    tmp_path: Path,
    standard_input: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ship(run, tmp_path / "assets" / "demo", 1, {})
    monkeypatch.setattr("janus_ds.config.locations._PACKAGE", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert load_run("demo").folder == tmp_path / "assets" / "demo"
    # Nothing given: its own sentences, both ways.
    standard_input("")
    assert decode.main(["--demo", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    count = len(DEMO_SENTENCES)
    assert (told.count("\nAR "), told.count("\nNAR "), told.count("source ")) == (count, count, count)
    assert DEMO_SENTENCES[0] in told
    # A folder that happens to have the name is not what the option means.
    (tmp_path / "demo").mkdir()
    standard_input("der mann sieht nichts .\nein kind kennt drei briefe .\n")
    assert decode.main(["--demo", "--mode", "nar", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert Demo(None, "cpu").name == "demo"
    # As a path it comes first.
    (tmp_path / "demo").rmdir()
    ship(run, tmp_path / "demo", 1, {})
    assert load_run("demo").folder == Path("demo")


needs_asset = pytest.mark.skipif(
    not (model_path(DEMO) / WEIGHTS_FILE).is_file(), reason="the demonstration model is not in this tree yet"
)


@needs_asset
def test_the_shipped_folder_is_small_and_whole() -> None:
    folder = model_path(DEMO)
    assert folder_bytes(folder) <= MOST_BYTES
    assert "CC BY 2.0" in (folder / "README.md").read_text()
    assert "tatoeba.org" in (folder / "README.md").read_text()
    record = json.loads((folder / "run.json").read_text())
    assert record["recipe"]["data"]["path"] is None
    assert record["training"]["averaged_steps"]
    scores = json.loads((folder / "scores.json").read_text())
    assert {"tatoeba", "multi30k_test_2016_flickr", "iwslt14_test"} <= set(scores)
    for part in scores.values():
        assert set(part["systems"]) == {"ar", "nar-0", "nar-1", "nar-4", "nar-10"}
        assert part["n"] > 0
    for path in folder.rglob("*.json"):
        assert not any(place in path.read_text() for place in ("/work", "/root", "/home", "/tmp"))


def test_the_shipped_denoiser_is_small_whole_and_fills_a_blank() -> None:
    folder = model_path(DENOISER)
    assert folder_bytes(folder) <= MOST_BYTES
    assert "CC BY-SA 3.0" in (folder / "README.md").read_text()
    record = json.loads((folder / "run.json").read_text())
    assert record["training"]["text"]["novels_left_out"] == 10
    assert not any(place in json.dumps(record) for place in ("/work", "/root", "/home", "/tmp"))
    run = load_run_config(packaged_folder("recipes") / "second_stage.yaml")
    assert run.init == DENOISER
    assert to_dict(run)["model"] == record["recipe"]["model"] | {"preset": run.model.preset}
    generator = Generator.from_checkpoint(DENOISER, mode="ar", device="cpu")
    found = generator.generate("The old man opened the <mask> and looked <mask> the street.")[0].text
    assert found.startswith("The old man opened the ")
    assert found.endswith(" the street.")


@needs_asset
@pytest.mark.parametrize("mode", ["ar", "nar"])
def test_the_shipped_model_translates(mode: str) -> None:
    generator = Generator.from_checkpoint("demo", mode=mode, device="cpu")
    found = [hypothesis.text for hypothesis in generator.generate(list(SENTENCES))]
    assert all(found)
    words = [{word.strip(".,?!").lower() for word in text.split()} for text in found]
    right = sum(bool(has & wanted) for has, wanted in zip(words, SENTENCES.values(), strict=True))
    assert right >= 4, found


@needs_asset
def test_the_shipped_scores_are_in_order() -> None:
    scores = json.loads((model_path(DEMO) / "scores.json").read_text())
    home, away = scores["tatoeba"]["systems"], scores["iwslt14_test"]["systems"]
    assert home["ar"]["tokenized_bleu"] > away["ar"]["tokenized_bleu"]
    assert home["nar-10"]["tokenized_bleu"] >= home["nar-0"]["tokenized_bleu"]
