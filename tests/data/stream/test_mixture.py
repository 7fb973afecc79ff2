"""Several sources by weight: exact shares, own epochs, one position, any number of ranks."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from janus_ds.config.load import from_dict, load_run_config, to_dict
from janus_ds.config.locations import expanded, parse_locations, public_location
from janus_ds.config.schema import DataConfig, RunConfig
from janus_ds.data.stream.loader import StepLoader, validation_batches
from janus_ds.data.stream.open_dataset import SplitPlace, open_data
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import CYCLE, RankShare, SampleSchedule, Turns
from janus_ds.data.stream.shards import ShardReader
from janus_ds.data.stream.source import SOURCE_BITS
from janus_ds.errors import ConfigError, DataError
from tests.support.packed_data import SPECIAL, random_rows, run_config, write_split
from tests.support.tiny_data import make_tiny_data

SIZES = (50, 31)
WEIGHTS = (0.75, 0.25)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 3 * CYCLE), st.integers(1, 500))
def test_each_source_has_its_share_up_to_one_sample(weights, start, count):
    turns = Turns(weights)
    drawn = np.bincount(turns.of(start, start + count), minlength=len(weights))
    for source, places in enumerate(turns.places):
        assert abs(places - CYCLE * weights[source] / sum(weights)) < 1
        assert turns.draws(source, start + count) - turns.draws(source, start) == drawn[source]
        assert abs(turns.draws(source, start) - start * places / CYCLE) < 1
    assert sum(turns.draws(source, start) for source in range(len(weights))) == start


def test_batches_that_can_have_exact_shares_have_them():
    for weights, batch in (((0.7, 0.3), 10), ((0.75, 0.25), 8), ((0.5, 0.3, 0.2), 20)):
        turns = Turns(weights)
        for step in range(600):
            drawn = np.bincount(turns.of(step * batch, (step + 1) * batch), minlength=len(weights))
            assert drawn.tolist() == [round(weight * batch) for weight in weights]
    with pytest.raises(ConfigError, match="less than one of 10,000"):
        Turns((1.0, 1e-6))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[SplitPlace, ...]:
    folder = tmp_path_factory.mktemp("mixture")
    parts = []
    for number, size in enumerate(SIZES):
        split = write_split(folder / f"{number}/train", {"target": random_rows(size, 30, seed=number)})
        parts.append(SplitPlace(split, str(split), weight=WEIGHTS[number]))
    return tuple(parts)


def config(**data: object) -> RunConfig:
    base = run_config()
    return replace(base, data=replace(base.data, **data))


def ids_of(
    mixed: tuple[SplitPlace, ...], share: RankShare, steps: range, **data: object
) -> list[torch.Tensor]:
    maker = BatchMaker(mixed, config(**data), SPECIAL)
    return [step.sample_ids for step in StepLoader(maker, share, steps.start, steps.stop)]


def test_shares_own_epochs_and_no_repeats(mixed):
    ids = torch.cat(ids_of(mixed, RankShare(0, 1, 12), range(50))).tolist()
    assert len(ids) == 600
    for source, (size, weight) in enumerate(zip(SIZES, WEIGHTS, strict=True)):
        own = [number & ((1 << SOURCE_BITS) - 1) for number in ids if number >> SOURCE_BITS == source]
        assert len(own) == 600 * weight
        counts = Counter(own)
        epochs = len(own) // size
        # Whole epochs, and the beginning of the next one.
        assert set(counts) == set(range(size))
        assert set(counts.values()) <= {epochs, epochs + 1}
    in_steps = [Counter(n >> SOURCE_BITS for n in ids[at : at + 12]) for at in range(0, 600, 12)]
    assert all(counts == {0: 9, 1: 3} for counts in in_steps)


def test_ranks_workers_and_starts_change_nothing(mixed):
    whole = ids_of(mixed, RankShare(0, 1, 12), range(12))
    for ranks in (2, 4):
        parts = [ids_of(mixed, RankShare(rank, ranks, 3), range(12)) for rank in range(ranks)]
        for step, together in enumerate(whole):
            found = torch.cat([part[step] for part in parts])
            assert sorted(found.tolist()) == sorted(together.tolist())
    for one, other in zip(
        whole[7:], ids_of(mixed, RankShare(0, 1, 12), range(7, 12), workers=2), strict=True
    ):
        assert torch.equal(one, other)


def test_samples_are_those_of_their_source(mixed):
    maker = BatchMaker(mixed, config(), SPECIAL)
    asked = np.array([3, (1 << SOURCE_BITS) + 30, 49, 1 << SOURCE_BITS])
    rows = maker.source.read(asked)["target"]
    expected = [random_rows(size, 30, seed=n) for n, size in enumerate(SIZES)]
    places = [(0, 3), (1, 30), (0, 49), (1, 0)]
    assert [row.tolist() for row in rows.rows()] == [expected[source][n] for source, n in places]
    assert maker.source.origin(int(asked[1])).endswith("1/train/shard-000001.tar, member 000007, sample 2")
    assert maker.source.has(int(asked[1]))
    assert not maker.source.has(int(asked[1]) + 1)
    seen = [
        number
        for item in validation_batches(maker, RankShare(0, 1, 10), 1000)
        if item.counted
        for number in item.batch.sample_id_B.tolist()
    ]
    assert len(set(seen)) == len(seen) == sum(SIZES)
    assert Counter(n >> SOURCE_BITS for n in seen[:40]) == {0: 30, 1: 10}


def test_groups_of_shards_stay_together_and_lose_nothing():
    shards = np.array([3, 2, 4, 1, 3])
    sizes = np.arange(1, 14)
    order = SampleSchedule(5, sizes, 2, shards, 2)
    shard_of = np.repeat(np.arange(5), shards)
    for epoch in range(3):
        members = order.member_order(epoch)[0]
        assert sorted(members.tolist()) == list(range(13))
        seen = list(dict.fromkeys(shard_of[members].tolist()))
        for at in range(0, 5, 2):
            group = set(seen[at : at + 2])
            together = np.flatnonzero(np.isin(shard_of[members], list(group)))
            assert (np.diff(together) == 1).all()
    ids = order.between(0, 91)[1]
    assert sorted(ids.tolist()) == list(range(91))


def test_the_text_of_sources(monkeypatch):
    def pairs(text: str) -> list[tuple[str, float]]:
        return [(source.location, source.weight) for source in parse_locations(text)]

    assert pairs("wiki=0.7, s3://b/books=3e-1") == [("wiki", 0.7), ("s3://b/books", 0.3)]
    for plain in ("data/a", "data/x=1", "https://host/d?a=1", "a,b", "pipe:cat a=1,{}"):
        assert pairs(plain) == [(plain, 1.0)]
    for wrong, what in (("a=0,b=1", "weight 0.0"), ("a=1,a=2", "comes twice")):
        with pytest.raises(ConfigError, match=what):
            open_data(wrong, DataConfig())
    shown = public_location("https://me:pw@h.org/a?sig=x=0.5,pipe:curl -H key {}=0.5")
    assert shown == "https://...@h.org/a?...=0.5,pipe:curl ... {}=0.5"
    monkeypatch.setenv("K", "v")
    assert expanded("s3://${K}/a") == "s3://v/a"
    with pytest.raises(ConfigError, match="no NOT_SET_HERE"):
        expanded("https://${NOT_SET_HERE}@h/a")
    run = load_run_config(None, ["data.path=https://me:pw@h.org/a"])
    assert run.data.path == "https://me:pw@h.org/a"
    assert to_dict(run)["data"]["path"] == "https://...@h.org/a"


@pytest.mark.parametrize(
    "mixture",
    ["pipe:ssh h cat wiki/{}=0.7,pipe:ssh h cat books/{}=0.3", "https://h/d?of=a=0.5,https://h/d?of=b=0.5"],
)
def test_a_mixture_of_what_is_alike_but_for_its_secrets_can_be_gone_on_with(mixture):
    run = load_run_config(None, [f"data.path={mixture}"])
    assert len(parse_locations(mixture)) == 2
    assert from_dict(to_dict(run)).data.path == public_location(mixture)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["data.path=a=1,b=1", "data.batch=tokens", "data.task=pair"], "several cannot be mixed"),
        (["data.path=pipe:cat x"], "where the name of the file goes"),
        (["data.on_damage=quarantine", "data.batch=tokens"], "none can be replaced"),
        (["data.on_damage=drop"], "has no value 'drop'"),
        (["data.path=https://h/a", "train.valid_bleu=ar", "data.task=pair"], "one local directory"),
    ],
)
def test_what_cannot_be_is_refused_in_words(overrides, what):
    with pytest.raises(ConfigError, match=what):
        load_run_config(None, overrides)


def test_sources_must_have_one_tokenizer(tiny: Path, tmp_path: Path):
    one = tiny
    two = make_tiny_data(tmp_path / "two", samples=200)
    with pytest.raises(DataError, match="different tokenizers") as caught:
        open_data(f"{one}=1,{two}=1", DataConfig())
    assert str(two) in caught.value.where
    three = shutil.copytree(tiny, tmp_path / "three")
    place = open_data(f"{one}=1,{three}=3", DataConfig())
    other = open_data(f"{one}=3,{three}=1", DataConfig())
    assert place.fingerprint("train") != other.fingerprint("train")
    assert (
        open_data(str(one), DataConfig()).fingerprint("train") == place.manifest.splits["train"].index_sha256
    )


def test_a_mixture_keeps_the_members_that_its_sources_mix(tmp_path, monkeypatch):
    """However many sources there are: each member is read once an epoch, not in every step."""
    monkeypatch.setattr("janus_ds.data.stream.pipeline._CACHED_MEMBERS", 0)
    places, reads, real = [], Counter(), ShardReader.read_member
    for number in range(3):
        split = write_split(tmp_path / f"{number}/train", {"target": random_rows(60, 30, seed=number)})
        places.append(SplitPlace(split, str(split)))
    base = run_config()
    maker = BatchMaker(places, replace(base, data=replace(base.data, shuffle_window=8)), SPECIAL)

    def counted(reader: ShardReader, shard: int, member: int) -> object:
        reads[id(reader), shard, member] += 1
        return real(reader, shard, member)

    monkeypatch.setattr(ShardReader, "read_member", counted)
    list(StepLoader(maker, RankShare(0, 1, 12), 0, 15))
    assert set(reads.values()) == {1}
    assert len(reads) == 45
