"""Question generation against the official Python 2 script with METEOR's own program."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from janus_ds.errors import MissingDependencyError
from janus_ds.metrics.glge_scores import (
    JAR_VARIABLE,
    MeteorProgram,
    QuestionItem,
    coco_bleu,
    coco_rouge_l,
    find_meteor,
    msqg_items,
    squad_items,
)
from janus_ds.metrics.glge_text import CASED_BRACKETS, LOWER_BRACKETS, rejoin
from tests.support.metric_fixtures import metric_cases

ORIGINS = ["own", "real"]
PRINTED = 1e-5
"""The script prints five decimals."""


@pytest.mark.parametrize("origin", ORIGINS)
def test_bleu_and_rouge_are_the_scripts(origin: str) -> None:
    for case in metric_cases(f"qg_squad.{origin}"):
        items = squad_items(case["hyp"], case["ref"], case["src"])
        for order, value in enumerate(coco_bleu(items), 1):
            assert value == pytest.approx(case["official"][f"Bleu_{order}"], abs=PRINTED), case["id"]
        assert coco_rouge_l(items) == pytest.approx(case["official"]["ROUGE_L"], abs=PRINTED), case["id"]


def test_meteor_is_the_programs() -> None:
    try:
        program = find_meteor()
    except MissingDependencyError as error:
        pytest.skip(f"{error.what}: {error.fix}")
    cases = metric_cases("qg_squad.own")
    for case in cases:
        value = program.score(squad_items(case["hyp"], case["ref"], case["src"]))
        assert value == pytest.approx(case["official"]["METEOR"], abs=2e-5), case["id"]


def test_lines_of_one_source_are_one_item() -> None:
    lines = ["Who ?", "What ?"], ["who was it ?", "What was it ?"], ["The  Source ", "the  source"]
    (item,) = squad_items(*lines)
    assert item == QuestionItem("what ?", ["who was it ?", "what was it ?"])
    assert len(squad_items(*lines[:2], None)) == 2
    first, second = msqg_items(*lines)
    assert (first.hypothesis, second.references) == ("Who ?", ["What was it ?"])


@pytest.mark.parametrize(
    ("split", "joined"),
    [
        ("don ' t say it ' s dad ' s", "do n't say it 's dad 's"),
        ('he said " yes " and " no "', "he said `` yes '' and `` no ''"),
        ("3 , 000 and 2 . 5 but a , b", "3,000 and 2.5 but a , b"),
        ("well - known - ( odd )", "well-known - -lrb- odd -rrb-"),
        ("wait . . . - -", "wait ... --"),
        ("the U . S . is", "the U.S. . is"),
        ("[UNK] & é . É . x", "UNK &amp; é . É . x"),
        ("- a - '", "- a - `"),
        ("", ""),
    ],
)
def test_words_are_joined_as_the_script_joins_them(split: str, joined: str) -> None:
    assert rejoin(split, LOWER_BRACKETS) == joined


def test_other_white_space_than_asciis_does_not_split() -> None:
    assert rejoin("a\u00a0b ' s\t( c )", CASED_BRACKETS) == "a\u00a0b 's -LRB- c -RRB-"


def test_meteor_looks_for_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    java = fake_java(tmp_path / "bin", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(MissingDependencyError, match="METEOR needs Java") as error:
        find_meteor()
    assert (error.value.where, error.value.exit_code) == ("PATH", 8)
    assert "install a Java runtime" in error.value.fix
    monkeypatch.setenv("PATH", str(java.parent))
    jar = tmp_path / "meteor-1.5.jar"
    monkeypatch.setenv(JAR_VARIABLE, str(jar))
    with pytest.raises(MissingDependencyError, match="METEOR's program is missing") as error:
        find_meteor()
    assert "pip install --no-deps pycocoevalcap" in error.value.fix
    jar.touch()
    with pytest.raises(MissingDependencyError, match="METEOR's paraphrase table is missing"):
        find_meteor()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "paraphrase-en.gz").touch()
    assert find_meteor() == MeteorProgram(str(java), jar)


def test_a_meteor_that_fails_is_quoted(tmp_path: Path) -> None:
    java = fake_java(tmp_path, "echo 'Could not reserve enough space' >&2; exit 1")
    program = MeteorProgram(str(java), tmp_path / "meteor-1.5.jar")
    with pytest.raises(MissingDependencyError, match="failed: Could not reserve enough space"):
        program.score([QuestionItem("a", ["b"])])


def test_the_conversation_with_meteor(tmp_path: Path) -> None:
    answers = 'read line; echo "$line" >&2; echo 1 2; read line; echo 3 4; read line; echo "$line" > log'
    java = fake_java(tmp_path, f"{answers}; echo 0.1; echo 0.2; echo 0.25; read line")
    program = MeteorProgram(str(java), tmp_path / "meteor-1.5.jar")
    items = [QuestionItem("a ||| b", ["c", "d"]), QuestionItem("e", ["f"])]
    assert program.score(items) == 0.25
    assert (tmp_path / "log").read_text() == "EVAL ||| 1 2 ||| 3 4\n"


def fake_java(folder: Path, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    java = folder / "java"
    java.write_text(f"#!{shutil.which('sh')}\n{script}\n")
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    return java
