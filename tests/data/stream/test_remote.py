"""Distant shards: every sample arrives once, whatever the other side does; the cache keeps its bound."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from janus_ds.cli import inspect, plan
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.loader import StepLoader
from janus_ds.data.stream.open_dataset import DataPlace, RemoteFolder, open_data
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.remote import Expected, Patience
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.data.stream.shard_cache import ShardCache
from janus_ds.data.stream.source import SOURCE_BITS
from janus_ds.errors import (
    ConfigError,
    DamagedDataError,
    DataError,
    MissingDependencyError,
    ResourceError,
    UsageError,
)
from janus_ds.io import sha256_of_file
from tests.support.bad_server import serve
from tests.support.packed_data import flip, run_config
from tests.support.processes import wait_until
from tests.support.tiny_data import make_tiny_data

SHARE = RankShare(0, 1, 12)
BAD = ("500", "cut", "flip", "cut")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus_ds.data.stream.remote._FIRST_PAUSE", 0.01)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """270 training samples in six shards."""
    return make_tiny_data(tmp_path_factory.mktemp("remote") / "tiny", train_shards=6)


def settings(cache: Path, **more: object) -> DataConfig:
    base = DataConfig(block_tokens=48, workers=0, shuffle_window=2, pad_multiple=4)
    return replace(base, cache_dir=str(cache), **more)


def all_samples(location: str, data: DataConfig, steps: int = 23) -> list[tuple[list[int], bytes]]:
    """Sample numbers and encoder inputs of the first steps: 23 x 12 samples are a little over an epoch."""
    place = open_data(location, data)
    config = run_config(data=data)
    maker = BatchMaker(place.split("train"), config, place.tokenizer.special)
    return [
        (step.sample_ids.tolist(), step.batches[0].source_BS.numpy().tobytes())
        for step in StepLoader(maker, SHARE, 0, steps)
    ]


def test_all_samples_arrive_once_in_the_same_order_from_a_bad_server(tiny, tmp_path):
    local = all_samples(str(tiny), settings(tmp_path / "none", shuffle_shards=1))
    sizes = [path.stat().st_size for path in tiny.glob("train/*.tar")]
    limit = 4.2 * max(sizes) / 1e9
    data = settings(tmp_path / "cache", shuffle_shards=1, cache_gb=limit)
    with serve(tiny, default=BAD) as server:
        assert all_samples(server.address, data) == local
        # Each file failed in every way, and a cut transfer was continued.
        assert all(server.asked[f"train/{path.name}"] >= 5 for path in tiny.glob("train/*.tar"))
        assert server.ranges
    first_epoch = [number for ids, _ in local for number in ids][:270]
    assert sorted(first_epoch) == list(range(270))
    cache = ShardCache(tmp_path / "cache" / "shards", int(limit * 1e9))
    assert 0 < sum(size for _, size, _ in cache._entries()) <= cache.limit < sum(sizes)
    # What was read ahead when the server went may be a part still; all that was read is whole.
    assert list((tmp_path / "cache" / "shards").glob("*.tar"))


def test_the_cache_never_grows_beyond_its_bound(tiny, tmp_path, monkeypatch):
    largest = max(path.stat().st_size for path in tiny.glob("train/*.tar"))
    data = settings(tmp_path / "cache", shuffle_shards=1, cache_gb=4.2 * largest / 1e9)
    seen = []
    bring = ShardCache._bring

    def watched(self: ShardCache, *arguments: object) -> None:
        bring(self, *arguments)
        seen.append(sum(path.stat().st_size for path in self.folder.iterdir()))

    monkeypatch.setattr(ShardCache, "_bring", watched)
    with serve(tiny) as server:
        all_samples(server.address, data)
    assert len(seen) >= 6
    assert max(seen) <= 4.2 * largest


def test_a_second_run_fetches_no_shard_again_and_workers_share(tiny, tmp_path):
    data = settings(tmp_path / "cache", workers=2)
    with serve(tiny) as server:
        once = all_samples(server.address, data)
        asked = {name: n for name, n in server.asked.items() if name.startswith("train/shard")}
        assert set(asked.values()) == {1}
        assert len(asked) == 6
        assert all_samples(server.address, replace(data, workers=0)) == once
        assert {name: n for name, n in server.asked.items() if name.startswith("train/shard")} == asked
        assert server.asked["train/index.json"] == 1
        assert server.asked["manifest.json"] == 2


def test_shards_are_fetched_before_they_are_needed(tiny, tmp_path):
    data = settings(tmp_path / "cache", shuffle_shards=1, read_ahead=2)
    with serve(tiny) as server:
        place = open_data(server.address, data)
        maker = BatchMaker(place.split("train"), run_config(data=data), place.tokenizer.special)
        steps = StepLoader(maker, SHARE, 0, 23)
        plan = steps.plan
        plan.read_ahead(0)
        names = [maker.source.parts[0].index.shards[s] for s in first_shards(plan)]
        cache = maker.source.parts[0].shards.cache
        wait_until(lambda: all(cache.has(shard.sha256) for shard in names[:3]), 300, "three shards")
        assert [cache.has(shard.sha256) for shard in names] == [True] * 3 + [False] * 3


def first_shards(plan: object) -> list[int]:
    """Shards in the order of the first epoch."""
    source, order = plan._sources[0], plan._orders[0]
    epoch = [source.locate(m)[0] for m in order.members_from(0)]
    return list(dict.fromkeys(epoch))


def _other_process(address: str, data: DataConfig, barrier: object, answers: object) -> None:
    barrier.wait()
    answers.put(all_samples(address, data, steps=10))


def test_two_processes_share_a_cache(tiny, tmp_path):
    data = settings(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(2), context.Queue()
    with serve(tiny) as server:
        processes = [
            context.Process(target=_other_process, args=(server.address, data, barrier, answers))
            for _ in range(2)
        ]
        for process in processes:
            process.start()
        first, second = (answers.get(timeout=900) for _ in processes)
        for process in processes:
            process.join()
        assert first == second == all_samples(str(tiny), data, steps=10)
        assert {n for name, n in server.asked.items() if name.startswith("train/shard")} == {1}


def test_what_stays_wrong_is_named_without_secrets(tiny, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DATA_KEY", "env-secret")
    with serve(tiny, always={"shard-000002.tar": "500"}) as server:
        address = server.address.replace("//", "//me:hidden-word@") + "?sig=signature"
        with pytest.raises(
            DataError, match=r"cannot fetch shard-000002\.tar: HTTP status 500, 3 tries"
        ) as caught:
            all_samples(address, settings(tmp_path / "a", retries=2))
        assert server.asked["train/shard-000002.tar"] >= 3
        assert "127.0.0.1" in caught.value.where
        assert caught.value.where.endswith("/train/shard-000002.tar?...")
        assert any(heard.get("Authorization", "").startswith("Basic ") for heard in server.heard)
        address = server.address.replace("//", "//me:${DATA_KEY}@")
        with pytest.raises(DataError) as other:
            all_samples(address, settings(tmp_path / "b", retries=0))
    for text in (str(caught.value), str(other.value), caplog.text):
        assert "hidden-word" not in text
        assert "signature" not in text
        assert "env-secret" not in text
    with serve(tiny, always={"shard-000002.tar": "flip"}) as server:
        with pytest.raises(DamagedDataError, match="not those that were written"):
            all_samples(server.address, settings(tmp_path / "c", retries=1))
        with pytest.raises(DataError, match=r"manifest\.json: HTTP status 404") as missing:
            open_data(server.address + "/nowhere", settings(tmp_path / "d"))
        assert "address is right" in missing.value.fix


class ImpatientOnce(Patience):
    """The first transfer stalls; on a machine that is busy others may look so."""

    def pause(self, attempt: int) -> None:
        object.__setattr__(self, "stall_seconds", 900.0)


def test_a_stalled_transfer_is_ended_and_continued(tiny, tmp_path):
    name = "train/shard-000000.tar"
    known = Expected((tiny / name).stat().st_size, sha256_of_file(tiny / name))
    for knows_ranges in (True, False):
        with serve(tiny, plan={name: ["stall", "cut"]}, knows_ranges=knows_ranges) as server:
            with (tmp_path / "file").open("w+b") as file:
                RemoteFolder(server.address, ImpatientOnce(4, 2.0)).fetch(name, file, known)
            assert (tmp_path / "file").read_bytes() == (tiny / name).read_bytes()
            assert server.asked[name] == 3
            # Continued where that is possible, else begun anew.
            assert (server.sent[name] == known.size) == knows_ranges


def opens(location: str, data: DataConfig) -> DataPlace:
    place = open_data(location, data)
    maker = BatchMaker(place.split("train"), run_config(data=data), place.tokenizer.special)
    assert len(maker.source.read(np.arange(270))["target"]) == 270
    return place


def test_commands_and_fsspec_addresses_work_too(tiny, tmp_path, monkeypatch):
    (odd := tmp_path / os.fsdecode(b"caf\xe9")).symlink_to(tiny)
    opens(f"pipe:cat {odd}/{{}}", settings(tmp_path / "pipe"))
    opens(f"file://{tiny}", settings(tmp_path / "file"))
    memory = fsspec.filesystem("memory")
    memory.put(str(tiny), "/tiny", recursive=True)
    place = opens("memory://tiny", settings(tmp_path / "memory"))
    assert pickle.loads(pickle.dumps(place.split("train")))[0].name == "memory://tiny/train"
    # A command that ends too soon, and one that hangs.
    broken = f"pipe:head -c 100 {tiny}/{{}}; exit 3"
    with pytest.raises(DataError, match=r"the command ended with status 3.*, 2 tries") as caught:
        open_data(broken, settings(tmp_path / "broken", retries=1))
    assert caught.value.where == "pipe:head ... {}, file manifest.json"
    with pytest.raises(DataError, match="the command stalled"):
        open_data("pipe:sleep 600; cat {}", settings(tmp_path / "hangs", retries=0, stall_seconds=0.5))
    with pytest.raises(MissingDependencyError, match="nosuch:// addresses"):
        open_data("nosuch://bucket/tiny", settings(tmp_path / "nosuch"))


def test_the_cache_removes_the_oldest_and_never_what_is_in_use(tmp_path):
    cache = ShardCache(tmp_path / "cache", 250)
    shards = {letter * 64: letter.encode() * 100 for letter in "abc"}

    def bring(sha256: str) -> int:
        return cache.open(sha256, 100, lambda file: file.write(shards[sha256]))

    a, b, c = shards
    held = bring(a)
    os.close(bring(b))
    os.close(bring(c))
    assert [cache.has(x) for x in (a, b, c)] == [True, False, True]
    assert os.pread(held, 100, 0) == shards[a]
    os.close(held)
    os.close(bring(c))
    os.close(bring(b))
    assert [cache.has(x) for x in (a, b, c)] == [False, True, True]
    with pytest.raises(ResourceError, match="does not fit into a cache of 250"):
        cache.open("d" * 64, 251, lambda file: None)


def test_a_copy_that_became_damaged_here_is_fetched_again(tiny, tmp_path):
    data = settings(tmp_path / "cache")
    with serve(tiny) as server:
        once = all_samples(server.address, data)
        for path in (tmp_path / "cache" / "shards").glob("*.tar"):
            flip(path, 700)
        assert all_samples(server.address, data) == once


def test_a_cache_too_small_for_the_order_is_refused(tiny, tmp_path):
    with serve(tiny) as server:
        with pytest.raises(ConfigError, match="needed at about the same time") as caught:
            all_samples(server.address, settings(tmp_path / "cache", cache_gb=20e-6))
        assert "set data.shuffle_shards above 0" in caught.value.fix
        with pytest.raises(ConfigError, match="needed at about the same time") as caught:
            all_samples(server.address, settings(tmp_path / "cache", cache_gb=20e-6, shuffle_shards=2))
        assert "lower data.shuffle_shards" in caught.value.fix


def test_tools_read_distant_and_mixed_data(tiny, tmp_path, capsys):
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    with serve(tiny) as server:
        assert inspect.verify([server.address, "--set", cache]) == 0
        assert f"{server.address} is whole: 7 shards, 300 samples" in capsys.readouterr().out
        both = f"{tiny}=0.5,{server.address}=0.5"
        sample = str((1 << SOURCE_BITS) + 44)
        assert inspect.main([both, "--sample", sample, "--set", cache, "data.retries=0"]) == 0
        assert (
            f"from {server.address}/train/shard-000000.tar, member 000001, sample 12"
            in capsys.readouterr().out
        )
        (recipe := tmp_path / "own.yaml").write_text(f"data: {{cache_dir: {tmp_path / 'own'}}}\n")
        assert inspect.main([server.address, "--sample", "44", "--recipe", str(recipe)]) == 0
        assert list((tmp_path / "own" / "shards").glob("*.tar"))
        with pytest.raises(UsageError, match="there is no sample 300"):
            inspect.main([both, "--sample", "300", "--set", cache])
        assert plan.main(["--data", both, "--set", cache]) == 0
        assert "data: 540 samples" in capsys.readouterr().out
    with (
        serve(tiny, always={"shard-000001.tar": "flip"}) as server,
        pytest.raises(DataError, match="1 fault"),
    ):
        inspect.verify(
            [server.address, "--set", f"data.cache_dir={tmp_path / 'new'}", "--set", "data.retries=1"]
        )
    assert "fault: train/shard-000001.tar: cannot fetch" in capsys.readouterr().out
