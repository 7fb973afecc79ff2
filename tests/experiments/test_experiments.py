"""The drivers of the experiments: what is run in which order, what is passed over, and what is reported."""

from __future__ import annotations

import json
import lzma
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from janus_ds.config.load import load_run_config
from janus_ds.errors import PREEMPTED_EXIT_CODE, DataError, MissingDependencyError, UsageError

ROOT = Path(__file__).resolve().parents[2]
SHARED = os.environ.get("JANUS_SHARED_DATA")


@pytest.fixture(autouse=True)
def experiments(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The programs of launch/experiments can be imported; signal handlers stay pytest's."""
    monkeypatch.syspath_prepend(str(ROOT / "launch" / "experiments"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def program(name: str) -> ModuleType:
    return __import__(name)


class Made:
    """A plan of runs that do nothing but leave a file, or fail."""

    def __init__(self, folder: Path, needs: dict[str, Sequence[str]], steps: int = 10) -> None:
        self.folder = folder
        self.steps = steps
        self.reports = 0
        self.code: dict[tuple[str, str], str] = {}
        self._needs = needs

    def stages(self, name: str) -> Sequence[str]:
        return ("train",) if name.startswith("pre") else ("train", "evaluate")

    def needs(self, name: str) -> Sequence[str]:
        return self._needs[name]

    def goal(self, name: str, stage: str) -> dict[str, int]:
        return {"steps": self.steps}

    def command(self, name: str, stage: str) -> list[str]:
        log = self.folder / "done"
        does = self.code.get((name, stage), "")
        return [sys.executable, "-S", "-c", f"open({str(log)!r}, 'a').write('{name} {stage}\\n')\n{does}"]

    def report(self) -> None:
        self.reports += 1

    def done(self) -> list[str]:
        log = self.folder / "done"
        return log.read_text().splitlines() if log.is_file() else []


NEEDS: dict[str, Sequence[str]] = {"pre": (), "one": ("pre",), "two": ("pre",), "alone": ()}


def test_a_driver_runs_stages_in_order_and_passes_over_what_is_done(tmp_path, capsys):
    plan = Made(tmp_path, NEEDS)
    driver = program("driver")
    assert driver.Driver(plan, ["pre", "one", "pre", "alone"], 1).run() == 0
    both = ["one train", "one evaluate", "alone train", "alone evaluate"]
    assert plan.done() == ["pre train", *both]
    assert plan.reports == 3
    assert json.loads((tmp_path / "one" / "finished.json").read_text()) == {"steps": 10}
    attempts = [json.loads(line) for line in (tmp_path / "one" / "attempts.jsonl").read_text().splitlines()]
    assert [(a["stage"], a["exit"]) for a in attempts] == [("train", 0), ("evaluate", 0)]

    assert driver.Driver(plan, ["pre", "one", "alone"], 1).run() == 0
    assert "to do: nothing" in capsys.readouterr().out
    assert len(plan.done()) == 5

    (tmp_path / "one" / "finished.json").unlink()
    assert driver.Driver(plan, ["pre", "one", "alone"], 1).run() == 0
    assert plan.done()[5:] == ["one evaluate"]

    plan.steps = 20
    assert driver.Driver(plan, ["alone"], 1).run() == 0
    assert plan.done()[6:] == ["alone train", "alone evaluate"]


def test_what_starts_from_a_failed_run_is_not_run(tmp_path, capsys):
    plan = Made(tmp_path, NEEDS)
    plan.code["pre", "train"] = "raise SystemExit(3)"
    assert program("driver").Driver(plan, ["pre", "one", "two", "alone"], 2).run() == 1
    assert sorted(plan.done()) == ["alone evaluate", "alone train", "pre train"]
    assert "what they start from is missing: one, two" in capsys.readouterr().out
    assert not (tmp_path / "pre" / "trained.json").exists()


def test_a_driver_that_is_asked_to_stop_lets_the_run_save(tmp_path):
    plan = Made(tmp_path, NEEDS)
    plan.code["pre", "train"] = (
        "import os, signal, sys, time\n"
        f"def save(*a):\n    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
        f"    os._exit({PREEMPTED_EXIT_CODE})\n"
        "signal.signal(signal.SIGTERM, save)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    )
    assert program("driver").Driver(plan, ["pre", "one"], 1).run() == PREEMPTED_EXIT_CODE
    assert (tmp_path / "saved").exists()
    assert plan.done() == ["pre train"]
    assert not (tmp_path / "pre" / "trained.json").exists()


def test_convergence_runs_are_the_products_own_commands(tmp_path):
    convergence = program("convergence")
    plan = convergence.Convergence(convergence.parse(["--root", str(tmp_path), "--steps", "50"]))
    folder = tmp_path / "en-de"
    folder.mkdir()
    assert (plan.folder, plan.goal("ar-s1", "train")) == (folder, {"steps": 50})
    assert plan.command("paper_2enc-s2", "train")[1:] == [
        str(ROOT / "launch" / "finetune.py"),
        *("--recipe", str(ROOT / "launch" / "recipes" / "nmt_multi30k_en_de.yaml")),
        *("--deepspeed_config", str(folder / "deepspeed.json"), "--data", str(folder / "data")),
        *("--output", str(folder / "paper_2enc-s2"), "--set", "name=paper_2enc-s2", "train.seed=2"),
        *("objective.preset=paper", "objective.encoder_passes=2", "masking.target=span_union"),
        *("masking.target_share=0.7", "train.max_steps=50"),
    ]
    assert plan.command("ar-s2", "evaluate")[2:] == [
        *("--checkpoint", str(folder / "ar-s2"), "--average", "10", "--split", "test", "--limit", "0"),
    ]
    assert convergence.overrides_of("ar+model.dropout=0.4-s3")[-1] == "model.dropout=0.4"
    for name in ("janusz-s1", "ar", "ar+dropout-s1"):
        with pytest.raises(UsageError, match="there is no run"):
            convergence.overrides_of(name)
    for name in convergence.RUNS:
        run = load_run_config(convergence.RECIPE, convergence.overrides_of(name))
        assert run.train.keep_best in run.train.valid_bleu


def test_a_run_is_flat_when_no_mode_rises():
    convergence = program("convergence")
    points = [{"bleu_ar": ar, "bleu_nar": nar} for ar, nar in ((1, 1), (2, 1), (2, 2), (1, 2), (2, 1.5))]
    assert [convergence.stale_validations(points[:n]) for n in range(1, 6)] == [0, 0, 0, 1, 2]
    run = {"held_out": points, "updates": 50, "recipe": {"train": {"patience": 2, "max_steps": 100}}}
    assert convergence.state_of(run) == "flat: 2 validations without a better score"
    run["held_out"] = points[:4]
    assert convergence.state_of(run) == "still training, not flat (1 stale)"
    assert convergence.state_of({**run, "updates": 100}) == "not flat at the last update"


def test_the_convergence_page_shows_runs_under_way_and_finished_ones(tmp_path):
    convergence = program("convergence")
    folder, results = tmp_path / "runs" / "en-de", tmp_path / "results"
    made_run(folder / "ar-s1", "pair", "ar", {"ar": nmt_score(35.0)})
    made_run(folder / "paper-s1", "pair", "paper", {"ar": nmt_score(36.0), "nar-10": nmt_score(33.5)})
    made_run(folder / "paper-s2", "pair", "paper", {"ar": nmt_score(37.0), "nar-10": nmt_score(34.5)})
    (folder / "cmlm-s1").mkdir()
    for name, text in (("ar-s1", "a b c d e\n"), ("paper-s1", "a b c d f\n")):
        (folder / name / "eval" / "test" / "ar.txt").write_text(text)
        (folder / name / "eval" / "test" / "references.txt").write_text("a b c d f\n")
    results.mkdir()
    (results / "convergence_answers.md").write_text("It is too early to say.\n")
    text = convergence.write_page(folder, results).read_text()
    assert "It is too early to say." in text
    assert "| ar-s1 | 35.00 |" in text
    assert "**JANUS (`paper`), 2 seeds** | 36.50 ± 0.71 |  |  |  | 34.00 ± 0.71 |" in text
    assert "Not begun: ar_rdrop-s1, paper_2enc-s1, joint-s1, cmlm-s1" in text
    assert "| Is JANUS-AR above AR? | 100.00 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| ar-s1 | "))
    assert re.search(r"\| 20\.00 \| 60 \| [^|]*\| 0\.50 \|", row), "best validation: update, epoch, CPU hours"
    assert "**ar-s1 is not flat**" in text
    assert all((results / name).is_file() for name in re.findall(r"\((figures/.*?)\)", text))
    written = (results / "convergence.json").read_text() + text
    assert str(tmp_path) not in written
    assert "/elsewhere" not in written


def nmt_score(bleu: float) -> dict[str, Any]:
    return {"metrics": {"sacrebleu": bleu, "repetition": 0.5}, "n": 1, "warnings": []}


def test_question_runs_start_from_each_other(tmp_path):
    squad = program("glge_squadqg")
    options = squad.parse(["--root", str(tmp_path), "--only", "janus-ar,none-nar", "--limit", "7"])
    assert options.only == ["base", "pre-janus", "janus-ar", "none-nar"]
    plan = squad.SquadQuestions(options)
    second, tuned = (" ".join(plan.command(name, "train")) for name in ("pre-janus", "janus-ar"))
    assert f"--init {tmp_path / 'base'} " in second
    assert "train.max_steps=1000 objective.preset=paper optim.lr=1.0e-3" in second
    assert f"--init {tmp_path / 'pre-janus'} " in tuned
    assert "--mode ar_query" in tuned
    assert "--init" not in plan.command("none-nar", "train")
    assert plan.stages("pre-janus") == ("train",)
    assert plan.goal("janus-ar", "evaluate") == {"steps": 1500, "lines": 7}
    assert "--mode ar --iterations 0,1,4,10" in " ".join(plan.command("janus-ar", "evaluate"))
    assert list(squad.RUNS) == squad.with_starts(list(squad.RUNS)), "each run comes after what it starts from"


def test_question_driver_refuses_what_cannot_be(tmp_path, monkeypatch):
    squad = program("glge_squadqg")
    with pytest.raises(UsageError, match="there is no run 'janus-nor'") as error:
        squad.parse(["--only", "base,janus-nor"])
    assert "janus-nar" in error.value.fix
    monkeypatch.delenv("JANUS_SHARED_DATA", raising=False)
    with pytest.raises(MissingDependencyError, match="does not say where SQuAD question generation is"):
        squad.prepare(squad.parse(["--root", str(tmp_path)]))


def made_run(folder: Path, task: str, preset: str, systems: dict[str, Any]) -> None:
    """What a finished run leaves behind, as far as a report reads it."""
    recipe = {
        "data": {"task": task},
        "train": {"seed": 1, "patience": 10, "max_steps": 22000},
        "objective": {"preset": preset},
        "masking": {},
        "optim": {},
        "model": {"encoder_layers": 3, "decoder_layers": 3, "d_model": 128},
    }
    command = ["/elsewhere/launch/finetune.py", "--output", str(folder), "--set", f"name={folder.name}"]
    record = {
        "recipe": recipe,
        "command": command,
        "git_commit": "abc",
        "hardware": {"machine": "x86_64", "cpus": 2, "gpus": []},
        "versions": {"torch": "2", "deepspeed": "0"},
    }
    state = {"step": 60, "meters": {"seconds": 120.0, "tokens": 3_000_000}}
    scores = {"systems": systems}
    for path, content in {
        "run.json": record,
        "trained.json": {"steps": 60},
        "finished.json": {"steps": 60, "lines": 4},
        "checkpoints/step-00000060/state.json": state,
        "eval/test/scores.json": scores,
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    (folder / "attempts.jsonl").write_text('{"stage": "train", "seconds": 180.0, "exit": 0}\n')
    line = {"step": 60, "valid/loss": 3.0, "valid/ar_nll": 2.5, "valid/nar_nll": 4.25, "kl_ar_aux": 0.5}
    line |= {"seconds": 2.0, "valid/bleu_ar": 20.0, "samples_total": 900, "cpu_seconds_total": 1800.0}
    line["tokens_total"] = 3_000_000
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")


def score(rouge: float, bleu: float, folder: Path, **meteor: float) -> dict[str, Any]:
    return {"metrics": {"rougeL": rouge, "bleu4": bleu, **meteor}, "n": 4, "warnings": [f"see {folder}/x"]}


def test_the_report_shows_what_is_there(tmp_path):
    squad = program("glge_squadqg")
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
    squad.SquadQuestions(squad.parse(["--root", str(root), "--results", str(results)])).report()

    page = (results / "glge_squadqg.md").read_text()
    assert "**Only a part is finished.** Not finished: pre-ar, ar-ar, pre-cmlm," in page
    head = "| run | pretrained as | decoding | ROUGE-L | BLEU-4 | METEOR | OVERALL |"
    assert head in page
    assert "| janus-nar | JANUS (`paper`) | nar-10 | 31.00 | 4.00 | 8.00 | 15.00 | 30 |" in page
    assert "| JANUS (`paper`) | (19.15) | 14.00 |  |  | 15.00 |" in page
    assert "| base | random weights | ar | 60 | 3.0 | 2.500 | 4.250 | 30 |" in page
    assert "- janus-ar, ar: `who ?`" in page
    assert "Test lines: 4, the first of 11,877." in page
    whole = squad.SquadQuestions(squad.parse(["--root", str(root)]))
    assert whole.goal("janus-nar", "evaluate")["lines"] == 11877
    written = (results / "glge_squadqg.json").read_text() + page
    assert "launch/finetune.py --output runs/results-glge/janus-ar" in page
    assert str(tmp_path) not in written
    assert "/elsewhere" not in written


def test_the_report_of_nothing_says_so(tmp_path):
    squad = program("glge_squadqg")
    squad.SquadQuestions(squad.parse(["--root", str(tmp_path / "x"), "--results", str(tmp_path)])).report()
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
    treebank_lower = program("squadqg_text").treebank_lower
    assert treebank_lower(text) == expected
    assert treebank_lower(expected) == expected, "text in this style stays as it is"


@pytest.mark.skipif(SHARED is None, reason="JANUS_SHARED_DATA is not set: SQuAD is not here")
def test_nearly_all_questions_of_squad_become_the_official_ones():
    given = Path(SHARED or "")
    lines = (given / "squadqg" / "du2017.test.tgt").read_text(encoding="utf-8").split("\n")
    official = {line.strip() for line in lines}
    articles = json.loads((given / "squad" / "train-v1.1.first12articles.json").read_text())["data"]
    questions = [q["question"] for a in articles for p in a["paragraphs"] for q in p["qas"]]
    treebank_lower = program("squadqg_text").treebank_lower
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
    squadqg = program("squadqg_text")
    monkeypatch.setattr(squadqg, "DEV_PAIRS", 2)
    shared_files(tmp_path)
    counts = squadqg.write_squadqg(tmp_path, tmp_path / "out")
    assert counts == {"train": 2, "dev": 3, "test": 1, "left_out": 3}

    def lines(name: str) -> list[str]:
        return (tmp_path / "out" / "org_data" / name).read_text().splitlines()

    assert (lines("train.src"), lines("train.tgt")) == (["five .", "one ."], ["who ?", "a ?"])
    assert lines("dev.src") == ["two .", "two .", "three ."], "a sentence is on one side only"
    (tmp_path / "squadqg" / "du2017.dev.tgt").write_text("a ?\n")
    with pytest.raises(DataError, match="different numbers of lines: 4 and 1"):
        squadqg.write_squadqg(tmp_path, tmp_path / "out")
    (tmp_path / "squadqg" / "du2017.test.src.xz").write_bytes(b"no xz")
    with pytest.raises(DataError, match="cannot be read"):
        squadqg.write_squadqg(tmp_path, tmp_path / "out")


def test_wikipedia_becomes_sentences_up_to_a_size(tmp_path):
    given = tmp_path / "pretrain_wikipedia_en"
    given.mkdir()
    article = "It is big. Very big!\nIt's (was) old.\n\n"
    (given / "wiki.txt.xz").write_bytes(
        lzma.compress((article * 3 + "x" * 2_000_000 + "\n\nlast\n").encode())
    )
    assert program("squadqg_text").write_wikipedia(tmp_path, tmp_path / "out.txt", 1) == 4
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert lines[:4] == ["it is big .", "very big !", "it 's -lrb- was -rrb- old .", ""]
    assert (len(lines), lines[-1]) == (14, "")
