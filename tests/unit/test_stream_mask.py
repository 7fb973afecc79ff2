"""The visibility rule against the paper's worked example (section 3.1) and by its own invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from janus_ds.batch import RowLayout
from janus_ds.stream_mask import CONTENT_SEGMENTS, Segment, dense_mask, visible

# Y = y1..y6, masked y2 y3 y5; columns y1 y4 y6 M M M y2 y3 y5 (VIS, MSK, CMP).
COLUMNS = [(Segment.VIS, r) for r in range(3)] + [(Segment.MSK, r) for r in range(3)]
COLUMNS += [(Segment.CMP, r) for r in range(3)]
WORKED_EXAMPLE = [
    *((segment, rank, "111111000") for segment in (Segment.VIS, Segment.MSK) for rank in range(3)),
    (Segment.CMP, 0, "111011100"),
    (Segment.CMP, 1, "111001110"),
    (Segment.CMP, 2, "111000111"),
    (Segment.QRY, 0, "111111000"),
    (Segment.QRY, 1, "111011100"),
    (Segment.QRY, 2, "111001110"),
]


@pytest.mark.parametrize(("segment", "rank", "expected"), WORKED_EXAMPLE)
def test_worked_example(segment: Segment, rank: int, expected: str) -> None:
    seen = "".join(str(int(visible(segment, rank, k, j))) for k, j in COLUMNS)
    assert seen == expected


def test_ar_rows_see_the_past_only() -> None:
    for segment in (Segment.ARC, Segment.ARQ):
        seen = [[bool(visible(segment, i, Segment.ARC, j)) for j in range(4)] for i in range(4)]
        assert np.array_equal(seen, np.tril(np.ones((4, 4), bool)))


def test_streams_do_not_mix() -> None:
    ar, nar = (Segment.ARC, Segment.ARQ), (Segment.VIS, Segment.MSK, Segment.CMP, Segment.QRY)
    for row in ar:
        assert not any(visible(row, 2, key, 0) for key in CONTENT_SEGMENTS if key != Segment.ARC)
    assert not any(visible(row, 2, Segment.ARC, 0) for row in nar)


def test_queries_are_never_seen() -> None:
    for key in (Segment.ARQ, Segment.QRY):
        assert not any(visible(row, 1, key, 0) for row in Segment)


def test_aux_sees_each_masked_slot_once_as_mask_or_gold() -> None:
    for i in range(5):
        for row in (Segment.CMP, Segment.QRY):
            seen = [
                int(visible(row, i, Segment.MSK, j)) + int(visible(row, i, Segment.CMP, j)) for j in range(5)
            ]
            assert seen == [1] * 5


def test_dense_mask_leaves_padding_out_and_equals_the_rule() -> None:
    layout = RowLayout(arc=3, vis=2, cmp=2, msk=2, arq=3, qry=2)
    segment_R = layout.segment_of_rows()
    rank_R = torch.cat([torch.arange(layout.width(s)) for s in Segment])
    rank_BR = rank_R.expand(2, -1)
    content = layout.content_rows
    valid_BC = torch.ones(2, content, dtype=torch.bool)
    valid_BC[1, layout.columns(Segment.MSK)] = False
    mask = dense_mask(segment_R, rank_BR, segment_R[:content], rank_BR[:, :content], valid_BC)
    assert mask.shape == (2, layout.rows, content)
    for r in range(layout.rows):
        for c in range(content):
            rule = bool(visible(int(segment_R[r]), int(rank_R[r]), int(segment_R[c]), int(rank_R[c])))
            assert bool(mask[0, r, c]) == rule
            assert bool(mask[1, r, c]) == (rule and bool(valid_BC[1, c]))


def test_layout_puts_content_first_and_predicted_rows_last() -> None:
    layout = RowLayout(arc=4, vis=3, cmp=2, msk=2, arq=4, qry=2)
    assert layout.rows == 17
    assert layout.content_rows == 11
    assert layout.predicted_start == layout.start(Segment.MSK) == 9
    assert RowLayout(arc=5).predicted_start == 0
    assert RowLayout(vis=3, msk=2).predicted_start == 3


def test_the_rule_is_the_same_when_it_is_compiled() -> None:
    """FlexAttention traces the rule; comparisons with an IntEnum would come out false there."""
    cells = torch.cartesian_prod(torch.arange(6), torch.arange(3), torch.arange(4), torch.arange(3)).unbind(1)
    traced = torch.compile(lambda *cells: visible(*cells), backend="eager")
    expected = visible(*cells)
    assert expected.any()
    assert torch.equal(traced(*cells), expected)
