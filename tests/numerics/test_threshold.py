"""Unmasking by a threshold, held against a loop over one candidate at a time, in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from janus_ds.config.schema import ObjectiveConfig
from janus_ds.decode.generator import Generator
from janus_ds.decode.mask_predict import (
    MaskPredictSettings,
    length_candidates,
    mask_predict_settings,
    most_rows,
)
from janus_ds.decode.search_settings import Hypothesis, distinct
from tests.support.tiny_model import TINY, TINY_NMT, tiny_generator, tiny_model
from tests.support.two_stream import TOY

SOURCES = [[9, 8, 7, 6, 5], [7], [6, 5], [15, 14, 13, 12, 11, 10, 9, 8], [20, 21, 22, 23], [28, 5, 6, 7]]
LENGTHS = 3


def generator(rule: str, **decode: Any) -> Generator:
    released = {"length_convention": "with_specials", "mask_symbol": "unk", "ar_query_position": "previous"}
    objective = ObjectiveConfig(decoder_start="bos", **(released if rule == "released" else {}))
    model = tiny_model(TINY_NMT if rule == "released" else TINY, seed=3)
    with torch.no_grad():
        model.embedding.weight.mul_(3.0)
    options = {"mode": "nar", "nar_score": rule, "length_beam": LENGTHS}
    return tiny_generator(model, objective, **options, **decode)


@torch.no_grad()
def one_candidate(
    made: Generator, source: list[int], length: int, settings: MaskPredictSettings, threshold: float
) -> tuple[tuple[int, ...], float, int]:
    """Tokens, mean log-probability and passes of one length, slot by slot."""
    memory = made.model.encode(*made._pad([source]))
    row = [settings.bos, *[settings.mask] * (length - 2), settings.eos]
    open_slots, gains, passes = set(range(1, length - 1)), {}, 0
    while open_slots:
        every = torch.arange(length), length
        hidden = made.model.nar_rows(memory, torch.tensor([[row]]), torch.tensor([[length]]), every)
        log_p = made.model.logits(hidden).log_softmax(-1)
        log_p[:, [*settings.forbidden, settings.mask]] = -math.inf
        best = {slot: log_p[slot].max(0) for slot in open_slots}
        surest = max(sorted(open_slots), key=lambda slot: float(best[slot].values))
        last = settings.iterations is not None and passes == settings.iterations
        for slot in sorted(open_slots):
            if last or slot == surest or float(best[slot].values.exp()) > threshold:
                row[slot], gains[slot] = int(best[slot].indices), float(best[slot].values)
                open_slots.discard(slot)
        passes += 1
    divisor = length if settings.score == "released" else length - 2
    return tuple(row[1:-1]), sum(gains.values()) / max(1, divisor), passes


@torch.no_grad()
def by_loop(made: Generator, threshold: float) -> list[list[Hypothesis]]:
    settings = mask_predict_settings(made.config, TOY)
    found = []
    for source in SOURCES:
        logits = made.model.length_logits(made.model.encode(*made._pad([source])))
        convention = made.config.objective.length_convention or "inner"
        lengths = length_candidates(logits, settings.score, LENGTHS, convention, most_rows(made.config))
        rows = [one_candidate(made, source, n, settings, threshold) for n in lengths[0].tolist()]
        passes = max(count for _, _, count in rows)
        items = [Hypothesis(tokens, score, passes) for tokens, score, _ in rows]
        found.append(sorted(items, key=lambda item: -item.score))
    return found


@pytest.mark.parametrize("rule", ["paper", "released"])
@pytest.mark.parametrize("iterations", [None, 0, 2])
def test_the_loop_gives_the_same(rule: str, iterations: int | None) -> None:
    used = set()
    for threshold in (0.05, 0.3, 0.6, 0.9, 1.0):
        made = generator(rule, iterations=iterations, threshold=threshold)
        expected = by_loop(made, threshold)
        for ours, theirs in zip(made.generate_ids(SOURCES), map(distinct, expected), strict=True):
            assert [item.tokens for item in ours] == [item.tokens for item in theirs]
            assert [item.passes for item in ours] == [item.passes for item in theirs]
            for item, other in zip(ours, theirs, strict=True):
                assert item.score == pytest.approx(other.score, abs=1e-10)
            used.add((threshold, ours[0].passes, max(len(item.tokens) for item in ours)))
    limit = math.inf if iterations is None else iterations + 1
    assert all(passes <= limit for _, passes, _ in used)
    if iterations is None:
        # Surer than 1 is no token: one a pass. A low threshold takes fewer.
        assert all(passes == longest for p, passes, longest in used if p == 1.0)
        assert {passes < longest for p, passes, longest in used if p == 0.05} >= {True}


def test_more_certainty_takes_more_passes() -> None:
    def passes(threshold: float) -> int:
        found = generator("paper", iterations=None, threshold=threshold).generate_ids(SOURCES)
        return sum(group[0].passes for group in found)

    taken = [passes(p) for p in (0.05, 0.5, 0.9, 1.0)]
    assert all(a <= b for a, b in itertools.pairwise(taken))
    assert taken[0] < taken[-1]
