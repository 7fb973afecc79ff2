"""Speed of decoding: which sentences, how often, and what it is compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus_ds.cli.evaluate import evaluate_glge
from janus_ds.config.modes import with_decode
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.data.prepare.train_tokenizer import train_words
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import DTYPES, InferenceOptions, load_run, prepare_for_inference
from janus_ds.errors import CheckpointError, ConfigError, JanusError, UsageError
from janus_ds.evaluate import tasks
from janus_ds.evaluate.evaluation import EvalRequest, Evaluated, SystemResult, results_table
from janus_ds.evaluate.latency import (
    Latency,
    LatencyReport,
    device_name,
    hf_ar,
    measure,
    precision_of,
    spread_over,
    timed_sources,
)
from janus_ds.evaluate.tasks import measure_glge, with_best
from janus_ds.metrics.glge import task_named
from janus_ds.metrics.scores import Scores
from tests.support.tiny_run import make_random_run


def test_sentences_come_from_all_over_the_set() -> None:
    assert spread_over(10, 3) == [0, 3, 6]
    assert spread_over(2, 5) == [0, 1]
    assert spread_over(4, 0) == spread_over(0, 4) == []
    assert spread_over(99, 50)[-3:] == [93, 95, 97]
    # Of an empty source nothing is decoded.
    assert timed_sources([[], [1], [], [2], [3], []], 2) == [[1], [2]]
    assert timed_sources([[], []], 2) == []


def test_all_systems_decode_the_same_sentences_in_turn_after_a_warm_up() -> None:
    calls: list[tuple[str, int]] = []
    shown: list[tuple[str, int, int]] = []

    def system(name: str) -> object:
        def decode(ids: Sequence[int]) -> int:
            calls.append((name, ids[0]))
            return ids[0]

        return decode

    systems = {name: system(name) for name in ("a", "b")}
    tell = lambda *values: shown.append(values)  # noqa: E731
    found = measure(systems, [[5], [7]], progress=tell, warm_up=1, rounds=2)  # type: ignore[arg-type]
    once = [("a", 5), ("a", 7), ("b", 5), ("b", 7)]
    assert calls == [("a", 5), ("b", 5), *once, *once]
    assert found["a"].tokens == [5, 7, 5, 7]
    assert len(found["b"].milliseconds) == 4
    assert shown[-1] == ("latency", 8, 8)


def test_a_report_has_both_speed_ups() -> None:
    times = {"ar": [8.0, 8.0, 8.0], "hf-ar": [16.0] * 3, "nar-0": [1.0, 2.0, 3.0]}
    systems = {name: Latency(milliseconds, [4, 5, 6]) for name, milliseconds in times.items()}
    report = LatencyReport(systems, {"batch": 1}, ["a note"])
    nar = report.as_dict()["systems"]["nar-0"]
    assert (nar["speed_up_over_our_ar"], nar["speed_up_over_hf_ar"]) == (4.0, 8.0)
    assert (nar["ms_per_sentence"], nar["median_ms"], nar["p95_ms"], nar["mean_tokens"]) == (2, 2, 3, 5)
    first, head, *_, row, note = "\n".join(report.lines()).splitlines()
    assert first == "latency: batch 1"
    assert head.split()[-6:] == ["x", "our", "AR", "x", "HF", "AR"]
    assert row.split() == ["nar-0", "2.0", "2.0", "3.0", "5.0", "4.00x", "8.00x"]
    assert note == "note: a note"
    alone = LatencyReport({"nar-0": systems["nar-0"]}, {}, [])
    assert alone.as_dict()["systems"]["nar-0"]["speed_up_over_our_ar"] is None
    assert alone.lines()[-1].split()[-2:] == ["-", "-"]


def test_transformers_writes_what_the_run_writes_or_as_much_as_it_is_told(bart: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = load_run(bart, {"max_length": 9, "beam": 2})
    sources = [[5, 9, 8], [11, 4, 7, 30, 12]]
    ours = [len(c[0].tokens) for c in Generator(run.model, None, run.config).generate_ids(sources)]
    theirs = hf_ar(run, tmp_path / "free", None, "cpu")
    assert [theirs(ids) for ids in sources] == ours
    for start in ("eos_bos", "bos"):
        other = replace(
            run, config=replace(run.config, objective=replace(run.config.objective, decoder_start=start))
        )
        lengths = {tuple(ids): number for number, ids in enumerate(sources, 3)}
        held = hf_ar(other, tmp_path / start, lengths, "cpu")
        assert [held(ids) for ids in sources] == [3, 4]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "float64"])
def test_transformers_computes_in_the_precision_of_the_run(
    bart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    transformers = pytest.importorskip("transformers")
    run, options = load_run(bart, {"max_length": 5}), InferenceOptions(precision)
    prepare_for_inference(run.model, options)
    theirs = hf_ar(run, tmp_path / "theirs", None, "cpu")
    generate, found = transformers.BartForConditionalGeneration.generate, []

    def watched(self: Any, **arguments: Any) -> Any:
        found.append(self.dtype)
        return generate(self, **arguments)

    monkeypatch.setattr(transformers.BartForConditionalGeneration, "generate", watched)
    assert theirs([5, 9, 8]) <= 5
    assert found == [DTYPES[precision]]
    assert precision_of(run.model, options) == precision


def test_conditions_tell_the_precision_and_ars_beam_whatever_the_recipe_decodes_in() -> None:
    options = InferenceOptions("float64")
    run, decode = load_run("demo", {"mode": "aux"}), {"beam": 2, "max_length": 4}
    prepare_for_inference(run.model, options)
    request = EvalRequest(Path("demo"), modes=("nar",), iterations=(0,), decode=decode, inference=options)
    report = measure_glge(request, run, [[], [5, 6]], 5)
    assert set(report.systems) >= {"ar", "nar-0"}
    told = {"samples": 1, "beam": 2, "precision": "float64", "device": device_name("cpu")}
    assert report.conditions | told == report.conditions
    # The beam is that of the run whose AR is timed.
    base = replace(run, config=with_decode(run.config, {"mode": "ar", "beam": 3}))
    request = replace(request, decode={"max_length": 4})
    assert measure_glge(request, run, [[5, 6]], 5, base).conditions["beam"] == 3


@pytest.mark.parametrize(("other", "own"), [(None, 2.0), (Path("demo"), None)])
def test_scores_tell_the_times_of_their_own_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: Path | None, own: float | None
) -> None:
    run, results = load_run("demo"), []
    for name in ("ar", "nar-t0.9"):
        speed = {"sentences_per_second": 5.0}
        scores = Scores("xsum", "test", 1, extra={"speed": speed})
        results.append(SystemResult(name, tmp_path / f"{name}.txt", scores, speed))
    found = Evaluated(results, run.weights, [[5]], [])
    report = LatencyReport({"ar": Latency([2.0], [1]), "nar-t0.9": Latency([3.0], [1])}, {}, [])
    monkeypatch.setattr(tasks, "load_checkpoint", lambda _: run)
    monkeypatch.setattr(tasks, "_other_run", lambda *_: load_run("demo"))
    monkeypatch.setattr(tasks, "run_evaluation", lambda *_: found)
    monkeypatch.setattr(tasks, "measure_glge", lambda *_: report)
    request = EvalRequest(Path("demo"), output=tmp_path)
    tasks.evaluate_glge(request, task_named("xsum"), timed=1, ar_checkpoint=other)
    systems = json.loads((tmp_path / "scores.json").read_text())["systems"]
    key = "ms_per_sentence_batch_1"
    assert {name: scores["speed"].get(key) for name, scores in systems.items()} == {
        "ar": own,
        "nar-t0.9": 3.0,
    }
    assert json.loads((tmp_path / "nar-t0.9.scores.json").read_text()) == systems["nar-t0.9"]
    first = results_table(results, []).splitlines()[1].split()
    assert first == ["ar", "5.0", "2.0" if own else "-"], "what was not timed took no 0 ms"


@pytest.mark.parametrize(("preset", "error"), [("", CheckpointError), ("cmlm", ConfigError)])
def test_the_run_to_compare_with_is_looked_at_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str, error: type[JanusError]
) -> None:
    other = tmp_path / "other"
    if preset:
        words, shape = train_words(["ein kind", "zwei kinder"]), ModelConfig(d_model=8, heads=2, ffn_dim=8)
        make_random_run(other, ObjectiveConfig(preset), words, shape)

    def decode(*_: object) -> None:
        raise AssertionError("decoded before")

    monkeypatch.setattr(tasks, "run_evaluation", decode)
    with pytest.raises(error):
        tasks.evaluate_glge(EvalRequest(Path("demo")), task_named("xsum"), timed=5, ar_checkpoint=other)
    with pytest.raises(UsageError, match="no latency is measured"):
        evaluate_glge(
            ["--task", "xsum", "--checkpoint", "demo", "--latency-samples", "0", "--ar-checkpoint", "x"]
        )


def test_the_best_checkpoint_is_taken_where_there_is_one(tmp_path: Path) -> None:
    assert with_best(tmp_path, 1) == tmp_path
    best = tmp_path / "checkpoints" / "best"
    best.mkdir(parents=True)
    assert with_best(tmp_path, 1) == best
    assert with_best(tmp_path, 5) == tmp_path
    assert with_best(best, 1) == best
