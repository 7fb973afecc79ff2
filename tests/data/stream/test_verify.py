"""Every kind of damage is found, and named by shard and member."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from janus_ds.data.prepare.train_tokenizer import train_sentencepiece
from janus_ds.data.stream.index import Manifest, SplitIndex
from janus_ds.data.stream.shards import shard_name
from janus_ds.data.stream.verify import verify_dataset
from janus_ds.errors import DataError
from tests.support.packed_data import flip, totals, write_split
from tests.support.texts import documents


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Two splits; train has three shards of four members."""
    folder = tmp_path_factory.mktemp("data") / "whole"
    tokenizer = train_sentencepiece(documents(60), "unigram", 90)
    tokenizer.save(folder / "tokenizer")
    rng = np.random.default_rng(1)
    splits = {}
    for name, shards in (("train", 3), ("valid", 1)):
        rows = [rng.integers(5, 90, rng.integers(1, 9)).tolist() for _ in range(12 * shards)]
        splits[name] = totals(write_split(folder / name, {"target": rows}, per_shard=12, per_member=3))
    Manifest("denoise", tokenizer.fingerprint, 90, {}, splits).save(folder)
    return folder


@pytest.fixture
def data(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "data")


def faults(data: Path) -> list[str]:
    return [str(fault) for fault in verify_dataset(data).faults]


def test_whole_data_has_no_fault(data):
    shares = []
    report = verify_dataset(data, lambda share, _: shares.append(share))
    assert report.faults == []
    assert (report.shards, report.samples) == (4, 48)
    assert report.tokens == sum(t.tokens for t in Manifest.load(data).splits.values())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    report.raise_if_faulty(data)


def test_every_flipped_byte_is_found_and_its_member_named(data):
    name = shard_name(1)
    path = data / "train" / name
    whole = path.read_bytes()
    index = SplitIndex.load(data / "train")
    members = index.shards[1].members
    last = max(blob.offset + blob.size for blob in members[-1].blobs.values())
    rng = random.Random(5)
    for place in [0, 130, 156, 257, *rng.sample(range(last), 40)]:
        path.write_bytes(whole)
        flip(path, place, 1 << rng.randrange(8))
        ends = [max(-(-(b.offset + b.size) // 512) * 512 for b in m.blobs.values()) for m in members]
        member = next(m.key for m, end in zip(members, ends, strict=True) if place < end)
        found = faults(data)
        assert len(found) == 1
        assert found[0].startswith(f"train/{name}, member {member}: "), (place, found)
    path.write_bytes(whole)
    flip(path, -1)
    assert faults(data) == [f"train/{name}: the end of the archive is damaged"]


def test_shards_cut_longer_missing_swapped_or_extra(data):
    path = data / "train" / shard_name(0)
    whole = path.read_bytes()
    members = SplitIndex.load(data / "train").shards[0].members
    place = members[2].blobs["target.tokens"].offset + 3
    path.write_bytes(whole[:place])
    found = faults(data)
    assert "the shard is cut" in found[0]
    assert [text.split(":")[0] for text in found[1:]] == [
        f"train/{path.name}, member {key}" for key in ("000002", "000003")
    ]
    path.write_bytes(whole + b"x")
    assert "longer than it should be" in faults(data)[0]
    path.unlink()
    assert faults(data) == [f"train/{path.name}: the shard is missing"]

    other = data / "train" / shard_name(2)
    path.write_bytes(other.read_bytes())
    other.write_bytes(whole)
    assert faults(data) == [
        f"train/{path.name}: the file holds the bytes of {other.name}: swapped",
        f"train/{other.name}: the file holds the bytes of {path.name}: swapped",
    ]
    other.write_bytes(path.read_bytes())
    path.write_bytes(whole)
    shutil.copy(path, data / "train" / shard_name(3))
    (data / "train" / "shard-000009.tar.part").write_bytes(b"")
    assert [text.split(":")[0] for text in faults(data)] == [
        "train/shard-000003.tar", "train/shard-000009.tar.part"
    ]  # fmt: skip


def test_indexes_cut_missing_swapped_or_extra(data):
    train, valid = data / "train" / "index.json", data / "valid" / "index.json"
    whole = train.read_bytes()
    train.write_bytes(whole[:-40])
    assert "cut or is not JSON" in faults(data)[0]
    train.write_bytes(valid.read_bytes())
    assert faults(data)[0].startswith("train/index.json: the index is not the one that the manifest")
    train.unlink()
    assert "holds no index.json" in faults(data)[0]
    train.write_bytes(whole)
    shutil.copytree(data / "valid", data / "test")
    assert faults(data) == ["test/index.json: the manifest knows no such split"]
    shutil.rmtree(data / "test")
    shutil.rmtree(data / "valid")
    assert faults(data) == ["valid/index.json: the data directory does not exist"]


def test_tokenizer_and_vocabulary(data):
    train_sentencepiece(documents(60, seed=2), "unigram", 90).save(data / "tokenizer")
    assert "the tokenizer is not the one" in faults(data)[0]
    shutil.rmtree(data / "tokenizer")
    assert faults(data) == ["tokenizer: the folder holds no tokenizer"]
    manifest = Manifest.load(data)
    dataclasses.replace(manifest, vocab_size=80).save(data)
    assert any("beyond the vocabulary" in text for text in faults(data))
    with pytest.raises(DataError) as caught:
        verify_dataset(data).raise_if_faulty(data)
    assert "and " in caught.value.what
    assert caught.value.where == str(data)
