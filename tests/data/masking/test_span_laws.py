"""The masking laws: what holds under all of them, how much each masks, and where."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from janus_ds.data.masking.counter_rng import Stream
from janus_ds.data.masking.span_laws import (
    INFILLING_LAWS,
    draw_lengths,
    draw_noise,
    poisson_table,
)
from tests.support.maskings import CONFIGS, every_law, masks, noise, sample_keys, views_of
from tests.support.packed_data import SPECIAL, random_rows

# ---- what holds under every law ----


@every_law
def test_ends_are_never_masked_and_something_always_is(law):
    rows = [[7] * n for n in [1, 1, 1, 2, 2, 3, 4, 5, 9, 30] * 20]
    views = views_of(law, rows, pair=law not in INFILLING_LAWS)
    for target, masked in zip(
        views.target.rows(), np.split(views.masked, views.target.offsets[1:-1]), strict=True
    ):
        assert not masked[0]
        assert not masked[-1]
        assert masked.any()
        assert (target[0], target[-1]) == (SPECIAL.bos, SPECIAL.eos)


@every_law
def test_masks_do_not_depend_on_the_batch(law):
    rows = random_rows(40, 30)
    pair = law not in INFILLING_LAWS
    whole = views_of(law, rows, pair=pair)
    order = np.random.default_rng(5).permutation(40)[:17]
    # A subset in another order, beside a sample so long that every array gets other shapes.
    some = views_of(law, [*(rows[i] for i in order), [9] * 400], ids=[*order, 77], pair=pair)
    for place, i in enumerate(order):
        assert whole.source.row(i).tolist() == some.source.row(place).tolist()
        ours = some.masked[some.target.offsets[place] : some.target.offsets[place + 1]]
        assert whole.masked[whole.target.offsets[i] : whole.target.offsets[i + 1]].tolist() == ours.tolist()


@every_law
def test_seed_epoch_and_sample_change_the_mask(law):
    rows = [list(range(10, 60))] * 4
    pair = law not in INFILLING_LAWS
    one = views_of(law, rows, pair=pair).masked
    assert (one == views_of(law, rows, pair=pair).masked).all()
    for other in (
        views_of(law, rows, seed=2, pair=pair),
        views_of(law, rows, epoch=1, pair=pair),
        views_of(law, rows, ids=[4, 5, 6, 7], pair=pair),
    ):
        assert (one != other.masked).mean() > 0.1
    assert (one[:52] != one[52:104]).mean() > 0.1


@every_law
def test_no_tokens_no_mask(law):
    assert len(draw_noise(CONFIGS[law], sample_keys(2), np.zeros(2, np.int64)).masked_N) == 0
    draw = draw_noise(CONFIGS[law], sample_keys(3), np.array([4, 0, 4]))
    assert draw.masked_N[:4].any()
    assert draw.masked_N[4:].any()


# ---- how much is masked ----


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 23, 30, 60])
def test_shares_of_the_paper_are_exact(length):
    union = masks("span_union", length, 200).sum(axis=1)
    assert set(union.tolist()) == {math.ceil(0.7 * length - 1e-9)}
    draw = noise("infilling", length, 200)
    assert set(draw.masked_N.reshape(200, -1).sum(axis=1).tolist()) == {math.ceil(length / 2)}
    assert set(draw.hidden_N.reshape(200, -1).sum(axis=1).tolist()) == {math.ceil(0.3 * length - 1e-9)}
    assert (draw.masked_N | ~draw.hidden_N).all()


def test_the_released_share_on_sentences():
    """Nominal .7 with overlap: .56 +- .1 on 10 .. 60 tokens (measured on the released code)."""
    shares = {n: masks("span_overlap", n, 400).mean() for n in (10, 20, 40, 60)}
    assert all(0.46 < share < 0.66 for share in shares.values()), shares
    assert abs(np.mean(list(shares.values())) - 0.58) < 0.03


def test_released_pretraining_hides_14_and_masks_27_percent():
    draw = noise("infilling_released", 490, 200)
    assert abs(draw.masked_N.mean() - 0.27) < 0.01
    assert abs(draw.hidden_N.mean() - 0.14) < 0.01
    assert (draw.masked_N | ~draw.hidden_N).all()


def test_uniform_draws_the_number_uniformly():
    counts = masks("uniform", 8, 4000).sum(axis=1)
    cells = np.bincount(counts, minlength=9)
    assert cells[0] == 0
    assert abs(cells[1:] / 4000 - 1 / 8).max() < 0.03
    assert abs(masks("uniform", 8, 4000).mean(axis=0) - 4.5 / 8).max() < 0.03


# ---- where and in what lengths ----


@pytest.mark.parametrize(("law", "share"), [("span_union", 0.7), ("infilling", 0.5)])
def test_every_position_is_masked_equally_often(law, share):
    masked = noise(law, 20, 6000).masked_N.reshape(6000, 20)
    assert abs(masked.mean(axis=0) - share).max() < 0.03  # sd .006
    hidden = noise("infilling", 20, 6000).hidden_N.reshape(6000, 20)
    assert abs(hidden.mean(axis=0) - 0.3).max() < 0.03


def test_further_spans_lie_anywhere():
    """They are no mere longer edges of the hidden ones."""
    draw = noise("infilling", 40, 500)
    hidden, further = draw.hidden_N.reshape(500, 40), (draw.masked_N & ~draw.hidden_N).reshape(500, 40)
    beside = np.zeros_like(hidden)
    beside[:, 1:] |= hidden[:, :-1]
    beside[:, :-1] |= hidden[:, 1:]
    assert 0.1 < (further & beside).sum() / further.sum() < 0.6


@pytest.mark.parametrize(("mean", "zero"), [(2.0, True), (3.0, True), (2.0, False)])
def test_span_lengths_are_poisson(mean, zero):
    lengths, drawn = draw_lengths(
        sample_keys(300), Stream.HIDDEN_LENGTH, np.full(300, 300), poisson_table(mean, zero)
    )
    sums = lengths.sum(axis=1)
    assert set(sums.tolist()) == {300}
    # Without the last span of each sample, which is trimmed and more often a long one.
    last = drawn.sum(axis=1) - 1
    drawn[np.arange(300), last] = False
    share = np.bincount(lengths[drawn], minlength=9)[:9] / drawn.sum()
    law = np.array([math.exp(-mean) * mean**k / math.factorial(k) for k in range(9)])
    if not zero:
        law[0] = 0.0
        law /= 1 - math.exp(-mean)
    assert abs(share - law).max() < 0.01


def overlap_by_hand(length: int, draw: random.Random) -> list[bool]:
    """The released law in plain Python."""
    budget, spans = min(length, math.ceil(0.7 * (length + 2))), []
    while sum(spans) < budget:
        u, k, term = draw.random(), 0, math.exp(-2.0)
        while u >= term:
            u -= term
            k += 1
            term *= 2.0 / k
        spans.append(min(k, budget - sum(spans)))
    spans = [n for n in spans if n]
    masked = [False] * length
    for start, n in zip(draw.sample(range(length), len(spans)), spans, strict=True):
        for p in range(start, start + (n if start + n <= length else 1)):
            masked[p] = True
    return masked


def test_coverage_of_the_released_law_by_position():
    draw = random.Random(3)
    by_hand = np.mean([overlap_by_hand(12, draw) for _ in range(4000)], axis=0)
    ours = masks("span_overlap", 12, 8000).mean(axis=0)
    assert abs(ours - by_hand).max() < 0.04
    assert ours[0] < ours[6] - 0.05  # spans begin but do not reach back over the start
