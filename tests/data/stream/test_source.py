"""Samples by number, their origin, and every kind of damage named by shard and member."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from janus_ds.data.stream.source import SampleSource
from janus_ds.errors import DataError
from tests.support.packed_data import flip, random_rows, write_split

ROWS = random_rows(50, 30)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 20, 20 and 10 samples in members of 4."""
    return write_split(tmp_path_factory.mktemp("source") / "train", {"target": ROWS})


def test_samples_come_in_the_order_asked_for(split):
    source = SampleSource(split, cached_members=2)
    assert (source.samples, source.streams) == (50, ("target",))
    for ids in ([0], [49, 0, 21, 20, 19, 3, 3], np.random.default_rng(1).permutation(50), []):
        rows = source.read(ids)["target"]
        assert [row.tolist() for row in rows.rows()] == [ROWS[i] for i in ids]
        assert rows.values.dtype == np.uint16


def test_pairs_stay_pairs(tmp_path):
    sources = random_rows(30, 9, seed=1)
    split = write_split(tmp_path / "pairs", {"source": sources, "target": ROWS[:30]}, stream_dtype="uint32")
    samples = SampleSource(split).read([7, 28, 1])
    assert [r.tolist() for r in samples["source"].rows()] == [sources[i] for i in (7, 28, 1)]
    assert [r.tolist() for r in samples["target"].rows()] == [ROWS[i] for i in (7, 28, 1)]


def test_origin_and_range(split):
    source = SampleSource(split)
    assert source.origin(0).endswith("train/shard-000000.tar, member 000000, sample 0")
    assert source.origin(26).endswith("train/shard-000001.tar, member 000006, sample 2")
    assert source.origin(49).endswith("train/shard-000002.tar, member 000012, sample 1")
    for bad in (-1, 50):
        with pytest.raises(IndexError, match="0 to 49"):
            source.read([3, bad])


def test_a_member_is_read_and_checked_once_while_cached(split, monkeypatch):
    source = SampleSource(split, cached_members=2)
    seen = []
    read = source.parts[0].reader.read_member
    monkeypatch.setattr(source.parts[0].reader, "read_member", lambda s, m: seen.append((s, m)) or read(s, m))
    for ids in ([0, 1], [3, 4], [2], [20], [0], [4]):
        source.read(ids)
    # Members 0, 1, then 5 (shard 1) pushes 1 out, which was used longer ago than 0.
    assert seen == [(0, 0), (0, 1), (1, 0), (0, 1)]


def test_it_travels_to_another_process(split):
    source = SampleSource(split)
    source.read([5])
    again = pickle.loads(pickle.dumps(source))
    assert again.read([40])["target"].row(0).tolist() == ROWS[40]


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:3000]), "cut or swapped"),
        (
            lambda p: flip(
                p, SampleSource(p.parent).parts[0].index.shards[1].members[1].blobs["target.tokens"].offset
            ),
            "was changed",
        ),
        (lambda p: p.unlink(), "the shard is missing"),
        (lambda p: p.write_bytes(p.with_name("shard-000000.tar").read_bytes()), "swapped|was changed"),
    ],
    ids=["cut", "flipped", "missing", "swapped"],
)
def test_damage_is_named(tmp_path, damage, what):
    split = write_split(tmp_path / "train", {"target": ROWS})
    damage(split / "shard-000001.tar")
    source = SampleSource(split)
    source.read(range(20))
    with pytest.raises(DataError, match=what) as caught:
        source.read([2, 24])
    assert caught.value.where.endswith("shard-000001.tar, member 000006")
    assert "verify" in caught.value.fix
