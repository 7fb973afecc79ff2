"""Row layout: the literal tables of the method, and every preset against a plain-Python oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ds.batch import TwoStreamBatch
from janus_ds.config.schema import ObjectiveConfig
from janus_ds.data.masking.collate import Collator, RowKinds
from janus_ds.stream_mask import Segment
from tests.support.naive_step import views_of
from tests.support.packed_data import run_config
from tests.support.two_stream import TOY, Conventions, Sample, make_batch

ROWS = {
    "paper": "arc vis cmp msk arq qry",
    "released": "arc vis cmp msk arq qry",
    "ar": "arc",
    "ar_query": "arc arq",
    "cmlm": "vis msk",
}
CASES = [(preset, task) for preset in ROWS for task in ("pair", "denoise")]


def objective(preset: str, task: str = "pair") -> ObjectiveConfig:
    return run_config(preset, task).objective


def collated(samples: list[Sample], goal: ObjectiveConfig, **kwargs) -> TwoStreamBatch:
    options = {"length_classes": 256, "pad_multiple": 1} | kwargs
    return Collator(TOY, goal, **options)(views_of(samples), np.arange(len(samples)) + 100)


def segment(batch: TwoStreamBatch, name: Segment, field: str) -> list[list[int]]:
    """Token or position of the real rows of one segment, sample by sample."""
    lengths = {
        Segment.ARC: batch.ar_length_B,
        Segment.ARQ: batch.ar_length_B,
        Segment.VIS: batch.visible_length_B,
    }.get(name, batch.masked_length_B)
    columns = getattr(batch, f"row_{field}_BR")[:, batch.layout.columns(name)]
    return [row[:n].tolist() for row, n in zip(columns, lengths.tolist(), strict=True)]


# ---- literal tables ----

# b=0 e=2 y_i=i+3: A = b y1..y6 e masked y2,y3,y5; B = b y1 y2 y3 e masked y2 (paper, section 3.1).
A = Sample([0, 9, 2], [0, 4, 5, 6, 7, 8, 9, 2], [2, 3, 5])
B = Sample([0, 9, 9, 2], [0, 4, 5, 6, 2], [2])


def tables(batch: TwoStreamBatch, rows: tuple[Segment, ...]) -> list[str]:
    """Visibility of the first sample's real rows over real columns, VIS MSK CMP, as strings of 0 and 1."""
    layout = batch.layout
    valid, mask = batch.content_valid_BC(), layout.visible(slice(None), slice(layout.content_rows))
    order = [range(layout.rows)[layout.columns(s)] for s in (Segment.VIS, Segment.MSK, Segment.CMP)]
    columns = [c for part in order for c in part if valid[0, c]]
    length = {Segment.VIS: batch.visible_length_B, Segment.ARQ: batch.ar_length_B}
    picked = [layout.start(s) + r for s in rows for r in range(int(length.get(s, batch.masked_length_B)[0]))]
    return ["".join(str(int(mask[r, c])) for c in columns) for r in picked]


def test_worked_example_of_the_paper():
    """Y = y1..y6 with y2, y3, y5 masked; here with b and e around it, which shift positions by one."""
    batch = collated([A], objective("paper"), pad_multiple=8)
    assert batch.layout.msk == 8
    columns = [1, 2, 3, 5, 6, 7, 8, 9, 10]  # without b and e
    inner = ["".join(row[c] for c in columns) for row in tables(batch, (Segment.CMP, Segment.QRY))]
    assert inner == ["111011100", "111001110", "111000111", "111111000", "111011100", "111001110"]
    assert tables(batch, (Segment.VIS, Segment.MSK)) == ["11111111000"] * 8
    # Paper, Figure 2: the MASK that predicts a token carries that token's position, in every stream.
    assert segment(batch, Segment.ARQ, "position") == [[1, 2, 3, 4, 5, 6, 7]]
    for name in (Segment.MSK, Segment.CMP, Segment.QRY):
        assert segment(batch, name, "position") == [[2, 3, 5]]
    for name in (Segment.MSK, Segment.ARQ, Segment.QRY):
        assert set(segment(batch, name, "token")[0]) == {TOY.mask}


def test_bart_layout():
    """eos_bos: content e b w1 .. wn, targets b w1 .. wn e, query t at position t."""
    batch = collated([B], objective("paper", "denoise"))
    assert segment(batch, Segment.ARC, "token") == [[2, 0, 4, 5, 6]]
    assert batch.ar_target_BA.tolist() == [[0, 4, 5, 6, 2]]
    assert (
        segment(batch, Segment.ARC, "position")
        == segment(batch, Segment.ARQ, "position")
        == [[0, 1, 2, 3, 4]]
    )
    assert batch.ar_masked_T.tolist() == [2]
    assert batch.ar_unmasked_U.tolist() == [0, 1, 3, 4]


# ---- every preset against the oracle ----

inner_tokens = st.lists(st.integers(5, 28), min_size=1, max_size=9)


@st.composite
def some_samples(draw) -> list[Sample]:
    samples = []
    for source, target in draw(st.lists(st.tuples(inner_tokens, inner_tokens), min_size=1, max_size=4)):
        places = st.sets(st.integers(1, len(target)), min_size=1)
        samples.append(Sample([0, *source, 2], [0, *target, 2], sorted(draw(places))))
    return samples


def assert_same(ours: TwoStreamBatch, oracle: TwoStreamBatch, skip: set[str]) -> None:
    assert ours.layout == oracle.layout
    assert ours.counts == oracle.counts
    for (name, one), (_, other) in zip(ours.tensors(), oracle.tensors(), strict=True):
        if name not in skip:
            assert one.dtype == torch.int64, name
            assert one.tolist() == other.tolist(), name


@settings(max_examples=150, deadline=None)
@given(some_samples(), st.sampled_from(CASES), st.sampled_from([None, "predicted", "previous"]))
def test_every_preset_equals_the_oracle(samples, case, position):
    goal = objective(*case)
    if position:
        goal = replace(goal, ar_query_position=position)
    how = Conventions(
        query_position=goal.ar_query_position,
        start=goal.decoder_start,
        mask=TOY.unk if goal.mask_symbol == "unk" else TOY.mask,
        rows=frozenset(ROWS[case[0]].split()),
    )
    ours = collated(samples, goal)
    assert_same(ours, make_batch(samples, how), skip={"sample_id_B", "length_target_B"})
    assert ours.sample_id_B.tolist() == list(range(100, 100 + len(samples)))


@settings(max_examples=40, deadline=None)
@given(some_samples(), st.sampled_from(CASES), st.sampled_from([4, 8]))
def test_padding_changes_nothing_but_widths(samples, case, multiple):
    goal = objective(*case)
    tight, wide = collated(samples, goal), collated(samples, goal, pad_multiple=multiple)
    assert all(wide.layout.width(s) % multiple == 0 for s in Segment)
    assert all(0 <= wide.layout.width(s) - tight.layout.width(s) < multiple for s in Segment)
    assert wide.source_BS.shape[1] % multiple == 0
    assert wide.counts == tight.counts
    for name in Segment:
        for field in ("token", "position"):
            assert segment(wide, name, field) == segment(tight, name, field)
    padding = ~wide.content_valid_BC()
    assert set(wide.row_token_BR[:, : wide.layout.content_rows][padding].tolist()) <= {TOY.pad}
    assert set(wide.row_position_BR[:, : wide.layout.content_rows][padding].tolist()) <= {0}
    # The flat indices point at the same predictions in both.
    for field, values in (
        ("ar_unmasked_U", "ar_target_BA"),
        ("ar_masked_T", "ar_target_BA"),
        ("masked_T", "masked_target_BM"),
    ):
        picked = [getattr(b, values).reshape(-1)[getattr(b, field)].tolist() for b in (wide, tight)]
        assert picked[0] == picked[1]


# ---- the rest ----


def test_lengths_are_clamped_to_the_classes():
    for convention, classes, expected in (
        ("inner", 256, [6, 3]),
        ("inner", 6, [5, 3]),
        ("with_specials", 256, [8, 5]),
        ("with_specials", 7, [6, 5]),
    ):
        goal = replace(objective("paper"), length_convention=convention)
        assert collated([A, B], goal, length_classes=classes).length_target_B.tolist() == expected


def test_the_padded_source_stays_inside_the_position_table():
    for bound, width in ((None, 8), (6, 6), (4, 4)):
        batch = collated([A, B], objective("paper"), pad_multiple=8, max_source_positions=bound)
        assert batch.source_BS.shape == (2, width)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"weight_aux": 1.0}, RowKinds(False, False, True, True)),
        ({"weight_nar": 1.0}, RowKinds(False, False, True, False)),
        ({"weight_ar": 1.0, "weight_nar": 1.0}, RowKinds(True, True, True, False)),
        ({"weight_kl_ar_nar": 1.0}, RowKinds(True, True, True, False)),
        ({"weight_kl_ar_aux": 1.0}, RowKinds(True, True, True, True)),
        ({"weight_kl_nar_aux": 1.0}, RowKinds(False, False, True, True)),
        ({"weight_ar": 1.0, "ar_stream": "content"}, RowKinds(True, False, False, False)),
    ],
)
def test_rows_follow_the_weights(weights, expected):
    nothing = {name: 0.0 for name in vars(objective("paper")) if name.startswith("weight_")}
    assert RowKinds.of(replace(objective("paper"), **{**nothing, **weights})) == expected


def test_two_draws_repeat_the_batch() -> None:
    """All samples twice, one time after the other; the counts are those of all copies."""
    samples = [Sample([0, 9, 8, 2], [0, 11, 12, 13, 14, 2], [1, 3]), Sample([0, 7, 2], [0, 21, 22, 2], [2])]
    goal = replace(objective("paper"), weight_kl_ar_ar=1.0)
    once, twice = collated(samples, objective("paper")), collated(samples, goal)
    assert (once.draws, twice.draws) == (1, 2)
    assert twice.counts == once.counts + once.counts
    for name, value in once.tensors():
        found = getattr(twice, name)
        assert torch.equal(found[: len(value)], value), name
        first = found[len(value) :] if name.endswith(("_U", "_T")) else None
        if first is None:
            assert torch.equal(found[len(value) :], value), name
        else:
            width = twice.layout.msk if name == "masked_T" else twice.layout.arq
            assert torch.equal(first - len(samples) * width, value), name


def test_the_aux_order_is_that_of_the_views() -> None:
    """Slots of all segments, and their AR rows, follow the drawn order; nothing else changes."""
    sample = Sample([0, 9, 2], [0, 11, 12, 13, 14, 15, 2], [2, 3, 5])
    views = views_of([sample])
    order = np.array([0, 0, 30, 10, 0, 20, 0], dtype=np.uint64)
    options = {"length_classes": 256, "pad_multiple": 1}
    batch = Collator(TOY, objective("paper"), **options)(replace(views, order=order), np.arange(1))
    for name in (Segment.MSK, Segment.CMP, Segment.QRY):
        assert segment(batch, name, "position") == [[3, 5, 2]]
    assert batch.masked_target_BM.tolist() == [[13, 15, 12]]
    assert batch.ar_masked_T.tolist() == [2, 4, 1]
    assert batch.ar_unmasked_U.tolist() == [0, 3, 5]
