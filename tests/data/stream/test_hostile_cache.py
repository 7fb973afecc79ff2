"""A cache that others can write to, on a full disk, or filled slowly; inputs of nothing but line ends."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import BinaryIO

import pytest

from janus_ds.cli.decode_lines import line_windows
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.index import Manifest
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.data.stream.shard_cache import ShardCache
from janus_ds.data.stream.source import Source
from janus_ds.data.text.documents import DocumentReader, DocumentRule
from janus_ds.data.text.tokenizer import ByteLevelBPE
from janus_ds.errors import DataError, ResourceError
from tests.data.text.test_tokenizer import small_byte_level
from tests.support.bad_server import serve
from tests.support.hostile import bounded

SHA256 = "a" * 64


def no_download(_: object) -> None:
    raise AssertionError("nothing is to be fetched")


@pytest.fixture
def somebody(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Gives files to another user, and makes us one who is not root."""
    if os.getuid() != 0:
        pytest.skip("needs root")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    return lambda path: os.chown(path, 54321, -1, follow_symlinks=False)


def test_a_shard_of_another_user_is_not_trusted(tmp_path: Path, somebody: Callable[[Path], None]) -> None:
    (tmp_path / f"{SHA256}.tar").write_bytes(b"x" * 10)
    cache = ShardCache(tmp_path, 1000)
    os.close(cache.open(SHA256, 10, no_download))
    somebody(tmp_path / f"{SHA256}.tar")
    with pytest.raises(DataError, match="belongs to another user"):
        cache.open(SHA256, 10, no_download)
    # A link that they have put where the shard is to be written.
    (tmp_path / f"{SHA256}.tar").unlink()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f"{SHA256}.10.part").symlink_to(tmp_path / "mine")
    somebody(tmp_path / f"{SHA256}.10.part")
    with pytest.raises(DataError, match="belongs to another user"):
        cache.open(SHA256, 10, no_download)
    assert (tmp_path / "mine").read_text() == "mine"


def test_no_cached_file_of_another_user_is_trusted(
    tiny: Path, tmp_path: Path, somebody: Callable[[Path], None]
) -> None:
    data = replace(DataConfig(), cache_dir=str(tmp_path), retries=0)
    with serve(tiny) as server:
        open_data(server.address, data).split("train")
        entries = list((tmp_path / "folders").rglob("*"))
        assert {"manifest.json", "index.json", "sentencepiece.model"} <= {path.name for path in entries}
        for path in (tmp_path / "folders", *entries):
            somebody(path)
            with pytest.raises(DataError, match="belongs to another user"):
                open_data(server.address, data)
            os.chown(path, 0, -1)
            path.chmod(path.stat().st_mode | 0o002)
            with pytest.raises(DataError, match="everyone may write"):
                open_data(server.address, data)
            path.chmod(path.stat().st_mode & ~0o002)
        open_data(server.address, data).split("train")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock is another user's, for example."""
    real = os.open

    def refusing(path: str | Path, *flags: int) -> int:
        if Path(path).name == "lock":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *flags)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(ResourceError, match="cannot be written") as caught:
        ShardCache(tmp_path / "shards", 1000).open(SHA256, 10, no_download)
    assert caught.value.where == str(tmp_path / "shards" / "lock")


def test_a_full_disk_is_named_by_its_folder(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = replace(DataConfig(), cache_dir=str(tmp_path))

    def transferred(*_: object) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    with serve(tiny) as server:
        place = open_data(server.address, data).split("train")[0]
        shard, shards = Source(place, cut_shards=False).index.shards[0], place.shards
        assert shards is not None
        monkeypatch.setattr("janus_ds.data.stream.open_dataset.transferred", transferred)
        with pytest.raises(ResourceError, match="the disk is full") as caught:
            shards.open(shard)
        assert caught.value.where == str(tmp_path / "shards")
        with pytest.raises(ResourceError, match="the disk is full") as caught:
            open_data(server.address, data)
        assert caught.value.where == str(place.folder.parent)


def test_bytes_of_a_shard_are_seen_as_they_come(tmp_path: Path) -> None:
    cache, seen = ShardCache(tmp_path, 250), []

    def drips(file: BinaryIO) -> None:
        for _ in range(3):
            file.write(b"x" * 10)
            file.flush()
            seen.append(cache.arrived())

    os.close(cache.open(SHA256, 30, drips))
    seen.append(cache.arrived())
    assert all(before != after for before, after in pairwise(seen))


def test_the_log_tells_of_shards_that_come_for_the_lengths_of_samples(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("janus_ds.data.stream.source._NEWS_SECONDS", -1.0)
    with serve(tiny) as server, caplog.at_level("INFO", "janus_ds"):
        data = open_data(server.address, replace(DataConfig(), cache_dir=str(tmp_path)))
        source = Source(data.split("train")[0], cut_shards=False)
        source.lengths()
    told, count = caplog.text, len(source.index.shards)
    assert f"reading the lengths of samples: shard 1 of {count}, {server.address}/train" in told
    assert f"reading the lengths of samples: shard {count} of {count}, " in told


def test_data_published_again_with_another_kind_of_tokenizer(tiny: Path, tmp_path: Path) -> None:
    """What lies in the cache of the one before does not hide it."""
    data = replace(DataConfig(), cache_dir=str(tmp_path / "cache"), retries=0)
    shutil.copytree(tiny, tmp_path / "web")
    with serve(tmp_path / "web") as server:
        open_data(server.address, data)
        shutil.rmtree(tmp_path / "web" / "tokenizer")
        tokenizer = ByteLevelBPE(*small_byte_level().values())
        tokenizer.save(tmp_path / "web" / "tokenizer")
        manifest = Manifest.load(tiny)
        replace(manifest, tokenizer_fingerprint=tokenizer.fingerprint).save(tmp_path / "web")
        assert open_data(server.address, data).tokenizer.fingerprint == tokenizer.fingerprint


def test_files_of_newlines_are_read_in_bounded_memory(tmp_path: Path) -> None:
    """A list of the lines would take 16 MiB."""
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\n" * (2 << 20))
    with bounded(12 << 20, seconds=60):
        assert not list(DocumentReader([path], DocumentRule()).read())
        assert max(map(len, islice(line_windows(str(path)), 10))) <= 1 << 16


def test_a_line_without_end_is_refused_by_decode(tmp_path: Path) -> None:
    with (tmp_path / "endless.txt").open("wb") as file:
        file.truncate(1 << 40)
    with bounded(200 << 20), pytest.raises(DataError, match="a line is longer than 4 MiB"):
        list(line_windows(str(tmp_path / "endless.txt")))
