"""The step built like the released code computes our loss and our gradients, so that times compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from benchmarks.authors import AuthorsLikeStep
from benchmarks.outsiders import TorchSeq2Seq, outsider_step
from benchmarks.shapes import SHAPES, BenchShape, make_batch, special_tokens, training_step
from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ObjectiveConfig, RunConfig
from janus_ds.model.janus import JanusModel
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.tiny_model import TINY

SHAPE = BenchShape("", "pair", 3, 9, 10, 4, 37, 1)
MODEL = replace(TINY, vocab_multiple=37)


@pytest.mark.parametrize("task", ["pair", "denoise"])
def test_the_loss_and_all_gradients_are_ours(task: str) -> None:
    run = RunConfig(
        model=MODEL,
        data=DataConfig(task=task, block_tokens=12),
        objective=ObjectiveConfig(preset="paper", weight_kl_ar_nar=0.5),
    )
    run = resolve(run)
    shape = replace(SHAPE, task=task)
    batch = make_batch(shape, run)
    torch.manual_seed(0)
    model = JanusModel(MODEL, special_tokens(shape), ParallelLayers()).double()
    model(batch)
    ours = JanusObjective(run.objective, shape.vocab_size, ParallelLayers())(
        model(batch), batch, batch.counts
    )
    # Whatever it makes without saying where would not be beside a batch on a GPU, as here it is not.
    with torch.device("meta"):
        theirs = AuthorsLikeStep(model, run.objective)(batch)
    assert abs(float(ours.total - theirs)) < 1e-12
    parameters = dict(model.named_parameters())
    for name, a, b in zip(
        parameters,
        torch.autograd.grad(ours.total, list(parameters.values())),
        torch.autograd.grad(theirs, list(parameters.values())),
        strict=True,
    ):
        assert float((a - b).abs().max()) < 1e-12, name


def test_the_bench_writes_both_ratios(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "small", replace(SHAPES["small"], source_tokens=16, target_tokens=16))
    file = tmp_path / "result.json"
    options = ["--shape", "small", "--rounds", "1", "--masked-share", ".25", "--attention-dropout", ".1"]
    options += ["--also", "authors,janus_2enc,ar_rdrop,hf,torch"]
    assert main(["train", *options, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert set(result["ratios"]) == {
        "janus_over_ar",
        "janus_2enc_over_ar",
        "ar_rdrop_over_ar",
        "authors_over_janus",
        "authors_over_ar",
        "hf_over_ar",
        "torch_over_ar",
        "janus_over_hf",
        "janus_over_torch",
    }
    # R-Drop computes each sample twice; a second pass of the encoder adds no decoder row.
    assert result["decoder_rows"]["ar_rdrop"] == 2 * result["decoder_rows"]["ar"]
    assert result["decoder_rows"]["janus_2enc"] == result["decoder_rows"]["janus"]
    assert result["decoder_rows"]["janus"] == 8 * (3 * 16 + 2 * 4)
    assert "authors / JANUS" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hf", "torch"])
def test_steps_of_other_libraries_do_the_work_of_our_ar_step(name: str) -> None:
    """In multiply-adds of products, but of the fused attention of CPUs, which all three use."""
    shape = replace(SHAPE, source_tokens=24, target_tokens=25)
    config = replace(MODEL, max_source_positions=32, max_target_positions=32)
    goal = ObjectiveConfig(preset="ar")
    run = resolve(RunConfig(model=config, data=DataConfig(task="pair"), objective=goal))
    batch = make_batch(shape, run)
    step = training_step(JanusModel(config, special_tokens(shape), ParallelLayers()), run.objective)
    theirs = outsider_step(name, shape, config, 0.1, "cpu", torch.float32)
    with FlopCounterMode(display=False) as ours_counted:
        torch.autograd.backward(step(batch, batch.counts)[0])
    with FlopCounterMode(display=False) as theirs_counted:
        theirs()
    assert theirs_counted.get_total_flops() / ours_counted.get_total_flops() == pytest.approx(1.0, abs=0.05)


def test_nn_transformer_drops_what_ours_drops() -> None:
    config = replace(MODEL, dropout=0.3, attention_dropout=0.1, activation_dropout=0.2)
    parts = list(TorchSeq2Seq(config, 37).layers.modules())
    attention = [part.dropout for part in parts if isinstance(part, torch.nn.MultiheadAttention)]
    assert attention == [0.1] * (config.encoder_layers + 2 * config.decoder_layers)
    kinds = torch.nn.TransformerEncoderLayer | torch.nn.TransformerDecoderLayer
    layers = [part for part in parts if isinstance(part, kinds)]
    assert {(layer.dropout.p, layer.dropout1.p, layer.dropout2.p) for layer in layers} == {(0.2, 0.3, 0.3)}
