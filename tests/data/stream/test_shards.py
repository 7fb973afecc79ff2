"""Packed shards: ordinary tars, equal bytes, exact index; damage: test_source.py."""

from __future__ import annotations

import hashlib
import pickle
import tarfile

import numpy as np
import pytest
import webdataset

from janus_ds.batch import Ragged
from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.shards import ShardFormat, ShardReader, token_dtype, write_shard


def samples(count: int, seed: int = 0) -> Ragged:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, count)
    return Ragged.from_lengths(rng.integers(0, 60000, lengths.sum()).astype(np.uint16), lengths)


@pytest.fixture
def pair_split(tmp_path):
    """Two shards of pairs, three samples a member, the last member short."""
    packing = ShardFormat("uint32", samples_per_member=3, members_per_shard=2)
    data = {"source": samples(10), "target": samples(10, 1)}
    shards, first = [], 0
    for start, stop in ((0, 6), (6, 10)):
        part = {name: rows.slice(start, stop) for name, rows in data.items()}
        shards.append(write_shard(tmp_path / f"shard-{len(shards):06d}.tar", part, packing, first))
        first += len(shards[-1].members)
    return tmp_path, SplitIndex("uint32", ("source", "target"), tuple(shards)), data


def test_members_come_back_and_the_index_is_exact(pair_split, monkeypatch):
    monkeypatch.setattr("janus_ds.data.stream.shards._OPEN_FILES", 1)
    directory, index, data = pair_split
    reader = pickle.loads(pickle.dumps(ShardReader(directory, index)))
    read = [
        reader.read_member(s, m) for s, shard in enumerate(index.shards) for m in range(len(shard.members))
    ]
    for stream, rows in data.items():
        back = Ragged.concatenate([part[stream] for part in read])
        assert back.values.tolist() == rows.values.tolist()
        assert back.offsets.tolist() == rows.offsets.tolist()
    assert index.member_sizes().tolist() == [3, 3, 3, 1]
    assert index.tokens == sum(len(rows.values) for rows in data.values())
    for shard in index.shards:
        data_bytes = (directory / shard.name).read_bytes()
        assert (shard.size, shard.sha256) == (len(data_bytes), hashlib.sha256(data_bytes).hexdigest())
        with tarfile.open(directory / shard.name) as tar:
            in_tar = [(file.name, file.offset_data, file.size) for file in tar]
        in_index = [
            (f"{member.key}.{name}", blob.offset, blob.size)
            for member in shard.members
            for name, blob in member.blobs.items()
        ]
        assert in_tar == in_index


def test_plain_webdataset_reads_the_shards(pair_split):
    directory, _, data = pair_split
    urls = [str(directory / f"shard-00000{n}.tar") for n in (0, 1)]
    members = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [member["__key__"] for member in members] == ["000000", "000001", "000002", "000003"]
    for stream, rows in data.items():
        tokens = np.concatenate([np.frombuffer(m[f"{stream}.tokens"], "<u4") for m in members])
        assert tokens.tolist() == rows.values.tolist()
        offsets = np.frombuffer(members[1][f"{stream}.offsets"], "<u4")
        assert np.diff(offsets).tolist() == rows.lengths[3:6].tolist()


def test_equal_samples_give_equal_bytes(tmp_path):
    packing = ShardFormat("uint16", samples_per_member=4)
    entries = [write_shard(tmp_path / name, {"target": samples(30)}, packing, 5) for name in ("a", "b")]
    assert entries[0].sha256 == entries[1].sha256
    assert entries[0].members[0].key == "000005"
    assert (token_dtype(65536), token_dtype(65537)) == ("uint16", "uint32")
