"""The convergence experiment: its commands, and its page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convergence
import pytest
import results
from driver import ROOT
from results import collect

from janus_ds.config.load import load_run_config
from janus_ds.errors import ConfigError, UsageError
from tests.support.experiment_runs import made_run


def test_convergence_runs_are_the_products_own_commands(tmp_path):
    folder = tmp_path / "en-de"
    folder.mkdir()
    options = convergence.parse(["--root", str(tmp_path)])
    runs = convergence.runs_of(options)
    settings = ["name=ar-4k-s1", "train.seed=1", *convergence.VARIANTS["ar"]]
    goal = {"steps": 4000, "settings": settings}
    assert (options.root, runs["ar-4k-s1"].goal("train")) == (folder, goal)
    assert runs["ar-4k-s1"].goal("evaluate") == {**goal, "lines": 1000, "average": 5}
    assert runs["paper_2enc-12k-s1"].train[1:] == [
        str(ROOT / "launch" / "finetune.py"),
        *("--recipe", str(ROOT / "launch" / "recipes" / "nmt_multi30k_en_de.yaml")),
        *("--deepspeed_config", str(folder / "deepspeed.json"), "--data", str(folder / "data")),
        *("--output", str(folder / "paper_2enc-12k-s1"), "--set", "name=paper_2enc-12k-s1", "train.seed=1"),
        *("objective.preset=paper", "objective.encoder_passes=2", "masking.target=span_union"),
        *("masking.target_share=0.7", "train.max_steps=12000"),
    ]
    assert (runs["ar-4k-s2"].evaluate or [])[2:] == [
        *("--checkpoint", str(folder / "ar-4k-s2"), "--average", "5", "--limit", "0", "--split", "test"),
        *("--output", str(folder / "ar-4k-s2" / "eval" / "test")),
    ]
    own, steps = convergence.overrides_of("ar+model.dropout=0.4-0.5k-s3")
    assert (own[-2:], steps) == (["model.dropout=0.4", "train.max_steps=500"], 500)
    for name in ("janusz-4k-s1", "ar", "ar-s1", "ar+dropout-4k-s1", "ar@0-4k-s1", "ar@29001-4k-s1"):
        with pytest.raises(UsageError, match="there is no run"):
            convergence.overrides_of(name)
    with pytest.raises(ConfigError, match=r"model\.dropuot"):
        convergence.parse(["--only", "ar-4k-s1,ar+model.dropuot=0.4-4k-s1"])
    for only, given, kept in (
        ("ar-4k-s1", ["--average", "6"], 5),
        ("ar-0.25k-s1", ["--set", "optim.warmup_steps=100"], 3),
        ("ar-4k-s1", ["--average", "41", "--set", "train.keep_every=100"], 40),
    ):
        with pytest.raises(UsageError, match=f"{only} will have {kept} checkpoints"):
            convergence.parse(["--only", only, *given])
    convergence.parse(["--average", "6", "--set", "train.keep_last=6"])
    for name in convergence.RUNS:
        run = load_run_config(convergence.RECIPE, convergence.overrides_of(name)[0])
        assert run.train.keep_best in run.train.valid_bleu


def test_runs_of_fewer_pairs_have_data_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("JANUS_SHARED_DATA", str(tmp_path))
    for stem in ("train", "val", "test_2016_flickr"):
        for side in ("en", "de"):
            path = tmp_path / "multi30k" / f"{stem}.{side}"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"one {side}\ntwo {side}\nthree {side}\n")
    folder = tmp_path / "en-de"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "manifest.json").touch()
    options = convergence.parse(["--root", str(tmp_path), "--only", "ar-2k-s1,ar@2-2k-s1,paper@2-2k-s1"])
    whole, few, _ = (run.train for run in convergence.runs_of(options).values())
    assert (whole[whole.index("--data") + 1], few[few.index("--data") + 1]) == (
        str(folder / "data"),
        str(folder / "data-2"),
    )
    (command,) = convergence.prepare(options)
    files = [str(folder / f"data-2.{side}") for side in ("en", "de")]
    assert command[-5:] == ["--train", *files, "--output", str(folder / "data-2")]
    assert command[command.index("--tokenizer") + 1] == str(folder / "data" / "tokenizer")
    assert (folder / "data-2.de").read_text() == "one de\ntwo de\n"


def test_a_runs_state_says_how_far_it_has_come():
    run = {"updates": 50, "recipe": {"train": {"max_steps": 4000}}}
    assert convergence.state_of(run) == "under way, of 4,000"
    assert convergence.state_of({**run, "updates": 4000}) == "at its end"


def report(folder: Path, results: Path, draw: Callable[..., Any] = lambda runs, folder: []) -> str:
    """The page; without figures, which take longest, where none are looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "draw", draw)
        convergence.report(convergence.parse(["--report", "--root", str(folder), "--results", str(results)]))
    return (results / "convergence.md").read_text()


def test_the_convergence_page_shows_runs_under_way_and_finished_ones(tmp_path):
    folder, results = tmp_path / "runs" / "en-de", tmp_path / "results"
    made_run(folder / "ar-4k-s1", "pair", "ar", {"ar": nmt_score(35.0)})
    made_run(folder / "paper-4k-s1", "pair", "paper", {"ar": nmt_score(36.0), "nar-10": nmt_score(33.5)})
    made_run(folder / "paper-4k-s2", "pair", "paper", {"ar": nmt_score(37.0), "nar-10": nmt_score(34.5)})
    (folder / "cmlm-4k-s1").mkdir()
    (folder / "cmlm-4k-s1" / "metrics.jsonl").touch()
    made_run(folder / "paper-4k-s2.old", "pair", "paper", {"ar": nmt_score(37.0)})
    tried = "paper+objective.weight_kl_ar_aux=1+model.dropout=0.4-4k-s1"
    made_run(folder / tried, "pair", "paper", {"ar": nmt_score(34.0)})
    for name, text in (("ar-4k-s1", "a b c d e\n"), ("paper-4k-s1", "a b c d f\n"), (tried, "a b c d e\n")):
        (folder / name / "eval" / "test" / "ar.txt").write_text(text)
        (folder / name / "eval" / "test" / "references.txt").write_text("a b c d f\n")
    results.mkdir()
    (results / "convergence_answers.md").write_text("It is too early to say.\n")
    text = report(folder.parent, results, convergence.draw)
    assert "It is too early to say." in text
    assert "| ar-4k-s1 | 35.00 |" in text
    assert f"| {tried} | 34.00 |" in text
    assert "s2.old" not in text, "a folder that is no run's is not another seed"
    assert "**JANUS (`paper`), 4,000 updates, 2 seeds** | 36.50 ± 0.71 |  |  |  | 34.00 ± 0.71 |" in text
    assert text.count("cmlm-4k-s1") == 1
    assert "Not begun: paper-2k-s1, ar-2k-s1, ar_rdrop-2k-s1, ar_rdrop-4k-s1, paper_2enc-4k-s1, " in text
    assert "| Is JANUS-AR above AR? (4,000 updates) | 100.00 |" in text
    assert re.search(rf"\| {re.escape(tried)} against paper-4k-s1: ar \| \d\d\.\d\d \| 100\.00 \|", text)
    row = next(line for line in text.splitlines() if line.startswith("| ar-4k-s1 | "))
    assert re.search(r"\| 20\.00 \| 60 \| [^|]*\| 0\.50 \|", row), "best validation: update, epoch, CPU hours"
    figures = re.findall(r"\((figures/.*?)\)", text)
    assert figures
    assert all((results / name).is_file() for name in figures)
    written = (results / "convergence.json").read_text() + text
    assert str(tmp_path) not in written
    assert "/elsewhere" not in written


def test_runs_of_a_machine_that_is_gone_stay_on_the_page(tmp_path):
    first, second, results = tmp_path / "first", tmp_path / "second", tmp_path / "results"
    for folder, name, text in ((first, "ar", "a b c d e\n"), (second, "paper", "a b c d f\n")):
        run = folder / "en-de" / f"{name}-4k-s1"
        made_run(run, "pair", name, {"ar": nmt_score(35.0)})
        (run / "eval" / "test" / "ar.txt").write_text(text)
        (run / "eval" / "test" / "references.txt").write_text("a b c d f\n")
    made_run(first / "en-de" / "cmlm-4k-s1", "pair", "cmlm", {})
    (first / "en-de" / "cmlm-4k-s1" / "finished.json").unlink()
    assert "| cmlm-4k-s1 | under way" in report(first, results)
    text = report(second, results)
    assert "| ar-4k-s1 | 35.00 |" in text
    assert "| paper-4k-s1 | 35.00 |" in text
    assert "| cmlm-4k-s1 |" not in text, "what was under way is lost with its machine"
    assert "| Is JANUS-AR above AR? (4,000 updates) | 100.00 |" in text
    assert (results / "outputs" / "ar-4k-s1.ar.txt").read_text() == "a b c d e\n"


def test_a_run_that_goes_on_behind_its_mark_is_not_finished(tmp_path):
    made_run(tmp_path / "one", "pair", "ar", {})
    assert collect(tmp_path, ["one"], "runs")["not_finished"] == []
    with (tmp_path / "one" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 90, "seconds": 2.0}\n')
    assert collect(tmp_path, ["one"], "runs")["not_finished"] == ["one"]


def test_cpu_time_is_that_of_all_ranks(tmp_path):
    """A run that is gone on with on two ranks costs two: a run logs the time of its first rank."""
    made_run(tmp_path / "one", "pair", "ar", {})
    with (tmp_path / "one" / "metrics.jsonl").open("a") as file:
        line = {"step": 90, "seconds": 2.0, "cpu_seconds_total": 2000.0, "valid/loss": 2.0}
        file.write(json.dumps({**line, "tokens_per_second": 900.0, "tokens_per_second_device": 450.0}) + "\n")
    run = collect(tmp_path, ["one"], "runs")["runs"]["one"]
    assert run["cpu_seconds"] == 1800.0 + 2 * 200.0
    assert [point["cpu_seconds_total"] for point in run["held_out"]] == [1800.0, 2200.0]


def nmt_score(bleu: float) -> dict[str, Any]:
    metrics = {"sacrebleu": bleu, "repetition": 0.5}
    return {"metrics": metrics, "n": 1000, "average": 5, "warnings": []}


def test_the_page_says_how_many_checkpoints_were_averaged(tmp_path):
    folder, results = tmp_path / "runs" / "en-de", tmp_path / "results"
    made_run(folder / "ar-4k-s1", "pair", "ar", {"ar": {**nmt_score(35.0), "average": 3}})
    text = report(folder.parent, results)
    assert "(test_2016_flickr), mean of the last 3 checkpoints, AR" in text
    assert "| ar-4k-s1 | 35.00 |" in text
    made_run(folder / "paper-4k-s1", "pair", "paper", {"ar": nmt_score(36.0)})
    text = report(folder.parent, results)
    assert "mean of the last 3 or 5 checkpoints, AR" in text
    assert "| ar-4k-s1, mean of 3 | 35.00 |" in text


def test_commands_do_not_tell_where_the_clone_lies(monkeypatch):
    monkeypatch.setattr(results, "ROOT", Path("/home/me/my clone"))
    for told in ("/home/me/my clone/launch/finetune.py", "/elsewhere/launch/finetune.py"):
        assert results.portable(told, Path("/x/runs"), "runs") == "launch/finetune.py"
    assert results.portable("/x/runs/ar", Path("/x/runs"), "runs") == "runs/ar"


def test_the_page_names_every_machine(tmp_path):
    folder, results = tmp_path / "runs" / "en-de", tmp_path / "results"
    for name, machine in (("ar-4k-s1", "A, AVX2"), ("paper-4k-s1", "B, AMX"), ("cmlm-4k-s1", "A, AVX2")):
        made_run(folder / name, "pair", "ar", {})
        record = json.loads((folder / name / "run.json").read_text())
        record["hardware"]["machine"] = machine
        (folder / name / "run.json").write_text(json.dumps(record))
    told = "{}, 2 CPUs, no GPU; torch 2, deepspeed 0; "
    text = report(folder.parent, results)
    assert f"work. {told.format('B, AMX')}or {told.format('A, AVX2')}commits" in text


def test_a_trial_on_some_lines_is_told_and_published_nowhere(tmp_path):
    folder, results = tmp_path / "runs" / "en-de", tmp_path / "results"
    made_run(folder / "ar-4k-s1", "pair", "ar", {"ar": nmt_score(35.0)})
    made_run(folder / "ar-4k-s2", "pair", "ar", {"ar": {**nmt_score(36.0), "n": 100}})
    for name in ("ar-4k-s1", "ar-4k-s2"):
        (folder / name / "eval" / "test" / "ar.txt").write_text(f"{name}\n")
        (folder / name / "eval" / "test" / "references.txt").write_text(f"of {name}\n")
    text = report(folder.parent, results)
    assert "| ar-4k-s1 | 35.00 |" in text
    assert "| ar-4k-s2, the first 100 lines | 36.00 |" in text
    assert "2 seeds" not in text
    assert sorted(path.name for path in (results / "outputs").iterdir()) == [
        "ar-4k-s1.ar.txt",
        "references.txt",
    ]
    assert (results / "outputs" / "references.txt").read_text() == "of ar-4k-s1\n"


def test_the_page_of_nothing_says_so(tmp_path):
    assert "No run has begun." in report(tmp_path / "x", tmp_path, convergence.draw)
    assert len(json.loads((tmp_path / "convergence.json").read_text())["not_begun"]) == 28
