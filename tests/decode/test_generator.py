"""What a generator does around its searches: who is decoded together, and what is told of an output."""

from __future__ import annotations

from typing import Any

import pytest

from janus_ds.config.schema import ObjectiveConfig
from janus_ds.decode import beam_search, generator
from janus_ds.decode.text import batches_of, searches_of
from tests.support.tiny_model import TINY, tiny_generator, tiny_model


def test_one_long_sentence_does_not_make_few_places_of_all() -> None:
    lengths = {0: 1000, **dict.fromkeys(range(1, 101), 20)}
    batches = list(batches_of(lengths, 32, 4096))
    joined = list(searches_of(batches, joined=True))
    assert [(places, len(indices)) for places, indices in joined] == [(4, 4), (32, 97)]
    assert sorted(i for _, indices in joined for i in indices) == list(lengths)
    assert list(searches_of(batches, joined=False)) == [(len(batch), batch) for batch in batches]
    assert not list(searches_of([], joined=True))


@pytest.mark.parametrize("mode", ["ar", "nar", "aux", "draft"])
def test_seconds_begin_before_the_encoder(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all modes, by a clock that the encoder alone moves by a second; in AR also of those that wait."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-6
        return now

    def encode(*arguments: Any) -> Any:
        nonlocal now
        now += 1.0
        return of_model(*arguments)

    model = tiny_model(TINY, 1)
    of_model = model.encode
    monkeypatch.setattr(model, "encode", encode)
    for module in (beam_search, generator):
        monkeypatch.setattr(module, "perf_counter", clock)
    made = tiny_generator(model, ObjectiveConfig(decoder_start="bos"), 2, mode=mode, beam=1)
    found = made.generate_ids([[9, 8, 7], [7], [6, 5], [15, 14], [20]])
    assert all(item.seconds >= 1.0 for group in found for item in group)
