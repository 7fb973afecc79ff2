"""The released code's own weights, batch, logits and losses (tests/fixtures), in double precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from janus_ds.config.presets import resolve
from janus_ds.config.schema import DataConfig, ObjectiveConfig, RunConfig
from janus_ds.model.formats.fairseq import load_fairseq
from janus_ds.model.janus import JanusModel
from janus_ds.model.weights import load_weights
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.released import FIXTURE, released_file
from tests.support.two_stream import Conventions, Sample, make_batch

TOLERANCE = 2e-5
RELEASED = Conventions(query_position="previous", mask=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> JanusModel:
    folder = tmp_path_factory.mktemp("fairseq")
    config, special, weights, report = load_fairseq(released_file(folder))
    assert (config.d_model, config.ffn_dim, config.heads, special.vocab_size) == (32, 64, 2, 28)
    assert config.length_classes == 256
    assert report.added == ()
    built = JanusModel(config, special, ParallelLayers()).double().eval()
    load_weights(built, weights)
    return built


def fixture_samples() -> list[Sample]:
    """Its two sentences; the source is left-padded there."""
    samples = []
    for source, target, hidden in zip(
        FIXTURE["src_tokens"], FIXTURE["target"], FIXTURE["nar_input"]["nar_query_p"], strict=True
    ):
        tokens = [t for t in target.tolist() if t != 1]
        # Padding slots hold the pad symbol, 1; position 1 itself is not masked in either sentence.
        masked = [p for p in hidden.tolist() if p != 1]
        samples.append(Sample([t for t in source.tolist() if t != 1], tokens, masked))
    return samples


@pytest.mark.parametrize("backend", ["dense", "grouped"])
def test_logits_equal_those_of_the_released_code(model: JanusModel, backend: str) -> None:
    model.attention_backend = backend
    samples = fixture_samples()
    assert [s.masked for s in samples] == [[2, 3, 5], [2]]
    with torch.no_grad():
        rows = model(make_batch(samples, RELEASED))
        assert rows.ar_BAD is not None
        assert rows.nar_BMD is not None
        assert rows.aux_BMD is not None
        ar, nar, aux = (model.logits(h) for h in (rows.ar_BAD, rows.nar_BMD, rows.aux_BMD))
    expect = FIXTURE["expect"]
    for b, sample in enumerate(samples):
        length, masked = len(sample.target), len(sample.masked)
        shown = length - masked
        pairs = (
            (ar[b, : length - 1], expect["ar_logits"][b, : length - 1]),
            (nar[b, :masked], expect["nar_content_logits"][b, shown:length]),
            (aux[b, :masked], expect["aux_query_logits"][b, :masked]),
        )
        for ours, theirs in pairs:
            assert float((ours - theirs).abs().max()) < TOLERANCE
    assert rows.length_logits_BK is not None
    assert float((rows.length_logits_BK - expect["length_logits"]).abs().max()) < TOLERANCE


def test_losses_and_gradient_norm_equal_those_of_the_released_code(model: JanusModel) -> None:
    run = RunConfig(data=DataConfig(task="pair"), objective=ObjectiveConfig(preset="released"))
    objective = JanusObjective(resolve(run).objective, 28, ParallelLayers())
    expect = FIXTURE["expect"]
    batch = make_batch(fixture_samples(), RELEASED)
    batch = replace(batch, length_target_B=expect["length_target"])
    model.zero_grad()
    report = objective(model(batch), batch, batch.counts)
    terms = {name: float(value) for name, value in report.terms.items()}
    # The released code logs the loss in two parts: AR with its KL terms, and the rest.
    ar = terms["ar"] + terms["kl_ar_nar"] + 3 * terms["kl_ar_aux"]
    nar = 0.5 * (terms["nar"] + terms["aux"]) + 0.1 * terms["length"] + terms["kl_nar_aux"]
    assert abs(float(report.total.detach()) - expect["loss"]) < 1e-5
    assert abs(ar - expect["ar_loss"]) < 1e-5
    assert abs(nar - expect["nar_loss"]) < 1e-5
    report.total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert abs(float(norm) - expect["grad_norm"]) < 1e-4
