"""What decoding computes, counted: rows, projections, calls; and that batching changes no result."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.config.schema import ObjectiveConfig
from janus_ds.decode.generator import Generator
from janus_ds.model.janus import JanusModel
from tests.support.tiny_model import tiny_generator, tiny_model
from tests.support.two_stream import TOY

SOURCES = [[5 + (7 * i + j) % 20 for j in range(1 + (5 * i) % 9)] for i in range(13)]


def generator(model: JanusModel, preset: str = "paper", batch: int = 4, **decode: Any) -> Generator:
    options = {"mode": "ar", "beam": 3, "max_length": 8, **decode}
    return tiny_generator(model, ObjectiveConfig(preset=preset), batch, **options)


@pytest.fixture
def model() -> JanusModel:
    built = tiny_model(seed=5)
    with torch.no_grad():
        built.embedding.weight[TOY.eos] *= 0.8  # outputs of many lengths
    return built


class Counts:
    """Rows through parts of a model."""

    def __init__(self, model: JanusModel) -> None:
        self.rows: dict[str, list[int]] = {}
        self.calls: Counter[str] = Counter()
        self.vocabulary: list[int] = []
        for name, module in model.named_modules():
            if name.endswith(("fc1", "attention.k", "attention.v", "attention.q")) or name == "encoder":
                module.register_forward_hook(self._hook(name))
        project = model.logits

        def logits(hidden: Tensor) -> Tensor:
            self.vocabulary.append(hidden.numel() // hidden.shape[-1])
            return project(hidden)

        model.logits = logits  # type: ignore[method-assign]

    def _hook(self, name: str) -> Any:
        def count(module: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
            self.calls[name] += 1
            self.rows.setdefault(name, []).append(given[0].shape[0] * given[0].shape[1])

        return count


def test_a_step_is_two_rows_a_beam_and_the_last_layer_one(model: JanusModel) -> None:
    counts = Counts(model)
    generator(model).generate_ids(SOURCES[4:5])
    steps = len(counts.vocabulary)
    assert steps > 1
    assert counts.vocabulary == [3] * steps
    assert counts.rows["decoder.layers.0.fc1"] == [6] * steps
    assert counts.rows["decoder.layers.1.fc1"] == [3] * steps
    # Keys and values of content rows only; those of the source once.
    assert counts.rows["decoder.layers.1.self_attention.k"] == [3] * steps
    assert counts.rows["decoder.layers.1.cross_attention.k"] == [len(SOURCES[4]) + 2]
    assert counts.calls["encoder"] == 1
    plain = Counts(again := tiny_model(seed=5))
    generator(again, "ar").generate_ids(SOURCES[4:5])
    assert set(plain.rows["decoder.layers.0.fc1"]) == {3}


def test_places_are_refilled_and_each_source_is_encoded_once(model: JanusModel) -> None:
    counts = Counts(model)
    seen: list[tuple[int, int]] = []
    many = generator(model)
    found = many.generate_ids(SOURCES, lambda done, of: seen.append((done, of)))
    steps = len(counts.vocabulary)
    assert sum(counts.rows["encoder"]) <= 13 * 11
    assert counts.calls["encoder"] > 2
    assert seen == sorted(seen)
    assert seen[-1] == (13, 13)
    # As long as sentences wait, every step is full; one after the other they need more steps.
    assert counts.vocabulary[: steps // 2] == [12] * (steps // 2)
    batches = [counted_steps(SOURCES_SORTED[i : i + 4]) for i in range(0, 13, 4)]
    assert steps < sum(batches)
    assert all(found)


SOURCES_SORTED = sorted(SOURCES, key=lambda source: -len(source))


def counted_steps(sources: list[list[int]]) -> int:
    model = tiny_model(seed=5)
    with torch.no_grad():
        model.embedding.weight[TOY.eos] *= 0.8
    counts = Counts(model)
    generator(model).generate_ids(sources)
    return len(counts.vocabulary)


@pytest.mark.parametrize(
    "decode",
    [
        {"beam_stop": "fairseq"},
        {"beam_stop": "transformers", "length_penalty": 2.0},
        {"beam": 1},
        {"mode": "nar", "iterations": 4, "length_beam": 3},
        {"mode": "nar", "iterations": 10, "length_beam": 4, "nar_score": "released"},
        {"mode": "aux", "beam": 1, "length_beam": 2},
        {"forced_bos": TOY.bos},
    ],
)
def test_batches_change_nothing(model: JanusModel, decode: dict[str, Any]) -> None:
    """A forced first token is forced at refilled places, too."""
    expected = [generator(model, batch=1, **decode).generate_ids([source])[0] for source in SOURCES]
    assert len({len(item.tokens) for items in expected for item in items}) > 2
    for batch in (2, 5, 32):
        found = generator(model, batch=batch, **decode).generate_ids(SOURCES)
        for ours, theirs in zip(found, expected, strict=True):
            assert [item.tokens for item in ours] == [item.tokens for item in theirs]
            assert decode.get("mode") != "aux" or ours[0].passes == theirs[0].passes
            assert max(abs(a.score - b.score) for a, b in zip(ours, theirs, strict=True)) < 1e-10


def test_nar_projects_masked_rows_and_drops_finished_ones(model: JanusModel) -> None:
    counts = Counts(model)
    nar = generator(model, mode="nar", iterations=4, length_beam=2)
    nar.generate_ids(SOURCES[:4])
    assert counts.calls["encoder"] == 1
    assert counts.calls["decoder.layers.0.cross_attention.k"] == 1
    passes = counts.rows["decoder.layers.0.fc1"]
    # Masked rows only, and they become fewer.
    assert all(masked < rows for masked, rows in zip(counts.vocabulary, passes, strict=True))
    assert counts.vocabulary == sorted(counts.vocabulary, reverse=True)
    # Short candidates are finished before the last pass.
    assert passes[-1] < passes[0]
    # The last layer computes masked rows only (as many of every candidate), and keys of all.
    last = counts.rows["decoder.layers.1.fc1"]
    assert all(m <= n < rows for m, n, rows in zip(counts.vocabulary, last, passes, strict=True))
    assert counts.rows["decoder.layers.1.self_attention.k"] == passes
    one = Counts(again := tiny_model(seed=5))
    generator(again, mode="nar", iterations=4, length_beam=1).generate_ids(SOURCES[4:5])
    assert one.rows["decoder.layers.1.fc1"] == one.vocabulary
