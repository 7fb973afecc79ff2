"""The model's names, initial values, work per pass, recomputation, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from janus_ds.batch import SpecialTokens
from janus_ds.config.schema import ModelConfig
from janus_ds.errors import CheckpointError, DataError
from janus_ds.model.decoding.cache import ArStream
from janus_ds.model.janus import JanusModel
from janus_ds.model.weights import load_weights, padded_vocab, parameter_shapes
from janus_ds.parallel.tensor_parallel import ParallelLayers
from tests.support.tiny_model import SAMPLES, TINY, TINY_NMT, tiny_model
from tests.support.two_stream import TOY, Conventions, Sample, make_batch


def shapes_seen(module: nn.Module) -> list[tuple[int, ...]]:
    """Shapes of the inputs that a module gets from now on."""
    seen: list[tuple[int, ...]] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    return seen


@pytest.mark.parametrize("config", [TINY, TINY_NMT, replace(TINY, vocab_multiple=64)])
def test_names_and_shapes_are_those_announced(config: ModelConfig) -> None:
    model = JanusModel(config, TOY, ParallelLayers())
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert found == parameter_shapes(config, TOY.vocab_size)
    assert found.keys() == model.state_dict().keys(), "weights alone make a checkpoint"
    assert "decoder.layers.0.cross_attention.q.weight" in found
    assert ("encoder.embedding_norm.weight" in found) == config.layernorm_embedding


def test_weights_start_normal_biases_and_padding_rows_at_zero() -> None:
    config = ModelConfig(d_model=64, ffn_dim=96, heads=2)
    torch.manual_seed(0)
    model = JanusModel(config, replace(TOY, vocab_size=509), ParallelLayers())
    assert model.padded_vocab == padded_vocab(config, 509) == 512
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            assert abs(float(parameter.detach().std()) - 0.02) < 0.002, name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float("norm.weight" in name))), name
    table = model.output_weight
    assert not table[[TOY.pad, 509, 510, 511]].any()
    assert bool(table[[0, 2, 508]].any(1).all())


def test_one_pass_does_no_work_twice() -> None:
    model = tiny_model()
    batch = make_batch(SAMPLES)
    layout, samples, width = batch.layout, len(SAMPLES), TINY.d_model
    encoder = shapes_seen(model.encoder.layers[0].fc1)
    lookups = shapes_seen(model.embedding)
    layers = model.decoder.decoder_layers()
    names = ("self_attention.q", "self_attention.k", "self_attention.v", "cross_attention.k", "fc1")
    seen = [{name: shapes_seen(layer.get_submodule(name)) for name in names} for layer in layers]
    model(batch)
    assert len(encoder) == 1, "one encoder pass"
    assert len(lookups) == 1, "one gradient of the table's size"
    predicted = layout.rows - layout.predicted_start
    for calls, computed in zip(seen, (layout.rows, predicted), strict=True):
        assert calls["self_attention.q"] == [(samples, computed, width)]
        assert calls["fc1"] == [(samples, computed, width)]
        for name in ("self_attention.k", "self_attention.v"):
            assert calls[name] == [(samples, layout.content_rows, width)], "no keys of query rows"
        assert calls["cross_attention.k"] == [(samples, batch.source_BS.shape[1], width)]
    assert predicted == layout.msk + layout.arq + layout.qry < layout.rows


@pytest.mark.parametrize(
    ("rows", "present"),
    [
        ({"arc"}, (True, False, False)),
        ({"arc", "arq"}, (True, False, False)),
        ({"vis", "msk"}, (False, True, False)),
        ({"arc", "vis", "msk"}, (True, True, False)),
        ({"arc", "vis", "cmp", "msk", "arq", "qry"}, (True, True, True)),
    ],
)
def test_every_layout_gives_its_rows(rows: set[str], present: tuple[bool, ...]) -> None:
    batch = make_batch(SAMPLES, Conventions(rows=frozenset(rows)))
    out = tiny_model()(batch)
    hidden = (out.ar_BAD, out.nar_BMD, out.aux_BMD)
    assert tuple(h is not None for h in hidden) == present
    widths = (batch.ar_target_BA.shape[1], batch.masked_target_BM.shape[1], batch.masked_target_BM.shape[1])
    assert all(h is None or h.shape == (3, w, 16) for h, w in zip(hidden, widths, strict=True))
    assert out.length_logits_BK.shape == (3, 16)


def gradients(model: JanusModel, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    out = model(make_batch(SAMPLES))
    (out.ar_BAD.pow(2).sum() + out.aux_BMD.sum() + out.length_logits_BK.sum()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_recomputation_draws_the_same_dropout_and_gives_the_same_gradients() -> None:
    config = replace(TINY, dropout=0.2, attention_dropout=0.2, activation_dropout=0.2)
    torch.manual_seed(0)
    plain = JanusModel(config, TOY, ParallelLayers()).double().train()
    saving = JanusModel(config, TOY, ParallelLayers(), recompute=True).double().train()
    saving.load_state_dict(plain.state_dict())
    passes = shapes_seen(saving.decoder.layers[0].fc2)
    expected, found = gradients(plain, 3), gradients(saving, 3)
    assert len(passes) == 2, "the layer ran once more in the backward pass"
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    other = gradients(plain, 4)
    assert not torch.equal(other["embedding.weight"], expected["embedding.weight"]), "dropout is on"


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_acts_in_training_and_not_in_evaluation(kind: str) -> None:
    model = tiny_model(replace(TINY, **{kind: 0.3}))
    batch = make_batch(SAMPLES)
    with torch.no_grad():
        first, second = model(batch), model(batch)
        assert torch.equal(first.ar_BAD, second.ar_BAD)
        model.train()
        first, second = model(batch), model(batch)
    for field in ("ar_BAD", "nar_BMD", "aux_BMD", "length_logits_BK"):
        assert not torch.equal(getattr(first, field), getattr(second, field)), field


def raises(error: type[Exception], call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_what_does_not_fit_the_position_tables_is_refused_in_words() -> None:
    model = tiny_model()
    long = [0, *[5] * 15, 2]
    fits = Conventions(extra_padding=5)
    source = make_batch([Sample(long, [0, 7, 2], [1])])
    raises(DataError, lambda: model(source), "source of 17 tokens", "max_source_positions")
    target = make_batch([Sample([0, 2], long, [1])])
    raises(DataError, lambda: model(target), "target of 17 tokens", "max_target_positions")
    model(make_batch([Sample(long[1:], long[1:], [1])], fits))
    memory = model.encode(torch.tensor([[0, 5, 2]]), torch.tensor([3]))
    stream = ArStream(True, 1, TOY.mask)
    raises(DataError, lambda: model.start_cache(memory, stream, 1, 16), "17 tokens")
    model.start_cache(memory, stream, 1, 15)


def test_loading_names_what_differs() -> None:
    model = tiny_model()
    weights = {name: p.detach() + 1 for name, p in model.named_parameters()}
    load_weights(model, weights)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    weights["length_head.weight"] = torch.zeros(3, 16)
    weights["strange"] = weights.pop("decoder.layers.1.fc1.bias")
    raises(
        CheckpointError,
        lambda: load_weights(model, weights, "run/x"),
        "run/x",
        "decoder.layers.1.fc1.bias is missing",
        "strange is not part",
        "length_head.weight has shape (3, 16), the model (16, 16)",
    )
    huge = SpecialTokens(0, 1, 2, 3, 4, 1000)
    other = JanusModel(TINY_NMT, huge, ParallelLayers())
    raises(CheckpointError, lambda: load_weights(other, weights), "and", "more")
