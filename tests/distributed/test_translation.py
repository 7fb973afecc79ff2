"""Training on pairs: batches of tokens on one rank and two, ramps, validation BLEU, best weights, resume."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.checkpoint.manifest import write_manifest
from janus_ds.checkpoint.tensors import average_weights, last_checkpoints, read_weights, write_tensors
from janus_ds.errors import CheckpointError, ConfigError, DataError, JanusError, UsageError
from janus_ds.evaluate.evaluation import EvalRequest, results_table
from janus_ds.evaluate.tasks import NMT_COLUMNS, evaluate
from janus_ds.parallel.topology import init_topology
from janus_ds.train.trainer import Outcome
from tests.support.launch import run_ranks
from tests.support.tiny_pairs import TINY_PAIR_RECIPE, prepare_tiny
from tests.support.tiny_training import Run, train

CLOSE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def folder(tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translation")
    shutil.copytree(tiny_pairs, folder / "data")
    (folder / "recipe.yaml").write_text(TINY_PAIR_RECIPE)
    return folder


def two_ranks(folder: str) -> dict[str, Any]:
    topology = init_topology(1, process_group=True)
    place = Path(folder)
    return {"whole": train(place, topology, Run("two", stage=1))}


def one_rank(folder: str) -> dict[str, Any]:
    topology = init_topology(1, process_group=True)
    place = Path(folder)
    found = {"whole": train(place, topology, Run("one", stage=0))}
    # Cut in the middle and continued.
    train(place, topology, Run("cut", stage=0, overrides=("train.max_steps=20",)))
    found["cut"] = train(place, topology, Run("cut", stage=0))
    # A plain AR model; it stops early: with this rate its BLEU does not move.
    plain = ("objective.preset=ar", "train.valid_bleu=ar", "optim.lr=1e-9", "train.valid_every=2")
    stopped = Run("plain", stage=0, overrides=(*plain, "train.patience=2", "optim.warmup_init_lr=0"))
    found["plain"] = train(place, topology, stopped)
    found["again"] = train(place, topology, stopped)
    warm = (
        f"init={place / 'plain'}",
        "objective.preset=released",
        "train.max_steps=12",
        "train.save_every=50",
    )
    ramps = ("objective.ramp_kl_steps=8", "objective.ramp_aux_steps=4", "objective.ramp_start=2")
    found["warm"] = train(place, topology, Run("warm", stage=0, overrides=(*warm, *ramps)))
    return found


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    (two, _), (one,) = run_ranks(two_ranks, 2, str(folder)), run_ranks(one_rank, 1, str(folder))
    return {"two": two, "one": one}


def test_two_ranks_learn_what_one_learns(found):
    one, two = found["one"]["whole"], found["two"]["whole"]
    for key in ("loss", "ar", "nar", "aux", "samples_total", "valid/loss", "valid/bleu_ar", "valid/bleu_nar"):
        assert torch.allclose(
            torch.tensor(one.series(key)).float(), torch.tensor(two.series(key)).float(), **CLOSE
        ), key
    assert len(one.series("valid/bleu_ar")) == 3
    assert one.series("ar")[-1] < 0.8 * one.series("ar")[0]


def test_a_run_that_was_cut_is_bitwise_the_whole_run(found):
    whole, cut = found["one"]["whole"], found["one"]["cut"]
    assert all(torch.equal(value, cut.weights[name]) for name, value in whole.weights.items())
    for key in ("loss", "valid/bleu_ar", "valid/bleu_nar"):
        assert whole.series(key) == cut.series(key)


def test_the_best_weights_are_kept(found, folder):
    best = json.loads((folder / "one/checkpoints/best/best.json").read_text())
    curve = found["one"]["whole"].series("valid/bleu_ar")
    assert best["mode"] == "ar"
    assert best["valid_bleu"]["ar"] == pytest.approx(max(curve))
    assert best["step"] == 10 * (1 + curve.index(max(curve)))
    saved = folder / f"one/checkpoints/step-{best['step']:08d}/weights.safetensors"
    kept = read_weights(folder / "one/checkpoints/best/weights.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in read_weights(saved).items())


def test_patience_ends_a_run_for_good(found):
    plain = found["one"]["plain"]
    assert plain.outcome is Outcome.COMPLETE
    assert plain.lines[-1]["step"] == 6
    assert found["one"]["again"].lines == plain.lines


def test_ramps_hold_back_the_kl_and_a_warm_start_keeps_its_own_length_head(found):
    lines = {line["step"]: line for line in found["one"]["warm"].lines}
    weight = {"ar": 1, "nar": 0.5, "aux": 0.5, "length": 0.1, "kl_ar_nar": 1, "kl_ar_aux": 3, "kl_nar_aux": 1}

    def total(step: int, kl: float, aux: float) -> float:
        factor = {name: kl for name in weight if name.startswith("kl")} | {"aux": aux}
        # A KL term of factor 0 is not computed.
        return sum(w * factor.get(name, 1.0) * lines[step].get(name, 0.0) for name, w in weight.items())

    # Line s tells update s - 1. Ramps begin with update 2.
    for step, kl, aux in ((1, 0, 0), (2, 0, 0), (3, 1 / 8, 1 / 4), (6, 4 / 8, 1), (10, 1, 1), (12, 1, 1)):
        assert lines[step]["loss"] == pytest.approx(total(step, kl, aux), rel=1e-4), step


def test_averaging_takes_the_last_checkpoints(found, folder):
    paths = last_checkpoints(folder / "one", 2)
    assert [path.parent.name for path in paths] == ["step-00000020", "step-00000030"]
    first, second, mean = read_weights(paths[0]), read_weights(paths[1]), average_weights(paths)
    for name, value in mean.items():
        assert torch.allclose(value, (first[name] + second[name]) / 2, atol=1e-7)


def test_evaluation_translates_scores_and_measures(found, folder, tmp_path):
    request = EvalRequest(folder / "one", 2, iterations=(0, 2), latency_sentences=2)
    results = evaluate(request).systems
    assert [result.name for result in results] == ["ar", "nar-0", "nar-2"]
    for result in results:
        assert len(result.file.read_text().splitlines()) == 16
        told = json.loads(result.file.with_name(f"{result.name}.scores.json").read_text())
        assert (told["task"], told["split"], told["n"], told["average"]) == ("nmt", "test", 16, 2)
        assert 0 <= told["metrics"]["sacrebleu"] <= 100
        assert told["speed"]["ms_per_sentence_batch_1"] > 0
    assert "BLEU 13a" in results_table(results, NMT_COLUMNS)
    assert len(results_table(results, NMT_COLUMNS).splitlines()) == 4
    whole = json.loads((folder / "one/eval/test/scores.json").read_text())
    assert set(whole["systems"]) == {"ar", "nar-0", "nar-2"}
    # Files of other weights or sentences do not stay beside new ones.
    again = evaluate(replace(request, modes=("ar",), latency_sentences=0))
    assert again.removed == []
    (folder / "one/eval/test/mine.scores.json").write_text('{"task": "nmt"}')
    trial = replace(request, modes=("nar",), iterations=(0,), limit=4, latency_sentences=0)
    apart = evaluate(trial)
    assert (apart.removed, apart.systems[0].file.parent.name) == ([], "test-first-4")
    again = evaluate(replace(trial, output=folder / "one/eval/test"))
    assert again.removed == ["ar", "nar-2"]
    left = {path.name for path in again.systems[0].file.parent.iterdir()}
    ours = {"nar-0.scores.json", "nar-0.txt", "references.txt", "scores.json", "sources.txt"}
    assert left == {*ours, "mine.scores.json"}
    # The folder of the best weights has others when a run went on.
    best = folder / "one/checkpoints/best"
    request = EvalRequest(best, modes=("ar",), latency_sentences=0, output=tmp_path / "best")
    assert evaluate(request).removed == []
    before = {path: path.read_bytes() for path in best.iterdir()}
    weights = best / "weights.safetensors"
    write_tensors(weights, {name: 2 * value for name, value in read_weights(weights).items()})
    write_manifest(best)
    assert evaluate(replace(request, modes=("nar",), iterations=(0,))).removed == ["ar"]
    for path, content in before.items():
        path.write_bytes(content)
    (tmp_path / "best/sources.txt").write_bytes(b"\xff")
    assert evaluate(request).removed == ["nar-0"]


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"average": 0}, UsageError, "0 checkpoints cannot be averaged"),
        ({"split": "dev"}, JanusError, "sources of split 'dev' are missing"),
        ({"modes": ("nar",), "run": "plain"}, ConfigError, "not trained to decode in mode 'nar'"),
        ({"data": "other"}, CheckpointError, "another vocabulary than the data"),
        ({"baseline": "short"}, DataError, "do not have the same number of lines"),
    ],
)
def test_evaluations_that_cannot_be_are_refused(found, folder, tmp_path, change, kind, words):
    if change.get("data"):
        prepare_tiny(tmp_path, count=150)
        change = {"data": tmp_path / "data"}
    if change.get("baseline"):
        change = {"baseline": tmp_path / "short.en"}
        change["baseline"].write_text("one line\n")
    run = change.pop("run", "one") if "run" in change else "one"
    with pytest.raises(kind, match=words):
        evaluate(EvalRequest(folder / run, output=tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()
