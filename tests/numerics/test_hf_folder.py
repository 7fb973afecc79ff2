"""Exported folders decode elsewhere as the run does here: in a process where janus_ds cannot be imported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from janus_ds.cli.convert import main
from janus_ds.config.schema import DecodeConfig, ModelConfig, ObjectiveConfig
from janus_ds.data.prepare.train_tokenizer import train_sentencepiece, train_words
from janus_ds.decode.generator import Generator
from janus_ds.evaluate.hf_folders import model_card
from tests.support.programs import ROOT, python
from tests.support.tiny_run import make_random_run

pytest.importorskip("transformers")

TEXTS = [line for line in (ROOT / "tests/golden/frozen/german.txt").read_text().splitlines() if line]
Asked = tuple[str | Path, list[str], tuple[str, ...]]
"""A run, texts, and modes."""
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "nar": {"mode": "nar", "iterations": 3},
    "aux": {"mode": "aux", "length_beam": 2},
}
SHAPE = ModelConfig(
    d_model=32, heads=2, ffn_dim=48, encoder_layers=1, decoder_layers=2, max_source_positions=64,
    max_target_positions=48, init_std=0.4,
)  # fmt: skip


def runs(folder: Path) -> dict[str, Asked]:
    """Every layout of rows and every kind of tokenizer, with what it can decode in."""
    words, bpe = train_words(TEXTS), train_sentencepiece(TEXTS, "bpe", 150)
    bart = replace(SHAPE, activation="gelu", layernorm_embedding=True, scale_embedding=False)
    nmt = replace(SHAPE, activation="relu", layernorm_embedding=False)
    eos_bos, plain = (ObjectiveConfig(preset, decoder_start="eos_bos") for preset in ("paper", "ar"))
    few, every = TEXTS[:12], ("ar", "nar", "aux")
    return {
        "released": (make_random_run(folder / "a", ObjectiveConfig("released"), words, nmt), few, every),
        "eos_bos": (make_random_run(folder / "b", eos_bos, bpe, bart), few, every),
        "bart": (make_random_run(folder / "c", plain, bpe, bart), few, ("ar",)),
        "cmlm": (make_random_run(folder / "d", ObjectiveConfig("cmlm"), words, nmt), few, ("nar",)),
    }


def texts_of_demo(count: int) -> list[str]:
    """Sentences, and then pairs of them."""
    return [*TEXTS, *(f"{a} {b}" for a, b in zip(TEXTS, TEXTS[::-1], strict=True)), *TEXTS][:count]


def check(folder: Path, asked: dict[str, Asked]) -> dict[str, Any]:
    """Export, decode there, and compare ids and texts with what is decoded here."""
    request = {}
    for name, (run, texts, modes) in asked.items():
        assert main(["--to", "hf", str(run), "--output", str(folder / name), "--license", "cc-by-2.0"]) == 0
        ways = {mode: WAYS[mode] if name != "bart" else {} for mode in modes}
        request[name] = (str(folder / name), texts, ways)
    (folder / "request.json").write_text(json.dumps(request))
    program, answer = ROOT / "tests/support/foreign_decode.py", folder / "answer.json"
    done = python("-I", program, folder / "request.json", answer, HF_HOME=str(folder / "cache"))
    assert done.returncode == 0, done.stderr
    found = json.loads(answer.read_text())
    for name, (run, texts, modes) in asked.items():
        for mode in modes:
            options = {k: v for k, v in WAYS[mode].items() if k != "mode"}
            ours = Generator.from_checkpoint(run, mode, device="cpu", **options).generate(texts)
            for item, row, text in zip(ours, *found[name][mode], strict=True):
                # After the start symbol, and in the layout `eos_bos` of AR after bos.
                skip = 2 if row[0] == 2 else 1
                assert row[skip : row.index(2, 1)] == list(item.tokens), (name, mode)
                assert text == item.text
            print(f"{name} {mode}: {len(texts)} outputs equal, {len({item.text for item in ours})} different")
    return found


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.heavy)])
def test_every_kind_of_run_decodes_elsewhere_as_here(tmp_path: Path, count: int) -> None:
    asked = {"demo": ("demo", texts_of_demo(count), ("ar", "nar", "aux")), **runs(tmp_path)}
    found = check(tmp_path, asked)
    assert found["demo"]["class"] == "JanusForConditionalGeneration"
    assert found["bart"]["class"] == "BartForConditionalGeneration"
    assert not (tmp_path / "bart" / "modeling_janus.py").exists()
    card = (tmp_path / "demo" / "README.md").read_text()
    assert "license: cc-by-2.0" in card
    assert "| nar-4 | 55.87 |" in card
    assert 'mode="aux"' in card
    # Any run of BART's shape can be had as a plain BART.
    assert main(["--to", "bart", str(asked["eos_bos"][0]), "--output", str(tmp_path / "plain")]) == 0
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["model_type"] == "bart"
    assert "to be fine-tuned before it decodes" in (tmp_path / "plain" / "README.md").read_text()


def test_a_card_shows_scores_of_the_exported_weights(tmp_path: Path) -> None:
    config = SimpleNamespace(name="x", decode=DecodeConfig(beam=5))
    run: Any = SimpleNamespace(config=config, model=SimpleNamespace(parameters=list))
    run.folder, run.weights = tmp_path, tmp_path / "checkpoints" / "best" / "weights.safetensors"
    run.weights_sha256 = "ab"
    run.weights.parent.mkdir(parents=True)
    (run.weights.parent / "best.json").write_text('{"step": 30}')
    ours = {"checkpoint": "best", "average": 1, "step": 30}
    told: list[dict[str, Any]] = [{}, ours, {**ours, "checkpoint": "step-30"}]
    told += [{**ours, "average": 5}, {**ours, "step": 20}, {**ours, "precision": "int8"}]
    # With another beam than the exported model's; the last one as it decodes itself.
    told += [{**ours, "decode": {"mode": "ar", "beam": beam}} for beam in (1, 5)]
    # Earlier versions told no sum of the weights.
    told += [{**ours, "weights_sha256": sha256} for sha256 in ("ab", "cd")]
    # Of another way, and of one that the exported code does not have.
    dials: list[dict[str, Any]] = [{}, {"rescore": "ar"}, {"threshold": 0.9}]
    told += [{**ours, "decode": {"mode": "nar", **dial}} for dial in dials]
    systems = {f"system{n}": {**found, "metrics": {"chrf": 50 + n}} for n, found in enumerate(told)}
    for split in ("test", "test-first-4"):
        (tmp_path / "eval" / split).mkdir(parents=True)
        (tmp_path / "eval" / split / "scores.json").write_text(json.dumps({"systems": systems}))
    # Of an evaluation before that one, which had other systems.
    for name, system in {"system1": {**ours, "metrics": {"chrf": 1}}, "before": systems["system1"]}.items():
        (tmp_path / "eval" / "test" / f"{name}.scores.json").write_text(json.dumps(system))
    card = model_card(run, ["ar"], False, None)
    assert [line for line in card.splitlines() if line.startswith("| system")] == [
        "| system | chrf |",
        "| system0 | 50.00 |",
        "| system1 | 51.00 |",
        "| system7 | 57.00 |",
        "| system8 | 58.00 |",
    ]
    assert "| before | 51.00 |" in card
    assert "first" not in card
    assert "token by token" in card
    only_nar = model_card(run, ["nar"], True, None)
    assert "generate(**inputs, " in only_nar
    assert "generate(**inputs)" not in only_nar
    assert "| system10 | 60.00 |" in only_nar
    assert not any(f"system{number} " in only_nar for number in (7, 11, 12))
    # A plain BART of a run with query rows does not decode as it was scored.
    plain = model_card(run, [], False, None)
    assert "from_pretrained" in plain
    assert not any(words in plain for words in ("generate(", "| system", "decodes ."))


@pytest.mark.parametrize("task", ["translation", "text2text-generation"])
def test_pipelines_take_the_folder(tmp_path: Path, task: str) -> None:
    transformers = pytest.importorskip("transformers")
    if task not in transformers.pipelines.PIPELINE_REGISTRY.get_supported_tasks():
        pytest.skip(f"transformers {transformers.__version__} has no pipeline {task}")
    assert main(["--to", "hf", "demo", "--output", str(tmp_path / "demo")]) == 0
    words = {"src_lang": "de", "tgt_lang": "en"} if task == "translation" else {}
    pipe = transformers.pipeline(task, str(tmp_path / "demo"), trust_remote_code=True)
    (answer,) = pipe(TEXTS[0], **words)
    assert list(answer.values()) == [Generator.from_checkpoint("demo", "ar").generate(TEXTS[0])[0].text]


def test_the_code_that_goes_along_needs_torch_and_transformers_alone() -> None:
    text = (ROOT / "janus_ds/model/formats/hf_modeling.py").read_text()
    imports = [
        line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))
    ]
    assert set(imports) == {"__future__", "functools", "typing", "torch", "transformers"}
