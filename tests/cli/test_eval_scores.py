"""`eval/nmt.py` and `eval/glge.py` with files: scores, help, faults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from janus_ds.__main__ import main
from janus_ds.cli import evaluate
from janus_ds.cli.evaluate import evaluate_nmt
from janus_ds.errors import ConfigError, DataError, MissingDependencyError, UsageError
from janus_ds.metrics.glge_scores import JAR_VARIABLE
from janus_ds.metrics.scores import Scores
from tests.support.metric_fixtures import metric_cases

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "eval" / "samples"
NMT = SAMPLES / "nmt"


def run(name: str, *arguments: object) -> int:
    return main(["eval", name, *map(str, arguments)])


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def case_files(name: str, case: str, folder: Path) -> list[object]:
    """Arguments with the files of one case of a fixture."""
    (found,) = (c for c in metric_cases(name) if c["id"] == case)
    sides = {"predictions": "hyp", "references": "ref", "sources": "src"}
    files = {f"--{side}": write(folder / key, found[key]) for side, key in sides.items() if key in found}
    return [part for pair in files.items() for part in pair]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--predictions", NMT], "predictions are made with --checkpoint"),
        (["--modes", "nar", "--temperature", "0.7"], "mode nar does not use --temperature"),
        (["--modes", "ar,draft", "--threshold", "0.9"], "mode ar,draft does not use --threshold"),
        (["--modes", "ar", "--iterations", "4"], "mode ar does not use --iterations"),
    ],
)
def test_what_a_checkpoint_would_not_use_is_refused(given: list[object], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        evaluate_nmt(["--checkpoint", "demo", *map(str, given)])


@pytest.mark.parametrize(
    ("task", "given", "named"),
    [
        ("nmt", ["--limit", 3], "--limit"),
        ("nmt", ["--data", NMT], "--data"),
        ("nmt", ["--modes", "ar"], "--mode"),
        ("glge", ["--task", "xsum", "--ar-checkpoint", "demo"], "--ar-checkpoint"),
        ("glge", ["--task", "xsum", "--data", NMT, "--sources", NMT / "system.en"], "--sources, --data"),
        ("glge", ["--task", "xsum", "--checkpoint", "demo", "--sources", NMT], "--checkpoint, --predictions"),
        ("glge", ["--task", "all", "--checkpoint", "demo"], "--task all"),
        ("glge", ["--task", "all", "--data", NMT, "--sources", NMT], "--sources, --data"),
    ],
)
def test_what_scoring_would_not_use_is_refused(task: str, given: list[object], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(task, "--predictions", NMT / "system.en", *given)
    assert caught.value.where.startswith(named)


def test_translations_are_scored_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scores.json"
    files = ("--predictions", NMT / "system.en", "--references", NMT / "reference.en")
    assert run("nmt", *files, "--baseline", NMT / "baseline.en", "--output", output) == 0
    scores = json.loads(output.read_text())
    assert (scores["task"], scores["split"], scores["n"]) == ("nmt", "test", 8)
    wanted = {"sacrebleu", "tokenized_bleu", "compound_bleu", "chrf", "repetition", "length_ratio"}
    assert wanted < set(scores["metrics"]) == set(scores["signatures"])
    assert scores["significance"]["tokenized_bleu"]["p_moses"] < 0.05
    assert f"{scores['metrics']['sacrebleu']:.2f}" in capsys.readouterr().out


def test_a_summary_is_scored_as_by_the_official_script(tmp_path: Path) -> None:
    files = case_files("rouge_xsum.own", "multi_sentence", tmp_path)
    assert run("glge", "--task", "xsum", *files, "--output", tmp_path / "s.json", "--split", "dev") == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["metrics"]["rouge2"] == pytest.approx(70.833)
    assert (scores["task"], scores["split"], scores["n"]) == ("xsum", "dev", 2)


def test_questions_are_grouped_by_their_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = case_files("qg_squad.own", "shared_key_three", tmp_path)
    command = ("glge", "--task", "squadqg", *files, "--meteor", "skip", "--output", tmp_path / "s.json")
    assert run(*command) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["metrics"]["rougeL"] == pytest.approx(43.990, abs=1e-3)
    assert scores["metrics"]["bleu4"] == pytest.approx(33.686, abs=1e-3)
    assert "METEOR will be missing" in capsys.readouterr().err


def test_a_cut_file_of_any_task_is_told_before_the_first_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(SAMPLES / "glge", tmp_path / "glge")
    sources = tmp_path / "glge" / "squadqg_data" / "org_data" / "test.src"
    sources.write_text(sources.read_text() + "one more\n")

    def score(*_: object) -> None:
        raise AssertionError("scored before")

    monkeypatch.setattr(evaluate, "score_task", score)
    with pytest.raises(DataError, match="same number of lines"):
        run("glge", "--task", "all", "--predictions", SAMPLES / "submission", "--data", tmp_path / "glge")


def test_a_checkpoint_is_decoded_and_scored(
    bart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JAR_VARIABLE, str(tmp_path / "none.jar"))
    shutil.copytree(SAMPLES / "glge", tmp_path / "glge")
    sources = tmp_path / "glge" / "squadqg_data" / "org_data" / "test.src"
    sources.write_text("".join(f"ab ce {'ab ' * 40 * i}\n" for i in range(3)))
    command = ["glge", "--task", "squadqg", "--checkpoint", bart, "--data", tmp_path / "glge"]
    command += ["--device", "cpu", "--beam", 2, "--output", tmp_path / "out"]
    assert run(*command, "--latency-samples", 1) == 0
    printed = capsys.readouterr()
    for part in (
        "squadqg, test, 3 lines",
        "R-L",
        "METEOR is missing",
        "ms/sample",
        "x our AR",
    ):
        assert part in printed.out
    assert "METEOR will be missing" in printed.err
    assert "ar: 3 of 3 sentences\n" in printed.err
    assert len((tmp_path / "out" / "ar.txt").read_text().splitlines()) == 3
    told = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert told["latency"]["conditions"] | {"samples": 1, "beam": 2} == told["latency"]["conditions"]
    # The official test sets may come without references.
    (sources.parent / "test.tgt").unlink()
    assert run(*command, "--latency-samples", 0, "--limit", 2) == 0
    assert "nothing is scored" in capsys.readouterr().out
    assert len((tmp_path / "out" / "ar.txt").read_text().splitlines()) == 2
    for more, kind in (
        (["--predictions", sources], UsageError),
        (["--limit", -1], UsageError),
        (["--meteor", "require"], MissingDependencyError),
        (["--mode", "nar", "--latency-samples", 0], UsageError),
        (["--mode", "nar"], ConfigError),
        (["--iterations", "0,1"], UsageError),
        (["--length-beam", 9], UsageError),
        (["--rescore", "ar"], UsageError),
        (["--split", "later"], DataError),
    ):
        with pytest.raises(kind):
            run(*command, *more)


def test_a_warning_names_its_systems_unless_it_is_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"ar": [], "nar-0": ["2 are empty"], "nar-1": ["1 is empty"], "nar-4": ["2 are empty"]}
    systems = [
        SimpleNamespace(
            name=name,
            file=tmp_path / name,
            scores=Scores("nmt", "test", 2, warnings=["few", *more], extra={"average": 1}),
        )
        for name, more in made.items()
    ]
    found: Any = SimpleNamespace(systems=systems, weights="w", removed=[])
    assert evaluate._tell(found, [], []) == 0
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warned == ["warning: few", "warning: nar-0, nar-4: 2 are empty", "warning: nar-1: 1 is empty"]
