"""Ragged rows against plain lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ds.batch import Ragged

rows_of_ints = st.lists(st.lists(st.integers(0, 60000), max_size=5), max_size=8)


@settings(max_examples=60, deadline=None)
@given(rows_of_ints, st.data())
def test_rows_take_and_slice_agree_with_lists(rows, data):
    ragged = Ragged.from_rows(rows, dtype=np.uint16)
    assert len(ragged) == len(rows)
    assert [row.tolist() for row in ragged.rows()] == rows
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6)) if rows else []
    taken = ragged.take(chosen)
    assert [row.tolist() for row in taken.rows()] == [rows[i] for i in chosen]
    assert taken.values.dtype == np.uint16
    start = data.draw(st.integers(0, len(rows)))
    stop = data.draw(st.integers(start, len(rows)))
    part = ragged.slice(start, stop)
    assert [row.tolist() for row in part.rows()] == rows[start:stop]
    assert part.offsets[0] == 0
    both = Ragged.concatenate([part, ragged])
    assert [row.tolist() for row in both.rows()] == rows[start:stop] + rows
