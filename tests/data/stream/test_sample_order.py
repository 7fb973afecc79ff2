"""The order of samples and the counter-based random numbers under it."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ds.data.masking.counter_rng import SampleKeys, Stream, bits, keys, shuffled, uniforms
from janus_ds.data.stream.sample_order import SampleSchedule

FROZEN_ORDER = [11, 10, 0, 9, 1, 2, 6, 8, 5, 7, 4, 3]
FROZEN_BITS = "0x7b7fa4567d06a360"

member_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum)


@settings(max_examples=60, deadline=None)
@given(member_sizes, st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**40))
def test_each_sample_comes_once_an_epoch(sizes, window, batch, seed):
    schedule = SampleSchedule(seed, sizes, window)
    n = schedule.samples
    parts = [schedule.between(start, start + batch) for start in range(0, 3 * n, batch)]
    epochs, ids = (np.concatenate(column) for column in zip(*parts, strict=True))
    assert (epochs == np.arange(len(epochs)) // n).all()
    for epoch in range(len(ids) // n):
        assert sorted(ids[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(member_sizes, st.integers(1, 5), st.integers(1, 12), st.integers(0, 30))
def test_the_position_is_the_only_state(sizes, window, batch, start):
    walked, jumped = SampleSchedule(7, sizes, window), SampleSchedule(7, sizes, window)
    whole = walked.between(0, start + batch)
    jumped.between(start + 3 * batch, start + 4 * batch)
    for begin in (start, start // 2):
        found = jumped.between(begin, start + batch)
        np.testing.assert_array_equal(found, [column[begin:] for column in whole])


def test_samples_mix_inside_windows_only():
    schedule = SampleSchedule(3, [10] * 6, window=2)
    batches = [schedule.between(start, start + 20)[1] for start in (0, 20, 40)]
    members = [set((ids // 10).tolist()) for ids in batches]
    assert [len(m) for m in members] == [2, 2, 2]
    assert set.union(*members) == set(range(6))
    first = batches[0]
    assert (np.diff(first) < 0).any()
    assert len(set((first[:10] // 10).tolist())) == 2


def test_seeds_and_epochs_give_other_orders():
    two = [SampleSchedule(seed, [50] * 4, 2) for seed in (1, 2)]
    orders = [schedule.between(at, at + 200)[1] for schedule in two for at in (0, 200)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.1


def test_the_order_is_frozen():
    """A change here would make runs resume in another order than they started in."""
    epochs, ids = SampleSchedule(1, [3, 4, 2, 3], window=2).between(0, 12)
    assert epochs.tolist() == [0] * 12
    assert ids.tolist() == FROZEN_ORDER
    assert hex(bits(keys(1, 2, 3, Stream.COIN), 4)[0]) == FROZEN_BITS


def test_shuffled_windows_are_uniform():
    counts = np.zeros((4, 4))
    for seed in range(2000):
        counts[np.arange(4), shuffled(keys(seed, 0, 0, Stream.MEMBER_ORDER), 4)] += 1
    assert abs(counts / 2000 - 0.25).max() < 0.04


def test_uniforms_are_uniform_and_independent():
    sample = SampleKeys(1, np.zeros(400, np.int64), np.arange(400)).uniforms(Stream.SHARE, 250)
    assert ((sample >= 0) & (sample < 1)).all()
    cells = np.bincount((sample * 100).astype(int).ravel(), minlength=100)
    chi_square = ((cells - 1000.0) ** 2 / 1000.0).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom
    centred = sample - 0.5
    for other in (
        np.roll(centred, 1, axis=0),  # the neighbour's number
        np.roll(centred, 1, axis=1),  # the next counter
        SampleKeys(1, np.ones(400, np.int64), np.arange(400)).uniforms(Stream.SHARE, 250) - 0.5,
        SampleKeys(2, np.zeros(400, np.int64), np.arange(400)).uniforms(Stream.SHARE, 250) - 0.5,
        SampleKeys(1, np.zeros(400, np.int64), np.arange(400)).uniforms(Stream.COIN, 250) - 0.5,
    ):
        assert abs((centred * other).mean() * 12) < 0.012  # sd of a correlation of 100,000 pairs: .003


def test_every_bit_is_fair_and_keys_do_not_collide():
    values = bits(keys(5, 0, np.arange(20000), Stream.HIDDEN_PLACE), 0)
    ones = np.unpackbits(values.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert abs(ones - 0.5).max() < 0.02
    grid = [keys(s, e, np.arange(500), stream) for s in range(3) for e in range(3) for stream in Stream]
    assert len(np.unique(np.concatenate(grid))) == 9 * len(Stream) * 500


def test_negative_and_large_seeds_work():
    assert uniforms(keys(-1, 2**31 - 1, 0, Stream.COIN), 0) != uniforms(keys(2**64 - 2, 0, 0, Stream.COIN), 0)
