"""Second-stage pretraining: BART's weights, JANUS' objectives (sections 3.3 and 4.1 of the paper)."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.checkpoint.tensors import find_weights, read_weights
from janus_ds.cli.convert import main
from janus_ds.config.locations import DEMO, model_path
from janus_ds.data.prepare.corpus import prepare
from janus_ds.data.prepare.pairs import prepare_glge
from janus_ds.data.prepare.settings import GlgeSettings, Limits, PrepareSettings
from janus_ds.decode.generator import Generator
from janus_ds.decode.load import load_run
from janus_ds.errors import CheckpointError, DataError, JanusError
from janus_ds.evaluate.evaluation import EvalRequest, Evaluated
from janus_ds.evaluate.tasks import evaluate_glge
from janus_ds.metrics.glge import task_named
from janus_ds.parallel.topology import init_topology
from tests.support.hf_folder import hub_folder
from tests.support.launch import run_ranks
from tests.support.texts import documents
from tests.support.tiny_training import Run, train

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
PRESETS = ("paper", "released", "cmlm")
MODES = ("nar", "ar", "ar_query", "janus")
SMALL = (
    "model.preset=null",
    "model.d_model=16",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.ffn_dim=24",
    "model.heads=2",
    "model.max_source_positions=40",
    "model.max_target_positions=40",
    "data.block_tokens=38",
    "data.workers=0",
    "data.pad_multiple=8",
    "train.global_batch=8",
    "train.max_steps=4",
    "train.save_every=4",
    "train.valid_every=4",
    "train.valid_samples=8",
    "train.log_every=1",
    "optim.warmup_steps=2",
    "decode.iterations=1",
    "decode.max_length=8",
)


def second_stage(folder: Path) -> dict[str, Any]:
    topology = init_topology(1, process_group=True)
    results: dict[str, Any] = {}
    for preset in PRESETS:
        overrides = (*SMALL, f"objective.preset={preset}", f"init={folder / 'bart'}")
        results[preset] = train(folder, topology, Run(preset, overrides=overrides))
    # A preset's own weights go on to the next stage.
    overrides = (*SMALL, "objective.preset=ar_query", f"init={folder / 'paper'}")
    results["ar_query"] = train(folder, topology, Run("ar_query", overrides=overrides))
    for mode in MODES:
        recipe = RECIPES / "glge_squadqg.yaml"
        overrides = (*SMALL, f"init={folder / 'bart'}", f"data.path={folder / 'pairs'}")
        pairs = Run(f"glge-{mode}", overrides=overrides, mode=mode)
        results[pairs.name] = train(folder, topology, pairs, recipe)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: Any) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("second")
    hub_folder(folder / "hub")
    main(["--from", "hf", str(folder / "hub"), "--to", str(folder / "bart")])
    text = folder / "text.txt"
    text.write_text("\n\n".join(documents(80)).lower().replace("!", ".").replace("?", "."))
    settings = PrepareSettings(tokenizer=str(folder / "bart" / "tokenizer"), block_tokens=38, valid_share=0.1)
    prepare([text], folder / "data", settings)
    questions = folder / "squadqg_data" / "org_data"
    questions.mkdir(parents=True)
    for split, lines in (("train", documents(24, 2)), ("dev", documents(9, 3)), ("test", documents(5, 4))):
        (questions / f"{split}.src").write_text(
            "".join(f"{text.split()[0]} {text[:40]!r}\n" for text in lines)
        )
        (questions / f"{split}.tgt").write_text("".join(f"{text.split()[1].lower()}\n" for text in lines))
    prepare_glge(
        questions.parent,
        folder / "pairs",
        GlgeSettings("squadqg", folder / "bart" / "tokenizer", Limits(30, 20)),
    )
    (folder / "recipe.yaml").write_bytes((RECIPES / "bart_base.yaml").read_bytes())
    return folder, run_ranks(second_stage, 1, folder)[0]


def test_presets_train_from_converted_weights(results: Any) -> None:
    folder, runs = results
    start = read_weights(folder / "bart" / "weights.safetensors")
    for preset in PRESETS:
        run = runs[preset]
        assert len(run.series("loss")) == 4
        changed = {name for name, value in run.weights.items() if value.shape != start[name].shape}
        assert changed == ({"length_head.weight"} if preset == "released" else set())
        moved = (
            (run.weights["encoder.layers.0.fc1.weight"] - start["encoder.layers.0.fc1.weight"]).abs().max()
        )
        assert 0 < moved < 1e-2
        config = load_run(folder / preset).config
        assert config.objective.decoder_start == "eos_bos"
        assert config.masking.target == ("infilling_released" if preset == "released" else "infilling")
    assert load_run(folder / "released").config.model.length_classes == 256
    first = read_weights(find_weights(folder / "paper"))["length_head.weight"]
    # Not trained by this preset, but for weight decay.
    torch.testing.assert_close(runs["ar_query"].weights["length_head.weight"], first, rtol=1e-3, atol=0)


def test_pairs_of_glge_train_in_every_mode_in_barts_layout(results: Any) -> None:
    folder, runs = results
    for mode in MODES:
        run = load_run(folder / f"glge-{mode}")
        assert len(runs[f"glge-{mode}"].series("loss")) == 4
        assert run.config.objective.decoder_start == "eos_bos"
        assert run.config.decode.mode == ("ar" if mode.startswith("ar") else "nar")
        Generator(run.model, run.text, run.config).generate(["ab ce"])
        # The best weights by the task's own metric.
        name = "ar" if mode.startswith("ar") else "nar"
        best = json.loads((folder / f"glge-{mode}" / "checkpoints" / "best" / "best.json").read_text())
        (score,) = runs[f"glge-{mode}"].series(f"valid/question_{name}")
        assert (best["step"], best["mode"], best["valid_question"][name]) == (4, name, score)
        assert len(best["valid_question"]) == (2 if mode == "janus" else 1)
        # Four updates move a weight by 4e-4 at most; another draw of deviation .02 by more.
        head = runs[f"glge-{mode}"].weights["length_head.weight"]
        moved = (head - read_weights(folder / "bart" / "weights.safetensors")["length_head.weight"]).abs()
        assert (float(moved.mean()) > 0.01) == (mode == "nar")
    assert main(["--to", "hf", str(folder / "glge-ar"), "--output", str(folder / "hf-ar")]) == 0


def evaluated(folder: Path, run: str, timed: int = 0, **base: Any) -> Evaluated:
    request = EvalRequest(folder / run, iterations=(0, 1), output=folder / f"eval-{run}", **base)
    other = folder / "glge-ar" if run == "glge-nar" else None
    return evaluate_glge(request, task_named("squadqg"), "not here", timed, other, lambda *_: None)


def test_checkpoints_of_glge_are_evaluated_in_every_mode(results: Any) -> None:
    folder, _ = results
    for run, systems in (
        ("glge-janus", ["ar", "nar-0", "nar-1"]),
        ("glge-nar", ["nar-0", "nar-1"]),
        ("glge-ar", ["ar"]),
    ):
        found = evaluated(folder, run, timed=2)
        assert [result.name for result in found.systems] == systems
        told = json.loads((folder / f"eval-{run}" / "scores.json").read_text())
        for name in systems:
            assert len((folder / f"eval-{run}" / f"{name}.txt").read_text().splitlines()) == 5
            scores = told["systems"][name]
            assert (scores["task"], scores["split"], scores["n"]) == ("squadqg", "test", 5)
            assert {"rougeL", "bleu4"} == set(scores["metrics"]) == set(scores["signatures"])
            assert any("METEOR is missing" in warning for warning in scores["warnings"])
        assert found.latency is not None
        latency = told["latency"]["systems"]
        assert latency["ar"]["speed_up_over_our_ar"] == 1
        assert {"ar", *systems} <= set(latency)
        notes = " ".join(told["latency"]["notes"])
        if find_spec("transformers") is None:
            assert "not installed" in notes
            continue
        assert latency["hf-ar"]["speed_up_over_hf_ar"] == 1
        assert ("with the weights of ar" in notes) == (run != "glge-janus")
        if run == "glge-janus":
            assert latency["hf-ar"]["mean_tokens"] == latency["ar"]["mean_tokens"]
        table = "\n".join(found.latency.lines())
        assert "x HF AR" in table


def test_the_text_of_an_evaluation_may_lie_in_the_official_layout(results: Any) -> None:
    folder, _ = results
    prepared = evaluated(folder, "glge-ar").systems[0].file.read_text()
    for place in (folder, folder / "squadqg_data"):
        assert evaluated(folder, "glge-ar", data=place).systems[0].file.read_text() == prepared
    dev = evaluated(folder, "glge-ar", split="dev", limit=3).systems[0].scores
    assert (dev.split, dev.n) == ("dev", 3)


def test_evaluations_that_cannot_be_are_refused(results: Any) -> None:
    folder, _ = results

    def refused(kind: type[JanusError], task: str = "squadqg", run: str = "glge-ar", **base: Any) -> str:
        with pytest.raises(kind) as caught:
            evaluate_glge(EvalRequest(folder / run, **base), task_named(task))
        return str(caught.value)

    assert "no text of split 'later'" in refused(DataError, split="later")
    assert "xsum_data/org_data" in refused(DataError, task="xsum", data=folder)
    assert "another vocabulary" in refused(CheckpointError, run=str(model_path(DEMO)), data=folder / "pairs")


def test_the_results_decode_and_go_back_to_bart(results: Any) -> None:
    folder, _ = results
    for run, mode in (("paper", "nar"), ("cmlm", "nar"), ("ar_query", "ar"), ("bart", "ar")):
        Generator.from_checkpoint(folder / run, mode, device="cpu", max_length=6).generate(["ab <mask> ce"])
    assert main(["--to", "bart", str(folder / "paper"), "--output", str(folder / "out")]) == 0
    assert (folder / "out" / "tokenizer.json").is_file()
