"""The question-generation experiment: runs that start from each other, its page, its text."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path
from typing import Any

import glge_squadqg as squad
import pytest
import squadqg_text
from squadqg_text import treebank_lower

from janus_ds.errors import DataError, MissingDependencyError, UsageError
from tests.support.experiment_runs import made_run

SHARED = os.environ.get("JANUS_SHARED_DATA")


def score(rouge: float, bleu: float, folder: Path, **meteor: float) -> dict[str, Any]:
    return {"metrics": {"rougeL": rouge, "bleu4": bleu, **meteor}, "n": 4, "warnings": [f"see {folder}/x"]}


def test_question_runs_start_from_each_other(tmp_path):
    options = squad.parse(["--root", str(tmp_path), "--only", "janus-ar,none-nar", "--limit", "7"])
    assert options.only == ["base", "pre-janus", "janus-ar", "none-nar"]
    runs = squad.runs_of(options)
    second, tuned = (" ".join(runs[name].train) for name in ("pre-janus", "janus-ar"))
    assert f"--init {tmp_path / 'base'} " in second
    assert "train.max_steps=1000 objective.preset=paper optim.lr=1.0e-3" in second
    assert f"--init {tmp_path / 'pre-janus'} " in tuned
    assert "--mode ar_query" in tuned
    assert "--init" not in runs["none-nar"].train
    assert runs["pre-janus"].evaluate is None
    settings = ["name=janus-ar", "train.seed=1"]
    assert runs["janus-ar"].goal("evaluate") == {
        **{"steps": 1500, "lines": 7, "latency": 0},
        "settings": settings,
    }
    assert "--mode ar --split test" in " ".join(runs["janus-ar"].evaluate or [])
    assert list(squad.RUNS) == squad.with_starts(list(squad.RUNS)), "each run comes after what it starts from"


def test_question_driver_refuses_what_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="there is no run 'janus-nor'") as error:
        squad.parse(["--only", "base,janus-nor"])
    assert "janus-nar" in error.value.fix
    monkeypatch.delenv("JANUS_SHARED_DATA", raising=False)
    with pytest.raises(MissingDependencyError, match="does not say where SQuAD question generation is"):
        next(squad.prepare(squad.parse(["--root", str(tmp_path)])))


def test_the_report_shows_what_is_there(tmp_path):
    root, results = tmp_path / "runs", tmp_path / "results"
    made_run(root / "base", "denoise", "ar", {})
    made_run(root / "pre-janus", "denoise", "paper", {})
    tuned = {
        name: score(30 + i, 4, root, meteor=8, overall=14 + i) for i, name in enumerate(("nar-0", "nar-10"))
    }
    made_run(root / "janus-nar", "pair", "cmlm", tuned)
    made_run(root / "janus-ar", "pair", "ar_query", {"ar": score(33.3, 5, root)})
    made_run(root / "ar-nar", "pair", "cmlm", tuned)
    (root / "ar-nar" / "finished.json").unlink()
    made_run(root / "janus-nar.old", "pair", "cmlm", tuned)  # none of this experiment
    counts = {"train": 9, "dev": 1, "test": 11877, "articles": 2, "megabytes": 1}
    texts = {
        "squadqg/raw/test.src": "a b .",
        "squadqg/raw/test.tgt": "what ?",
        "text/counts.json": json.dumps(counts),
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    (root / "janus-ar" / "eval" / "test" / "ar.txt").write_text("who ?\n")
    squad.report(squad.parse(["--root", str(root), "--results", str(results)]))

    page = (results / "glge_squadqg.md").read_text()
    assert "janus-nar.old" not in page
    assert "**Only a part is finished.** Not finished: pre-ar, ar-ar, pre-cmlm," in page
    head = "| run | pretrained as | decoding | ROUGE-L | BLEU-4 | METEOR | OVERALL |"
    assert head in page
    assert "| janus-nar | JANUS (`paper`) | nar-10 | 31.00 | 4.00 | 8.00 | 15.00 | 30 |" in page
    assert "| JANUS (`paper`) | (19.15) | 14.00 |  |  | 15.00 |" in page
    assert "| base | random weights | ar | 60 | 3.0 | 2.500 | 4.250 | 30 |" in page
    assert "- janus-ar, ar: `who ?`" in page
    assert "Test lines: 4, the first of 11,877." in page
    assert squad.runs_of(squad.parse(["--root", str(root)]))["janus-nar"].lines == 11877
    written = (results / "glge_squadqg.json").read_text() + page
    assert "launch/finetune.py --output runs/results-glge/janus-ar" in page
    assert str(tmp_path) not in written
    assert "/elsewhere" not in written


def test_outputs_of_other_numbers_of_lines_are_not_compared(tmp_path):
    for name, text in (("janus-nar", "who ?\n" * 5), ("janus-nar_released", "who ?\n" * 3)):
        made_run(tmp_path / name, "pair", "cmlm", {"nar-0": score(30, 4, tmp_path)})
        for file in ("nar-0.txt", "references.txt"):
            (tmp_path / name / "eval" / "test" / file).write_text(text)
    options = squad.parse(["--root", str(tmp_path), "--results", str(tmp_path / "page")])
    squad.report(options)
    figures = tmp_path / "page" / "glge_squadqg.json"
    assert json.loads(figures.read_text())["significance"] == []
    for file in ("nar-0.txt", "references.txt"):
        (tmp_path / "janus-nar_released" / "eval" / "test" / file).write_text("who ?\n" * 5)
    squad.report(options)
    assert len(json.loads(figures.read_text())["significance"]) == 1


def test_the_report_of_nothing_says_so(tmp_path):
    squad.report(squad.parse(["--root", str(tmp_path / "x"), "--results", str(tmp_path)]))
    content = json.loads((tmp_path / "glge_squadqg.json").read_text())
    assert content["runs"] == {}
    assert len(content["not_begun"]) == len(squad.RUNS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('He said "Venite Ad Me Omnes".', "he said `` venite ad me omnes '' ."),
        ("Which team won (in 2,016) at Levi's?", "which team won -lrb- in 2,016 -rrb- at levi 's ?"),
        ("It cost $5.50 or 10%; didn't it?", "it cost $ 5.50 or 10 % ; did n't it ?"),
        ("At 22:15, the 'melting pot'", "at 22:15 , the ` melting pot '"),
        ("The years 1990\u20131991\u2026 R&B of J. Smith.", "the years 1990 -- 1991\u2026 r&b of j. smith ."),
        ("  ", ""),
    ],
)
def test_text_in_the_style_of_the_questions(text, expected):
    assert treebank_lower(text) == expected
    assert treebank_lower(expected) == expected, "text in this style stays as it is"


@pytest.mark.skipif(SHARED is None, reason="JANUS_SHARED_DATA is not set: SQuAD is not here")
def test_nearly_all_questions_of_squad_become_the_official_ones():
    given = Path(SHARED or "")
    lines = (given / "squadqg" / "du2017.test.tgt").read_text(encoding="utf-8").split("\n")
    official = {line.strip() for line in lines}
    articles = json.loads((given / "squad" / "train-v1.1.first12articles.json").read_text())["data"]
    questions = [q["question"] for a in articles for p in a["paragraphs"] for q in p["qas"]]
    found = sum(treebank_lower(question) in official for question in questions)
    assert found >= 0.99 * len(questions)


def shared_files(folder: Path) -> None:
    (folder / "squadqg").mkdir(parents=True)
    sides = {
        "du2017.test.src.xz": ["rome fell ."],
        "du2017.test.tgt": ["what fell ?"],
        "du2017.dev.src.xz": ["one .", "two .", "two .", "three ."],
        "du2017.dev.tgt": ["a ?", "b ?", "c ?", "d ?"],
        "reqa_train.sentence.src": ["Rome fell.", "Four.", "Five.", "Six."],
        "reqa_train.question.tgt": ["Which city fell?", "What fell?", "Who?", "D?"],
    }
    for name, lines in sides.items():
        text = "".join(f"{line} \n" for line in lines).encode()
        (folder / "squadqg" / name).write_bytes(lzma.compress(text) if name.endswith("xz") else text)


def test_training_pairs_are_apart_from_held_out_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(squadqg_text, "DEV_PAIRS", 2)
    shared_files(tmp_path)
    counts = squadqg_text.write_squadqg(tmp_path, tmp_path / "out")
    assert counts == {"train": 2, "dev": 3, "test": 1, "left_out": 3}

    def lines(name: str) -> list[str]:
        return (tmp_path / "out" / "org_data" / name).read_text().splitlines()

    assert (lines("train.src"), lines("train.tgt")) == (["five .", "one ."], ["who ?", "a ?"])
    assert lines("dev.src") == ["two .", "two .", "three ."], "a sentence is on one side only"
    (tmp_path / "squadqg" / "du2017.dev.tgt").write_text("a ?\n")
    with pytest.raises(DataError, match="different numbers of lines: 4 and 1"):
        squadqg_text.write_squadqg(tmp_path, tmp_path / "out")
    (tmp_path / "squadqg" / "du2017.test.src.xz").write_bytes(b"no xz")
    with pytest.raises(DataError, match="cut or damaged"):
        squadqg_text.write_squadqg(tmp_path, tmp_path / "out")


def test_wikipedia_becomes_sentences_up_to_a_size(tmp_path):
    given = tmp_path / "pretrain_wikipedia_en"
    given.mkdir()
    article = "It is big. Very big!\nIt's (was) old.\n\n"
    (given / "wiki.txt.xz").write_bytes(
        lzma.compress((article * 3 + "x" * 2_000_000 + "\n\nlast\n").encode())
    )
    assert squadqg_text.write_wikipedia(tmp_path, tmp_path / "out.txt", 1) == 4
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert lines[:4] == ["it is big .", "very big !", "it 's -lrb- was -rrb- old .", ""]
    assert (len(lines), lines[-1]) == (14, "")
