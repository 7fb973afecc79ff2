"""`eval/nmt.py` and `eval/glge.py` with files: scores, help, faults."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from janus_ds.errors import ConfigError, DataError, JanusError, MissingDependencyError, UsageError
from janus_ds.metrics.meteor import JAR_VARIABLE
from janus_ds.tools.convert import main as convert
from tests.support.hf_folder import hub_folder
from tests.support.metric_fixtures import metric_cases
from tests.support.programs import load_program

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "eval" / "samples"
NMT = SAMPLES / "nmt"


def program(name: str) -> ModuleType:
    return load_program(f"eval/{name}.py")


def run(name: str, *arguments: object) -> int:
    code: int = program(name).main([str(argument) for argument in arguments])
    return code


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def case_files(name: str, case: str, folder: Path) -> list[object]:
    """Arguments with the files of one case of a fixture."""
    (found,) = (c for c in metric_cases(name) if c["id"] == case)
    sides = {"predictions": "hyp", "references": "ref", "sources": "src"}
    files = {f"--{side}": write(folder / key, found[key]) for side, key in sides.items() if key in found}
    return [part for pair in files.items() for part in pair]


@pytest.mark.parametrize("name", ["nmt", "glge"])
def test_without_arguments_there_is_help_whose_example_runs(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), JAR_VARIABLE: "/dev/null/none.jar"}

    def start(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = start(f"eval/{name}.py")
    (example,) = (line for line in text.split("Try it:")[1].splitlines() if "python" in line)
    shown = start(*shlex.split(example)[1:])
    for part in {"nmt": ["sacrebleu", "p = "], "glge": ["rougeL", "meteor_exact_stem", "all, test"]}[name]:
        assert part in shown


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


def test_a_submission_is_scored(tmp_path: Path) -> None:
    folders = ("--predictions", SAMPLES / "submission", "--data", SAMPLES / "glge")
    command = ("glge", "--task", "all", *folders, "--meteor", "skip", "--output", tmp_path / "s.json")
    assert run(*command) == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert set(scores["tasks"]) == {"xsum", "squadqg", "coqa", "personachat"}
    assert set(scores["metrics"]) == {"xsum", "coqa", "personachat"}
    assert scores["n"] == 12


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights."""
    folder = tmp_path_factory.mktemp("glge")
    assert convert(["--from", "hf", str(hub_folder(folder / "hub")), "--to", str(folder / "bart")]) == 0
    return folder / "bart"


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
        "(not METEOR)",
        "METEOR is missing",
        "ms/sample",
        "x our AR",
    ):
        assert part in printed.out
    assert "METEOR will be missing" in printed.err
    assert "3/3" in printed.err
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
        (["--mode", "nar"], ConfigError),
        (["--split", "later"], DataError),
    ):
        with pytest.raises(kind):
            run(*command, *more)


def test_faults_are_told_in_three_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two, three = write(tmp_path / "two", ["a", "b"]), write(tmp_path / "three", ["a", "b", "c"])
    monkeypatch.setenv(JAR_VARIABLE, str(tmp_path / "none.jar"))
    xsum = ("glge", "--task", "xsum", "--predictions", two)
    faults: list[tuple[tuple[object, ...], type[JanusError], list[str]]] = [
        ((*xsum, "--references", three), DataError, [f"{two} has 2 lines", f"{three} has 3 lines"]),
        (("nmt", "--predictions", two, "--references", three), DataError, ["2 lines", "3 lines"]),
        (("nmt", "--predictions", two), UsageError, ["--references is missing"]),
        (("nmt", "--references", two), UsageError, ["--predictions is missing"]),
        (
            ("nmt", "--predictions", two, "--references", two, "--baseline", three),
            DataError,
            [f"{three} has 3 lines"],
        ),
        (("nmt", "--predictions", two, "--references", tmp_path / "no"), DataError, [str(tmp_path / "no")]),
        (xsum, UsageError, ["the references are missing"]),
        ((*xsum, "--references", two, "--data", tmp_path), UsageError, ["give one of the two"]),
        ((*xsum, "--data", tmp_path), DataError, ["xsum_data/org_data/test.tgt"]),
        (("glge", "--task", "xsum"), UsageError, ["--predictions is missing"]),
        (("glge", "--predictions", two), UsageError, ["--task is missing"]),
        (("glge", "--task", "squad"), UsageError, ["no task 'squad'", "squadqg"]),
        (("glge", "--task", "all", "--predictions", tmp_path), UsageError, ["takes folders"]),
        (
            ("glge", "--task", "msqg", "--predictions", two, "--references", two, "--meteor", "require"),
            MissingDependencyError,
            ["METEOR"],
        ),
    ]
    for arguments, kind, parts in faults:
        with pytest.raises(kind) as error:
            run(*(str(argument) for argument in arguments))
        assert all(part in str(error.value) for part in parts), error.value


def test_a_fault_ends_the_program_with_its_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "eval/glge.py", "--task", "xsums"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: there is no task 'xsums'\n  where: --task\n  to do: did you mean 'xsum'?"
    )
