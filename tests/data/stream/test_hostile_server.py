"""Servers that lie: endless bodies, shards longer than they should be, drips; all of them end."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest

from janus_ds.config.schema import DataConfig
from janus_ds.data.stream import remote
from janus_ds.data.stream.open_dataset import RemoteFolder, open_data
from janus_ds.data.stream.remote import Expected, Patience
from janus_ds.errors import DamagedDataError, DataError, JanusError
from janus_ds.io import sha256_of_file
from tests.support.bad_server import serve
from tests.support.hostile import bounded

MB = 1 << 20


@pytest.mark.parametrize("name", ["manifest.json", "sentencepiece.model", "index.json"])
def test_endless_bodies_end(tiny, tmp_path, monkeypatch, name):
    monkeypatch.setattr("janus_ds.data.stream.remote._FIRST_PAUSE", 0.01)
    for module in ("stream.index", "stream.open_dataset"):
        monkeypatch.setattr(
            f"janus_ds.data.{module}.MOST_BYTES", {"manifest.json": 8 * MB, "index.json": 8 * MB}
        )
    monkeypatch.setattr("janus_ds.data.stream.open_dataset.MOST_TOKENIZER_BYTES", 8 * MB)
    data = replace(DataConfig(), cache_dir=str(tmp_path / "cache"), retries=1)
    with (
        serve(tiny, always={name: "endless"}) as server,
        bounded(),
        pytest.raises(DataError, match=r"more than|larger|no tokenizer"),
    ):
        open_data(server.address, data).split("train")
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*")) < 20 * MB


def test_a_shard_without_a_length_stops_at_its_size(tiny, tmp_path):
    with serve(tiny, always={".tar": "endless"}) as server, (tmp_path / "part").open("w+b") as file:
        folder = RemoteFolder(server.address, Patience(1, sleep=lambda _: None))
        with pytest.raises(DamagedDataError, match="more came than the 5,000 bytes"):
            folder.fetch("train/shard-000000.tar", file, Expected(5000, "0" * 64))
        assert file.seek(0, 2) < 2 * MB


def test_a_drip_is_a_stall(tiny, tmp_path):
    with serve(tiny, always={".json": "drip"}) as server:
        folder = RemoteFolder(server.address, Patience(1, 0.3, sleep=lambda _: None))
        # Else what drips for 50 s would be taken, and be no manifest.
        with pytest.raises(DataError, match="stalled"):
            folder.fetch_small("manifest.json", tmp_path / "manifest.json", MB)


@pytest.mark.parametrize("told", [0, 10, 10**12, -1, None, "x"], ids=str)
def test_a_file_of_fsspec_with_another_length_is_whole_or_refused(tiny, tmp_path, monkeypatch, told):
    shard = tiny / "train" / "shard-000000.tar"
    lying = type("Lying", (io.BytesIO,), {"size": told})
    system = SimpleNamespace(open=lambda path, mode: lying(shard.read_bytes()))
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda address: (system, "x"))
    folder = RemoteFolder("memory://x", Patience(1, sleep=lambda _: None))
    expected = Expected(shard.stat().st_size, sha256_of_file(shard))
    with (tmp_path / "part").open("w+b") as file, nullcontext() if told is None else suppress(JanusError):
        folder.fetch("train/shard-000000.tar", file, expected)
        assert sha256_of_file(tmp_path / "part") == expected.sha256


def test_a_slow_reader_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of text that is tokenised while it comes; a command would have to be run again from its start."""
    now = [0.0]
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def coming(seconds: float) -> Iterator[bytes]:
        for _ in range(3):
            now[0] += seconds
            yield b"x"

    for _ in remote._steady(coming(1.0), 10.0):
        now[0] += 100.0
    with pytest.raises(remote.TransferError, match="next to nothing came"):
        list(remote._steady(coming(6.0), 10.0))


def test_a_refusal_does_not_ask_to_wait(tiny, tmp_path):
    """As of an address whose signature has expired."""
    with (
        serve(tiny, always={".json": "403"}) as server,
        pytest.raises(DataError, match="status 403") as caught,
    ):
        open_data(server.address, replace(DataConfig(), cache_dir=str(tmp_path / "cache")))
    assert "for you to read" in caught.value.fix


def test_what_is_told_of_a_file_by_one_answer_alone_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed whole it has no size; what was there before its first byte came does not matter."""
    answers = iter([(0, 5, "old", b""), (0, None, "new", b"abc"), (3, 9, "new", b"def"), (6, 9, "", b"ghi")])

    @contextmanager
    def opened(location: str, at: int, stall_seconds: float) -> Iterator[remote._Transfer]:
        start, total, version, part = next(answers)

        def chunks() -> Iterator[bytes]:
            yield from [part] if part else []
            if start < 6:
                raise remote.TransferError("cut")

        assert start == at
        yield remote._Transfer(start, total, version, chunks())

    monkeypatch.setattr(remote, "_opened", opened)
    patience = Patience(sleep=lambda seconds: None)
    assert b"".join(remote.transferred("http://x/a.txt", patience, Expected())) == b"abcdefghi"
