"""Shards cut and changed anywhere: all of it is found, and costs the samples that were hit and no other."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.source import SampleSource
from janus_ds.data.stream.verify import verify_dataset
from tests.support.tiny_data import make_tiny_data

SHARD = "shard-000001.tar"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("damage") / "tiny", train_shards=3)


def damages(whole: bytes, cuts: list[int], flips: int) -> Iterator[tuple[str, bytes]]:
    for stop in cuts:
        yield f"cut to {stop} bytes", whole[:stop]
    draw = random.Random(5)
    for _ in range(flips):
        place, mask = draw.randrange(len(whole)), draw.randrange(1, 256)
        yield f"byte {place} ^ {mask}", whole[:place] + bytes([whole[place] ^ mask]) + whole[place + 1 :]


def hit(index: SplitIndex, whole: bytes, damaged: bytes) -> list[int]:
    """Numbers (over the split) of the samples whose member's files differ."""
    found, first = [], 0
    for shard, member in [(s, m) for s in index.shards for m in s.members]:
        if shard.name == SHARD:
            spans = [slice(blob.offset, blob.offset + blob.size) for blob in member.blobs.values()]
            if any(whole[span] != damaged[span] for span in spans):
                found += range(first, first + member.samples)
        first += member.samples
    return found


def check_damage(tiny: Path, folder: Path, cuts: list[int], flips: int) -> int:
    """Every damage is found by verify, and by the reader exactly where it hits samples."""
    shutil.copytree(tiny, folder)
    path = folder / "train" / SHARD
    whole = path.read_bytes()
    index = SplitIndex.load(folder / "train")
    everything = np.arange(index.samples)
    right = SampleSource(folder / "train").read(everything)["target"]
    quarantined = 0
    for name, damaged in damages(whole, cuts, flips):
        path.write_bytes(damaged)
        faults = verify_dataset(folder).faults
        assert faults, name
        assert {fault.place for fault in faults} == {f"train/{SHARD}"}, name
        source = SampleSource(folder / "train", max_damage=1.0)
        sound = source.replace_damaged(everything)
        expected = hit(index, whole, damaged)
        assert np.flatnonzero(sound != everything).tolist() == expected, name
        assert not set(sound.tolist()) & set(expected), name
        listed = [n for d in source.take_damage() for n in range(d.first_sample, d.first_sample + d.samples)]
        assert sorted(listed) == expected, name
        rows = source.read(sound)["target"]
        same = [right.row(int(n)).tolist() for n in sound]
        assert [row.tolist() for row in rows.rows()] == same, name
        quarantined += bool(expected)
    return quarantined


def test_cut_and_flipped_shards_cost_their_own_samples_alone(tiny, tmp_path):
    size = (tiny / "train" / SHARD).stat().st_size
    assert check_damage(tiny, tmp_path / "data", list(range(0, size, size // 7)), 14) > 10


@pytest.mark.heavy
def test_a_cut_at_every_256th_byte_and_200_flipped_bytes(tiny, tmp_path, tally):
    size = (tiny / "train" / SHARD).stat().st_size
    cuts = list(range(0, size, 256))
    quarantined = check_damage(tiny, tmp_path / "data", cuts, 200)
    assert quarantined > 100
    count = f"{len(cuts)} of {len(cuts)} cuts, 200 of 200 bytes"
    tally("tar cut at every 256th byte, bytes flipped: found, others unaffected", count)
    tally("  of these, samples were hit and quarantined, and no other", f"{quarantined} of {quarantined}")
