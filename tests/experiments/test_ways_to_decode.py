"""launch/experiments/ways_to_decode.py: any checkpoint, in pieces; blanks filled; what it cannot do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import ways_to_decode as driver

from janus_ds.decode.load import load_run
from janus_ds.errors import UsageError

SOURCES = ("Er wohnt in Berlin.", "Ja!", "Das Haus ist alt.", "Ich habe keine Zeit.")
REFERENCES = ("He lives in Berlin.", "Yes!", "The house is old.", "I have no time.")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "BATCH", 2)
    kept = ("AR, greedy", "draft", driver.BASELINE, "AUX, 1 length")
    monkeypatch.setattr(driver, "WAYS", {name: driver.WAYS[name] for name in kept})


def test_a_page_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "de").write_text("\n".join(SOURCES))
    (tmp_path / "en").write_text("\n".join(REFERENCES))
    common = ["--checkpoint", "demo", "--state", str(tmp_path / "runs" / "state"), "--results", str(tmp_path)]
    text = ["--text", str(tmp_path / "de"), str(tmp_path / "en"), "--minutes", "0", "--singles", "1"]
    json_file = tmp_path / "ways_to_decode.json"
    with monkeypatch.context() as undrawn:
        undrawn.setattr(driver, "draw", lambda content, path: None)
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
    assert driver.main([*common, *text, "--name", "questions", "--task", "squadqg"]) == 0
    page = (tmp_path / "ways_to_decode.md").read_text()
    assert "| way | ROUGE-L | BLEU-4 |" in page
    part = json.loads(json_file.read_text())["questions"]
    assert part["ways"]["draft"]["rougeL"] > 50


def test_what_other_weights_gave_leaves_the_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "draw", lambda content, path: None)
    monkeypatch.setattr(driver, "filled", lambda *_: {"source": "a", "target": "b"})
    figures = tmp_path / "ways_to_decode.json"
    figures.write_text(json.dumps({"demo": {"weights": "of before", "notes": ["old"]}, "x": {"notes": []}}))
    for notes in (None, ["mine"]):
        driver.main(["--checkpoint", "demo", "--results", str(tmp_path), "--infill", "a ||| ___"])
        content = json.loads(figures.read_text())
        assert content["demo"].get("notes") == notes
        assert content["demo"]["infilling"]
        assert content["x"] == {"notes": []}
        content["demo"]["notes"] = ["mine"]
        figures.write_text(json.dumps(content))
    assert driver.kept_of({"updates": 20, "ways": {}}, {"weights": "", "updates": 40}) == {}


def test_ways_that_were_not_trained_are_left_out() -> None:
    run = load_run("demo")
    config = replace(run.config, objective=replace(run.config.objective, weight_ar=0.0))
    names, left = driver.available(replace(run, config=config))
    assert names == [driver.BASELINE, "AUX, 1 length"]
    assert set(left) == {"AR, greedy", "draft"}
    assert all("objective.weight_ar is 0.0" in what for what in left.values())


def test_how_far_a_run_was_trained_is_said(tmp_path: Path) -> None:
    run, best = load_run("demo"), tmp_path / "checkpoints" / "best"
    assert driver.training(run) == {}
    best.mkdir(parents=True)
    (best / "best.json").write_text('{"step": 40, "valid_bleu": {"ar": 34.513}, "mode": "ar"}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 50}\n')
    words = ["/x/clone/launch/finetune.py", "--output", str(tmp_path), "--set", "name=my run"]
    (tmp_path / "run.json").write_text(json.dumps({"command": words}))
    config = replace(run.config, train=replace(run.config.train, max_steps=60))
    begun = replace(run, folder=tmp_path, weights=best / "weights.safetensors", config=config)
    found = driver.training(begun)
    command = f"launch/finetune.py --output runs/{tmp_path.name} --set 'name=my run'"
    assert found == {
        **{"updates": 40, "made": 50, "planned": 60, "validation": {"bleu": {"ar": 34.513}}},
        "command": command,
    }
    page = driver.page({"run": found})
    assert "update 40 (BLEU of the validation set: AR 34.51)" in page
    assert "50 of 60 updates" in page
    assert f"Trained by `{command}`." in page
    assert "the run is finished" in driver.page({"run": found | {"made": 60}})


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.write_text(json.dumps({"of": "another text", "ways": {}}))
    (tmp_path / "de").write_text("Ja!")
    text = ["--text", str(tmp_path / "de"), str(tmp_path / "de"), "--state", str(state)]
    for options, told in (
        ([], "nothing is to be"),
        (["--infill", "a ___"], "is no pair"),
        (text, "another checkpoint, text"),
        ([*text, "--task", "squadq"], "no task 'squadq'"),
        (
            [*text, "--checkpoint", "denoiser"],
            "compared with NAR 10, 3 lengths, and the model was not trained",
        ),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            driver.main(["--checkpoint", "demo", "--results", str(tmp_path), *options])
        assert caught.value.where
        assert caught.value.fix
