"""Damage met while training: who stands in, on any number of ranks, and the list of it."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.index import SplitIndex
from janus_ds.data.stream.loader import QUARANTINE_NAME, QuarantineList, StepData, StepLoader
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.data.stream.source import Damage
from janus_ds.errors import DamagedDataError, DataError
from tests.support.bad_server import serve
from tests.support.packed_data import SPECIAL, flip, random_rows, run_config, write_split
from tests.support.tiny_data import make_tiny_data

ROWS = random_rows(50, 30)
SHARD = "shard-000001.tar"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_data(tmp_path_factory.mktemp("damage") / "tiny", train_shards=3)


def config(**data: object) -> RunConfig:
    base = run_config()
    return replace(base, data=replace(base.data, on_damage="quarantine", **{"max_damage": 0.5, **data}))


def load(split: Path, share: RankShare, **data: object) -> list[StepData]:
    maker = BatchMaker(split, config(**data), SPECIAL)
    return list(StepLoader(maker, share, 0, 10))


def test_ranks_and_workers_agree_on_what_stands_in(tmp_path):
    split = write_split(tmp_path / "train", {"target": ROWS})
    right = load(split, RankShare(0, 1, 12))
    flip(split / SHARD, SplitIndex.load(split).shards[1].members[1].blobs["target.tokens"].offset, 8)
    (split / "shard-000002.tar").unlink()
    damaged = {*range(24, 28), *range(40, 50)}
    alone = load(split, RankShare(0, 1, 12))
    for one, other in zip(right, alone, strict=True):
        assert one.counts.samples == other.counts.samples == 12
        for before, after in zip(one.sample_ids.tolist(), other.sample_ids.tolist(), strict=True):
            assert (before == after) == (before not in damaged)
            assert after not in damaged
    entries = [entry for step in alone for entry in step.damage]
    assert {(entry.first_sample, entry.samples) for entry in entries} == {(24, 4), (40, 4), (44, 4), (48, 2)}
    assert {entry.reason for entry in entries} == {
        "target.tokens was changed since it was written (checksum differs)",
        "the shard is missing",
    }
    for ranks in (2, 4):
        parts = [load(split, RankShare(rank, ranks, 3), workers=rank % 2 * 2) for rank in range(ranks)]
        for at, whole in enumerate(alone):
            found = torch.cat([part[at].sample_ids for part in parts])
            assert sorted(found.tolist()) == sorted(whole.sample_ids.tolist())
    stop = replace(config(), data=replace(config().data, on_damage="stop"))
    with pytest.raises(DamagedDataError, match=r"missing|changed since"):
        list(StepLoader(BatchMaker(split, stop, SPECIAL), RankShare(0, 1, 12), 0, 10))
    few = replace(config(), data=replace(config().data, max_damage=0.1))
    with pytest.raises(DataError, match=r"2 of 13 members are damaged, data\.max_damage allows 1"):
        list(StepLoader(BatchMaker(split, few, SPECIAL), RankShare(0, 1, 12), 0, 10))


def test_what_becomes_damaged_in_a_run_is_replaced_too(tmp_path):
    split = write_split(tmp_path / "train", {"target": ROWS})
    maker = BatchMaker(split, replace(config(shuffle_window=1)), SPECIAL)
    everything = (np.zeros(50, dtype=np.int64), np.arange(50))
    maker.source._limit = 2  # a member is read again, as of large data
    assert maker.make(everything)["ids"].tolist() == list(range(50))
    flip(split / SHARD, SplitIndex.load(split).shards[1].members[1].blobs["target.tokens"].offset, 8)
    found = maker.make(everything)
    assert sorted({*range(50)} - {*found["ids"].tolist()}) == [24, 25, 26, 27]
    assert [(d.first_sample, d.samples) for d in maker.source.take_damage()] == [(24, 4)]


def test_a_shard_published_wrongly_is_quarantined_a_lost_server_is_not(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("janus_ds.data.stream.remote._FIRST_PAUSE", 0.01)
    data = config(block_tokens=48, cache_dir=str(tmp_path / "cache"), retries=1, max_damage=0.9).data
    for fault in ("flip", "500"):
        run = replace(config(), data=replace(data, cache_dir=str(tmp_path / fault)))
        with serve(tiny, always={SHARD: fault}) as server:
            place = open_data(server.address, run.data)
            maker = BatchMaker(place.split("train"), run, place.tokenizer.special)
            everything = np.arange(270)
            if fault == "500":
                with pytest.raises(DataError, match="HTTP status 500"):
                    maker.source.replace_damaged(everything)
                continue
            sound = maker.source.replace_damaged(everything)
            assert np.flatnonzero(sound != everything).tolist() == list(range(90, 180))
            # Two tries for the shard, none again for its other members.
            assert server.asked[f"train/{SHARD}"] == 2
            assert {d.shard for d in maker.source.take_damage()} == {f"{server.address}/train/{SHARD}"}


@pytest.mark.parametrize("locks", [True, False])
def test_the_list_holds_each_member_once(tmp_path, monkeypatch, locks):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if not locks:  # as on some cluster file systems
        monkeypatch.setattr("fcntl.flock", refuse)
    entries = [Damage("a/shard-0.tar", f"00000{n}", 4 * n, 4, "cut") for n in range(3)]
    QuarantineList(tmp_path / "run").add(entries[:2], 7)
    QuarantineList(tmp_path / "run").add(entries[1:], 9)
    QuarantineList(tmp_path / "run").add([], 10)
    lines = [json.loads(line) for line in (tmp_path / "run" / QUARANTINE_NAME).read_text().splitlines()]
    assert [(line["member"], line["step"]) for line in lines] == [("000000", 7), ("000001", 7), ("000002", 9)]
    assert lines[0]["first_sample"] == 0
    assert lines[0]["reason"] == "cut"
