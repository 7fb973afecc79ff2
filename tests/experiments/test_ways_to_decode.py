"""launch/experiments/ways_to_decode.py: any checkpoint, in pieces; blanks filled; what it cannot do."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from janus_ds.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("Er wohnt in Berlin.", "Ja!", "Das Haus ist alt.", "Ich habe keine Zeit.")
REFERENCES = ("He lives in Berlin.", "Yes!", "The house is old.", "I have no time.")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "launch" / "experiments")
    found = importlib.import_module("ways_to_decode")
    monkeypatch.setattr(found, "BATCH", 2)
    kept = ("AR, greedy", "draft", found.BASELINE, "AUX, 1 length")
    monkeypatch.setattr(found, "WAYS", {name: found.WAYS[name] for name in kept})
    return found


def test_a_page_in_pieces(driver: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "de").write_text("\n".join(SOURCES))
    (tmp_path / "en").write_text("\n".join(REFERENCES))
    common = ["--checkpoint", "demo", "--state", str(tmp_path / "state"), "--results", str(tmp_path)]
    text = ["--text", str(tmp_path / "de"), str(tmp_path / "en"), "--minutes", "0", "--singles", "1"]
    json_file = tmp_path / "ways_to_decode.json"
    for rounds, done in ((1, 2), (2, 4), (3, 4)):
        assert driver.main([*common, *text]) == 0
        part = json.loads(json_file.read_text())["demo"]
        assert (part["sentences"], part["singles"], part["of"]) == (done, min(rounds, 2), 4)
    pair = "Das Haus ist alt. ||| The ___ is old."
    assert driver.main([*common, "--infill", pair, "--name", "blanks"]) == 0
    content = json.loads(json_file.read_text())
    assert content["demo"] == part
    (item,) = content["blanks"]["infilling"]
    assert item["aux, 1 token"] == "The house is old."
    page = (tmp_path / "ways_to_decode.md").read_text()
    # Drafts are AR's output, and the page shows figures and blanks.
    assert part["ways"]["draft"]["bleu"] == part["ways"]["AR, greedy"]["bleu"] > 50
    assert f"| draft | {part['ways']['draft']['bleu']:.2f} |" in page
    assert "The house is old." in page
    assert (tmp_path / "figures" / "ways_to_decode.png").stat().st_size > 1000


def test_what_cannot_be_done_is_said(
    driver: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    state.write_text(json.dumps({"other": {"text": []}}))
    (tmp_path / "de").write_text("Ja!")
    text = ["--text", str(tmp_path / "de"), str(tmp_path / "de"), "--state", str(state)]
    for options, told in (
        ([], "nothing is to be"),
        (["--infill", "a ___"], "is no pair"),
        (text, "other ways"),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            driver.main(["--checkpoint", "demo", "--results", str(tmp_path), *options])
        assert caught.value.where
        assert caught.value.fix
