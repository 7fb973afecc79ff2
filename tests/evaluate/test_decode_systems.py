"""What an evaluation compares, by name, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus_ds.config.modes import with_decode
from janus_ds.data.prepare.pair_files import PairText
from janus_ds.data.stream.index import Manifest
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run
from janus_ds.decode.search_settings import Hypothesis
from janus_ds.errors import CheckpointError, DataError, UsageError
from janus_ds.evaluate import evaluation, tasks
from janus_ds.evaluate.evaluation import EvalRequest, load_mean, run_evaluation, systems_of
from janus_ds.metrics.glge import task_named
from janus_ds.metrics.scores import Scores, TextLines, save_json
from tests.support.tiny_run import make_run


def test_names_and_options() -> None:
    decode = {"beam": 3, "rescore": "ar", "length_beam": 5}
    request = EvalRequest(Path("run"), iterations=(0, 4), thresholds=(0.5,), decode=decode)
    found = request.systems(("ar", "ar-greedy", "nar", "draft", "aux"))
    assert list(found) == [
        "ar",
        "ar-greedy",
        "nar-0",
        "nar-0-rescored",
        "nar-4",
        "nar-4-rescored",
        "nar-t0.5",
        "nar-t0.5-rescored",
        "draft",
        "aux",
    ]
    assert found["ar"] == {"beam": 3, "mode": "ar"}
    assert found["ar-greedy"] == {"beam": 1, "mode": "ar", "temperature": 0.0}
    assert found["nar-t0.5"] == {"length_beam": 5, "mode": "nar", "threshold": 0.5, "rescore": None}
    assert found["nar-4-rescored"] == {**found["nar-4"], "rescore": "ar"}
    # Each takes what its mode uses: a draft is greedy, the beam is AR's.
    assert found["draft"] == {"mode": "draft"}
    assert found["aux"] == {"length_beam": 5, "mode": "aux"}
    # Greedy is greedy beside samples, too.
    sampled = EvalRequest(Path("run"), decode={"temperature": 1.0}).systems(("ar", "ar-greedy"))
    assert [system["temperature"] for system in sampled.values()] == [1.0, 0.0]


def test_a_mean_of_a_packaged_model_is_refused_for_its_own_reason() -> None:
    with pytest.raises(CheckpointError, match=r"5 checkpoints are to be averaged, the run has 0"):
        load_mean(Path("demo"), 5, "cpu")


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"modes": ("ra",)}, "no mode 'ra'"),
        ({"limit": -1}, "-1 sentences"),
        ({"iterations": (-1,)}, "-1 iterations"),
        ({"thresholds": (1.01,)}, "1.01 is no probability"),
        ({"thresholds": (0.0,)}, "0.0 is no probability"),
        ({"thresholds": (float("nan"),)}, "nan is no probability"),
    ],
)
def test_what_cannot_be(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        EvalRequest(Path("run"), **asked)
    assert caught.value.where
    assert caught.value.fix
    EvalRequest(Path("run"), modes=("ar", "nar", "draft", "aux"), thresholds=(0.5, 1.0))


def test_systems_are_what_their_names_say_whatever_the_recipe_decodes_by() -> None:
    run, request = (
        load_run("demo"),
        EvalRequest(Path("demo"), modes=("nar",), iterations=(4,), thresholds=(0.5,)),
    )
    asked = {"mode": "nar", "rescore": "ar", "threshold": 0.9, "iterations": 7}
    found = systems_of(request, replace(run, config=with_decode(run.config, asked)))
    told = {name: made.config.decode for name, made in found.items()}
    assert {name: (x.iterations, x.threshold, x.rescore) for name, x in told.items()} == {
        "nar-4": (4, None, None),
        "nar-4-rescored": (4, None, "ar"),
        "nar-t0.5": (None, 0.5, None),
        "nar-t0.5-rescored": (None, 0.5, "ar"),
    }
    # AR of a run that did not learn it cannot judge.
    objective = replace(run.config.objective, weight_ar=0.0)
    alone = replace(run, config=replace(with_decode(run.config, asked), objective=objective))
    assert list(systems_of(request, alone)) == ["nar-4", "nar-t0.5"]


def test_outputs_that_cannot_be_scored_are_kept_and_what_is_timed_is_warmed_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[Sequence[int]] = []
    monkeypatch.setattr(evaluation, "one_by_one", lambda _, ids: timed.append(ids) or 1)
    clock: list[str] = []
    original = Generator.generate_ids
    monkeypatch.setattr(Generator, "generate_ids", lambda *a: clock.append("decodes") or original(*a))
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: clock.append("looks") or len(clock))

    class Unscored:
        def read(self, *_: object) -> PairText:
            return PairText(["Guten Morgen.", "Ja."], None, ("test.de", "test.en"))

        def score(self, *_: object) -> Any:
            raise DataError("the scorer failed", "here", "mend it")

    (tmp_path / "ar-greedy.scores.json").write_text("{}")
    request = EvalRequest(Path("demo"), modes=("ar-greedy",), latency_sentences=1)
    with pytest.raises(UsageError, match="the package's own model has no place"):
        run_evaluation(request, load_run("demo"), Unscored())
    request = replace(request, output=tmp_path)
    with pytest.raises(DataError, match="the scorer failed"):
        run_evaluation(request, load_run("demo"), Unscored())
    assert len((tmp_path / "ar-greedy.txt").read_text().splitlines()) == 2
    assert not (tmp_path / "ar-greedy.scores.json").exists()
    assert len(timed) == 2
    assert clock[:4] == ["decodes", "looks", "decodes", "looks"]


def test_scores_of_other_references_or_weights_do_not_stay_beside_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnlyRead:
        def __init__(self, *references: str) -> None:
            self.text = PairText(["Ja."], list(references) or None, ("test.de", "test.en"))

        def read(self, *_: object) -> PairText:
            return self.text

        def score(self, *_: object) -> Scores:
            return Scores("nmt", "test", 1)

    run = load_run("demo")

    def removed(mode: str, *references: str) -> list[str]:
        asked = {"iterations": (0,), "latency_sentences": 0, "output": tmp_path}
        return run_evaluation(
            EvalRequest(Path("demo"), modes=(mode,), **asked), run, OnlyRead(*references)
        ).removed

    assert removed("ar-greedy", "Yes.") == removed("nar", "Yes.") == []
    assert removed("nar", "Yeah.") == ["ar-greedy"]
    assert removed("ar-greedy") == ["nar-0"]
    assert not (tmp_path / "references.txt").exists()
    again = tmp_path / "again" / run.weights.parent.name / run.weights.name
    again.parent.mkdir(parents=True)
    again.write_bytes(b"trained anew in the same folder to the same step")
    run = replace(run, weights=again)
    assert removed("nar") == ["ar-greedy"]
    # A run that goes on puts other weights there while the text is read.
    run, told, read = replace(run, weights=again), tmp_path / "nar-0.scores.json", OnlyRead.read
    sha256 = json.loads(told.read_text())["weights_sha256"]
    monkeypatch.setattr(OnlyRead, "read", lambda *a: again.write_bytes(b"better ones") and read(*a))
    removed("nar")
    assert json.loads(told.read_text())["weights_sha256"] == sha256


def test_two_evaluations_may_write_the_same_files_at_once(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(50):
            evaluation._write_lines(tmp_path / "sources.txt", ["Ja."] * 99)
            save_json(tmp_path / "scores.json", {"system": number})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, range(2)))
    assert (tmp_path / "sources.txt").read_text() == "Ja.\n" * 99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.json", "sources.txt"]


def test_data_of_another_task_is_told_before_its_vocabulary(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the data that the run was trained on is not there") as caught:
        tasks.evaluate(EvalRequest(Path("demo"), device="cpu"))
    assert caught.value.fix == "give --data DIR"
    data = Path(shutil.copytree(tiny, tmp_path / "data"))
    request = EvalRequest(Path("demo"), data=data, device="cpu")
    with pytest.raises(DataError, match="holds no translation data"):
        tasks.evaluate(request)
    manifest = Manifest.load(data)
    replace(manifest, settings={"request": {"settings": {"task": "xsum"}}}).save(data)
    with pytest.raises(UsageError, match="the data is of task 'xsum', not 'squadqg'"):
        tasks.evaluate_glge(request, task_named("squadqg"))


def test_translations_scored_as_a_task_of_glge_are_sent_to_the_other_command(
    tiny_pairs: Path, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", tiny_pairs, "ar")
    with pytest.raises(DataError, match="no text of split 'test'") as caught:
        tasks.evaluate_glge(EvalRequest(run, data=tiny_pairs, device="cpu"), task_named("xsum"))
    assert "`janus-ds eval nmt`" in caught.value.fix


def test_text_with_capitals_for_a_model_that_learnt_without_is_told(tiny_pairs: Path, tmp_path: Path) -> None:
    data, learnt = tiny_pairs, tmp_path / "learnt"
    manifest = Manifest.load(shutil.copytree(data, learnt))
    replace(manifest, settings={**manifest.settings, "lowercase": True}).save(learnt)
    run, task = load_run(make_run(tmp_path / "run", data, "ar")), tasks._Translation("test", None)
    for trained_on in (learnt, data):
        config = replace(run.config, data=replace(run.config.data, path=str(trained_on)))
        text = task.read(EvalRequest(run.folder, data=data), replace(run, config=config))
        found = [Hypothesis((), 0.0) for _ in text.sources]
        warnings = task.score(TextLines("ar", text.sources), found, text).warnings
        assert any("prepare this text with --lowercase" in told for told in warnings) == (
            trained_on == learnt
        )
