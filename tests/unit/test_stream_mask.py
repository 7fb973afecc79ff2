"""The visibility rule against the paper's worked example (section 3.1) and by its own invariants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from janus_ds.batch import RowLayout
from janus_ds.stream_mask import CONTENT_SEGMENTS, Segment, visible

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


def test_a_layout_says_the_rule_of_its_columns() -> None:
    layout = RowLayout(arc=3, vis=2, cmp=2, msk=2, arq=3, qry=2)
    rows = [(segment, rank) for segment in Segment for rank in range(layout.width(segment))]
    content = layout.content_rows
    expected = [[visible(*row, *key) for key in rows[:content]] for row in rows]
    assert layout.visible(slice(None), slice(content)).tolist() == expected
    some, keys = torch.tensor([9, 2, 12]), slice(1, 7)
    assert layout.visible(some, keys).tolist() == [expected[row][keys] for row in (9, 2, 12)]


def test_layout_puts_content_first_and_predicted_rows_last() -> None:
    layout = RowLayout(arc=4, vis=3, cmp=2, msk=2, arq=4, qry=2)
    assert layout.rows == 17
    assert layout.content_rows == 11
    assert layout.predicted_start == layout.start(Segment.MSK) == 9
    assert RowLayout(arc=5).predicted_start == 0
    assert RowLayout(vis=3, msk=2).predicted_start == 3
