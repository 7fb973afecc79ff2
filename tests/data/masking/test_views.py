"""Views made by the masking laws: the source of pretraining, rotation, pairs, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from janus_ds.config.schema import MaskingConfig
from janus_ds.data.masking.span_laws import INFILLING_LAWS, MaskDraw, draw_noise
from tests.support.maskings import noise, sample_keys, views_of
from tests.support.packed_data import SPECIAL, random_rows

MASK = SPECIAL.mask


def source_by_hand(row: list[int], draw: MaskDraw, start: int) -> list[int]:
    source = [SPECIAL.bos]
    for p, token in enumerate(row, start):
        source += [MASK] * int(draw.inserted_N[p])
        if not draw.hidden_N[p]:
            source.append(token)
        elif draw.opens_N[p]:
            source.append(MASK)
    return [*source, SPECIAL.eos]


@pytest.mark.parametrize("law", INFILLING_LAWS)
def test_the_source_is_the_target_with_holes(law):
    rows = random_rows(60, 40)
    without_rotation = MaskingConfig(law, 0.4, 0.3, 2.0, 0.0)
    lengths = np.array([len(r) for r in rows])
    draw = draw_noise(without_rotation, sample_keys(60), lengths)
    views = views_of(without_rotation, rows)
    start = 0
    for i, row in enumerate(rows):
        assert views.source.row(i).tolist() == source_by_hand(row, draw, start)
        assert views.target.row(i).tolist() == [SPECIAL.bos, *row, SPECIAL.eos]
        start += len(row)


@pytest.mark.parametrize("law", INFILLING_LAWS)
def test_a_source_is_no_longer_than_it_may_be(law):
    """Only rows that would be longer change, and lose nothing but masks of spans without tokens."""
    masking = MaskingConfig(law, 0.3, 0.3, 0.5, 0.0)
    rows = [*random_rows(400, 30), []]
    free, bound = views_of(masking, rows), views_of(masking, rows, most=30)
    over = np.flatnonzero(free.source.lengths > 32)
    assert len(over)
    assert bound.source.lengths.max() == 32
    for i, (one, other) in enumerate(zip(free.source.rows(), bound.source.rows(), strict=True)):
        if i not in over:
            assert one.tolist() == other.tolist()
        assert [t for t in one if t != MASK] == [t for t in other if t != MASK]
        assert len(other) == min(len(one), 32)
    assert (free.masked == bound.masked).all()


def test_each_hidden_span_becomes_one_mask():
    draw = noise("infilling", 200, 200)
    opened, hidden, inserted = draw.opens_N.sum(), draw.hidden_N.sum(), draw.inserted_N.sum()
    # Poisson(2): 2.31 tokens a span that is not empty; a few are cut by the end or by the budget.
    assert 2.15 < hidden / opened < 2.35
    assert abs(inserted / (opened + inserted) - math.exp(-2)) < 0.02
    assert not (draw.opens_N & ~draw.hidden_N).any()
    runs = draw.hidden_N.reshape(200, 200)
    first_of_run = runs & ~np.pad(runs, ((0, 0), (1, 0)))[:, :-1]
    assert (draw.opens_N.reshape(200, 200) | ~first_of_run).all()


def test_overlapping_hidden_spans_share_a_mask_and_adjacent_ones_do_not():
    from janus_ds.data.masking.span_laws import Spans, _draw_of

    spans = Spans(np.array([1, 2, 5, 7]), np.array([3, 4, 7, 9]), np.array([True] * 4))
    draw = _draw_of(spans, 10)
    assert np.flatnonzero(draw.hidden_N).tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert np.flatnonzero(draw.opens_N).tolist() == [1, 5, 7]


def test_rotation_turns_half_of_the_sources():
    rows = [list(range(10, 40))] * 400
    turned = views_of("infilling_released", rows)
    straight = views_of(MaskingConfig("infilling_released", 0.3, 0.3, 3.0, 0.0), rows)
    changed = 0
    for one, other in zip(turned.source.rows(), straight.source.rows(), strict=True):
        inner, plain = one[1:-1].tolist(), other[1:-1].tolist()
        assert (one[0], one[-1]) == (SPECIAL.bos, SPECIAL.eos)
        assert any(inner == plain[k:] + plain[:k] for k in range(len(plain)))
        changed += inner != plain
    assert 160 < changed < 240
    assert (turned.masked == straight.masked).all()


def test_pairs_keep_their_source():
    rows = random_rows(10, 9)
    views = views_of("span_union", rows, pair=True)
    assert [r.tolist()[1:-1] for r in views.source.rows()] == rows


def test_a_law_for_targets_alone_still_noises_the_source_of_pretraining():
    draw = draw_noise(MaskingConfig("uniform", 0.0, 0.3, 2.0, 0.0), sample_keys(50), np.full(50, 30))
    assert draw.hidden_N.sum() == 50 * 9
    assert (draw.masked_N | ~draw.hidden_N).all()
    assert len(set(draw.masked_N.reshape(50, 30).sum(axis=1).tolist())) > 8
