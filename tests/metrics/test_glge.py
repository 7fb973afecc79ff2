"""The tasks of GLGE: which metrics, OVERALL, warnings, and the places of their files."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from janus_ds.errors import DataError, MissingDependencyError, UsageError
from janus_ds.metrics.glge import (
    TASKS,
    TaskTexts,
    choose_meteor,
    combine,
    find_predictions,
    overall,
    read_texts,
    score_task,
)
from janus_ds.metrics.glge_scores import JAR_VARIABLE, MeteorProgram
from janus_ds.metrics.scores import TextLines, read_lines
from tests.metrics.test_questions import fake_java
from tests.support.metric_fixtures import metric_cases

WITHOUT = "no Java here"
COLUMNS = {
    **dict.fromkeys(("cnndm", "gigaword", "xsum", "msnews"), ("rouge1", "rouge2", "rougeL")),
    **dict.fromkeys(("squadqg", "msqg"), ("rougeL", "bleu4", "meteor")),
    "coqa": ("f1",),
    "personachat": ("bleu1", "bleu2", "distinct1", "distinct2"),
}
LINES = ["the boat left the harbour at dawn .", "who took the cup in may ?"]


class FixedMeteor(MeteorProgram):
    """Says 0.3 of everything."""

    def score(self, items: object) -> float:
        return 0.3


def texts(predictions: list[str], references: list[str], sources: list[str] | None = None) -> TaskTexts:
    given = None if sources is None else TextLines("src", sources)
    return TaskTexts(TextLines("hyp", predictions), TextLines("ref", references), given)


def test_overall_is_the_papers_mean() -> None:
    for case in metric_cases("overall"):
        found = overall(case["inputs"])
        assert found == pytest.approx(case["paper_overall"], abs=0.01), case["row"]
        assert found == pytest.approx(case["mean"], abs=1e-4)
    with pytest.raises(ValueError):
        overall([])


def test_every_task_gives_its_columns_and_their_mean() -> None:
    assert {name: task.columns for name, task in TASKS.items()} == COLUMNS
    meteor = FixedMeteor("java", Path("jar"))
    found = []
    for task in TASKS.values():
        scores = score_task(task, texts(LINES, [LINES[0], "who won it ?"], ["a", "b"]), "dev", meteor)
        assert set(task.columns) < set(scores.metrics) == set(scores.signatures)
        mean = sum(scores.metrics[name] for name in task.columns) / len(task.columns)
        assert scores.metrics["overall"] == pytest.approx(mean)
        assert (scores.task, scores.split, scores.n) == (task.name, "dev", 2)
        verified = task.name in ("xsum", "squadqg", "personachat")
        assert any("not compared" in text for text in scores.warnings) != verified
        found.append(scores)
    together = combine(found, "dev")
    assert together.metrics["overall"] == pytest.approx(sum(s.metrics["overall"] for s in found) / 8)
    assert together.as_dict()["tasks"]["coqa"] == found[6].as_dict()
    partial = combine(found[:7], "dev")
    assert "overall" not in partial.metrics
    assert "no overall of personachat" in partial.warnings[0]


def test_without_meteor_there_is_neither_meteor_nor_overall() -> None:
    scores = score_task(TASKS["squadqg"], texts(LINES, LINES), "test", WITHOUT)
    assert set(scores.metrics) == {"rougeL", "bleu4"}
    said = "\n".join(scores.warnings)
    for part in ("METEOR is missing: no Java here", "overall is left out", "every line is an item"):
        assert part in said


def test_meteor_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = fake_java(tmp_path / "bad", "echo 'no room for the heap' >&2; exit 1")
    good = fake_java(tmp_path / "good", "read line; echo 1; read line; echo 1; echo 0.5")
    monkeypatch.setenv(JAR_VARIABLE, str(tmp_path / "none.jar"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "METEOR needs Java" in str(choose_meteor("auto"))
    assert choose_meteor("skip") == "it was not asked for"
    with pytest.raises(MissingDependencyError):
        choose_meteor("require")
    # One that is there and fails is found out before anything is decoded or scored.
    monkeypatch.setenv("PATH", str(bad.parent))
    for file in (tmp_path / "none.jar", tmp_path / "data" / "paraphrase-en.gz"):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert "program failed: no room for the heap" in str(choose_meteor("auto"))
    with pytest.raises(MissingDependencyError, match="no room"):
        choose_meteor("require")
    monkeypatch.setenv("PATH", str(good.parent))
    assert choose_meteor("auto") == MeteorProgram(str(good), tmp_path / "none.jar")


def test_what_to_mind_is_said() -> None:
    def warnings(task: str, given: TaskTexts) -> str:
        return "\n".join(score_task(TASKS[task], given, "test", WITHOUT).warnings)

    xsum = warnings("xsum", texts(["", "a <unk>"], ["a", "b"]))
    assert "hyp: 1 empty lines (the first is line 1) count as 0" in xsum
    assert "1 predictions have a '<'" in xsum
    assert "no prediction has [X_SEP]" in warnings("cnndm", texts(LINES, LINES))
    marked = warnings("cnndm", texts(["who won it ? <S_SEP> a", "b"], LINES))
    assert "no prediction has" not in marked
    assert "have a '<'" not in marked
    assert "2 predictions end in a word" in warnings("personachat", texts(["Is it?", "Yes."], LINES))
    unclosed = TaskTexts(TextLines("hyp", LINES, ends_with_newline=False), TextLines("ref", LINES))
    assert "hyp: the last line has no newline" in warnings("msqg", unclosed)


def test_lines_are_read_as_python_reads_text(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes("\ufeffa\r\nb\u2028c\n\nd".encode())
    read = read_lines(file)
    assert (read.lines, read.ends_with_newline) == (["a", "b\u2028c", "", "d"], False)
    file.write_bytes(b"a\n\xff\n")
    with pytest.raises(DataError, match="not UTF-8") as error:
        read_lines(file)
    assert error.value.where == f"{file}, line 2"
    file.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        read_lines(file)
    for compress in (gzip.compress, lzma.compress, bz2.compress, zstandard.compress):
        file.write_bytes(compress(b"a\nb"))
        assert read_lines(file).lines == ["a", "b"]
        file.write_bytes(file.read_bytes()[:-2])
        with pytest.raises(DataError, match="cut or damaged"):
            read_lines(file)


def test_files_are_found_where_glge_puts_them(tmp_path: Path) -> None:
    submission, data = tmp_path / "submission", tmp_path / "easy"
    submission.mkdir()
    for name in ("xsum.easy.test", "squadqg.test", "coqa.easy.dev", "notes.txt", "msqg.easy.test.bz2"):
        (submission / name).write_text("a\n")
    found = find_predictions(submission, "test")
    assert {name: path.name for name, path in found.items()} == {
        "xsum": "xsum.easy.test",
        "squadqg": "squadqg.test",
        "msqg": "msqg.easy.test.bz2",
    }
    folder = data / "squadqg_data" / "org_data"
    folder.mkdir(parents=True)
    (folder / "test.tgt").write_text("b\n")
    assert read_texts(TASKS["squadqg"], found["squadqg"], data, "test").sources is None
    (folder / "test.src.bz2").write_bytes(bz2.compress(b"c\n"))
    (folder / "test.tgt").unlink()
    (folder / "test.tgt.gz").write_bytes(gzip.compress(b"b\n"))
    read = read_texts(TASKS["squadqg"], found["squadqg"], data, "test")
    assert read.sources is not None
    assert (read.references.lines, read.sources.lines) == (["b"], ["c"])
    (submission / "xsum.hard.test").write_text("a\n")
    with pytest.raises(UsageError, match="2 predictions for xsum"):
        find_predictions(submission, "test")
    with pytest.raises(DataError, match="no predictions for any task"):
        find_predictions(data, "test")
    with pytest.raises(DataError, match="no such folder"):
        find_predictions(tmp_path / "none", "test")
