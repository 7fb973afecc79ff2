"""Manifest and index: round trip, and every way in which the files can be unfit."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.index import (
    FORMAT_VERSION,
    BlobEntry,
    Manifest,
    MemberEntry,
    ShardEntry,
    SplitIndex,
    SplitTotals,
)
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.errors import DataError


def index() -> SplitIndex:
    def member(key: str, samples: int) -> MemberEntry:
        blobs = {"target.offsets": BlobEntry(512, 16, 1), "target.tokens": BlobEntry(1536, 40, 2)}
        return MemberEntry(key, samples, 20, blobs)

    first = ShardEntry(
        "shard-000000.tar", 10240, "ab" * 32, 7, 40, (member("000000", 4), member("000001", 3))
    )
    second = ShardEntry("shard-000001.tar", 10240, "cd" * 32, 2, 20, (member("000002", 2),))
    return SplitIndex("uint16", ("target",), (first, second))


def manifest() -> Manifest:
    return Manifest(
        "denoise", "f0" * 32, 90, {"block_tokens": 8}, {"train": SplitTotals(2, 9, 60, "aa" * 32)}
    )


def test_what_is_saved_is_loaded(tmp_path):
    saved = index()
    saved.save(tmp_path)
    assert SplitIndex.load(tmp_path) == saved
    assert saved.member_sizes().tolist() == [4, 3, 2]
    assert (saved.samples, saved.tokens) == (9, 60)
    manifest().save(tmp_path)
    assert Manifest.load(tmp_path) == manifest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.json", "manifest.json"]


def test_a_directory_in_place_of_a_split_is_told_its_splits(tmp_path):
    manifest().save(tmp_path)
    with pytest.raises(DataError, match=r"holds no index\.json") as caught:
        SplitIndex.load(tmp_path)
    assert caught.value.fix == f"name a split in it, such as {tmp_path / 'valid'}"


def test_an_index_of_other_data_is_refused_at_the_start(tiny, tmp_path):
    """As a copy leaves it that is broken off: what is recorded of a run says what the manifest says."""
    data = tmp_path / "data"
    shutil.copytree(tiny, data)
    place = open_data(str(data), DataConfig())
    assert [split.folder for split in place.split("train")] == [data / "train"]
    shutil.copytree(data / "valid", data / "train", dirs_exist_ok=True)
    with pytest.raises(DataError, match="not the one that the manifest was written with"):
        place.split("train")
    path = data / "train" / "index.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cut or is not JSON"):
        place.split("train")


@pytest.mark.parametrize("kind", [SplitIndex, Manifest])
def test_unfit_files_are_refused_in_words(tmp_path, kind):
    with pytest.raises(DataError, match="does not exist"):
        kind.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no (index|manifest)\.json"):
        kind.load(tmp_path)
    (index() if kind is SplitIndex else manifest()).save(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    body = json.loads(whole)
    for damaged, said in (
        (b"", "cut"),
        (b"\xff\xfe", "cut or is not JSON"),
        (b"[]", "no JSON object"),
        (b"{}", "no format_version"),
        (json.dumps({**body, "format_version": FORMAT_VERSION + 1}).encode(), "format version 2"),
        (json.dumps({**body, "splits": {}, "shards": []}).encode(), "changed since it was written"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError) as caught:
            kind.load(tmp_path)
        assert said in caught.value.what
        assert caught.value.where == str(path)
        assert caught.value.fix


def test_every_cut_and_every_flipped_byte_is_found(tmp_path):
    index().save(tmp_path)
    path = tmp_path / "index.json"
    whole = path.read_bytes()
    rng = random.Random(3)
    for place in rng.sample(range(len(whole) - 1), 60):
        path.write_bytes(whole[:place])
        with pytest.raises(DataError):
            SplitIndex.load(tmp_path)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(7)
        path.write_bytes(flipped)
        with pytest.raises(DataError):
            SplitIndex.load(tmp_path)
