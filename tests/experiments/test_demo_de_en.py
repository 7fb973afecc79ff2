"""The demonstration model: cutting long lines, what is missing, and from text to asset on a tiny model."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import demo_de_en
import demo_scores as scores
import driver
import pytest

from janus_ds.config.locations import DEMO, model_path
from janus_ds.decode.generator import Generator
from janus_ds.errors import MissingDependencyError, UsageError
from tests.support.experiment_runs import drive
from tests.support.tiny_pairs import tiny_lines

SMALL = ["model.d_model=16", "model.encoder_layers=1", "model.decoder_layers=1", "model.ffn_dim=16"]
SMALL += ["model.heads=2", "train.batch_tokens=200", "train.save_every=2", "train.valid_every=0"]
SMALL += ["train.valid_bleu=none", "train.keep_best=none"]


def texts(folder: Path) -> Path:
    """The collections that the driver reads, of a rule-made language."""
    for name in ("tatoeba_de-en", "multi30k", "iwslt14_de-en"):
        (folder / name).mkdir(parents=True)
    for side, language in enumerate(("de", "en")):
        lines = [pair[side] for pair in tiny_lines(300)]
        packed = lzma.compress("".join(f"{line}\n" for line in lines).encode())
        (folder / "tatoeba_de-en" / f"manythings2018.{language}.xz").write_bytes(packed)
        few = "".join(f"{line}\n" for line in lines[:6])
        (folder / "multi30k" / f"test_2016_flickr.{language}").write_text(few)
        tokens = "".join(f"{line[:-1]} . ,{' wort' * 40} .\n" for line in lines[:3])
        (folder / "iwslt14_de-en" / f"tok.test.{language}").write_text(tokens)
    return folder


def test_long_lines_are_cut_at_punctuation_and_lose_nothing() -> None:
    line = "eins , zwei , drei vier fünf . sechs sieben acht neun zehn elf zwölf"
    parts = scores.cut(line, lambda text: len(text.split()) <= 7)
    assert " ".join(parts) == line
    assert parts[-1] == "sechs sieben acht neun zehn elf zwölf"
    assert all(len(part.split()) <= 7 for part in parts)
    assert scores.cut("kurz .", lambda text: True) == ["kurz ."]
    # No punctuation to cut at, and a word that no cut makes fit.
    assert scores.cut("a b c d", lambda text: len(text.split()) <= 1) == ["a", "b", "c", "d"]
    assert scores.cut("lang", lambda text: False) == ["lang"]


def test_missing_text_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JANUS_SHARED_DATA", raising=False)
    with pytest.raises(MissingDependencyError, match="does not say where Tatoeba is"):
        driver.shared_text("tatoeba_de-en", "Tatoeba", "two files")
    monkeypatch.setenv("JANUS_SHARED_DATA", str(tmp_path))
    with pytest.raises(MissingDependencyError, match="Tatoeba is not here") as error:
        driver.shared_text("tatoeba_de-en", "Tatoeba", "two files")
    assert "tatoeba_de-en/ (two files)" in error.value.fix


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(MissingDependencyError, match="sacremoses, which is not installed"):
        scores._moses()


def test_iwslt_is_decoded_in_the_precision_of_the_other_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[list[str]] = []

    def run_logged(folder: Path, name: str, command: list[str]) -> None:
        output = Path(command[command.index("--output") + 1])
        if name == "decode":
            decoded.append(command)
            output.write_text(Path(command[command.index("--input") + 1]).read_text())
        else:
            output.write_text("{}")

    monkeypatch.setattr(scores, "run_logged", run_logged)
    official = texts(tmp_path) / "iwslt14_de-en"
    found = scores._score_iwslt(model_path(DEMO), tmp_path / "out", official, scores._moses(), 0)
    assert set(found) == set(scores.SYSTEMS)
    assert [command[command.index("--dtype") + 1] for command in decoded] == ["fp32"] * len(found)


def test_what_it_starts_from_must_tell_of_its_training(tmp_path: Path) -> None:
    assert demo_de_en.parse(["--start", "demo"]).start == model_path(DEMO)
    (tmp_path / "run.json").write_text('{"recipe": {}}')
    with pytest.raises(UsageError, match="how it was trained"):
        demo_de_en.parse(["--start", str(tmp_path)])


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_from_text_to_asset(tmp_path: Path) -> None:
    shared, root, asset = texts(tmp_path / "shared"), tmp_path / "root", tmp_path / "asset"
    given = ["--vocab", "60", "--valid", "8", "--test", "8", "--ar-steps", "2", "--set", *SMALL]
    drive("demo_de_en", root, shared, "--janus-steps", "2", *given)
    drive("demo_de_en", root, shared, "--janus-steps", "4", *given)
    assert [p.name for p in sorted(root.glob("janus/checkpoints/step-*"))] == [
        "step-00000002",
        "step-00000004",
    ]
    recipe = json.loads((root / "janus" / "run.json").read_text())["recipe"]
    assert recipe["init"] == str(root / "ar")
    drive("demo_de_en", root, shared, "--ship", "--asset", str(asset), "--page", str(tmp_path / "page.md"))
    training = json.loads((asset / "run.json").read_text())["training"]
    assert (training["averaged_steps"], training["ar_steps"]) == ([2, 4], 2)
    scores = json.loads((asset / "scores.json").read_text())
    assert {name: part["n"] for name, part in scores.items()} == {
        "tatoeba": 8,
        "multi30k_test_2016_flickr": 6,
        "iwslt14_test": 3,
    }
    assert "4 updates JANUS" in (tmp_path / "page.md").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in asset.glob("*.json"))
    generator = Generator.from_checkpoint(asset, "nar", device="cpu")
    assert len(generator.generate(["der mann sieht nichts ."])) == 1
