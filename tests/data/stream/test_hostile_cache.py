"""A cache that others can write to, and text that would act on a terminal."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from janus_ds.cli.decode_lines import as_blocks
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.open_dataset import open_data
from janus_ds.data.stream.shard_cache import ShardCache
from janus_ds.data.text.text_files import TextFile
from janus_ds.errors import DataError
from janus_ds.evaluate.passages import Passage
from tests.support.bad_server import serve

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


def test_sources_cannot_act_on_a_terminal() -> None:
    evil = "a\x1b]0;owned\x07b\x1b[2J\x9b31m"
    lines = as_blocks([Passage(source=evil, ids=[], reference=evil)], 1, {}, lambda *_: "")
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for line in lines for char in line)


def test_messages_cannot_act_on_a_terminal() -> None:
    evil = "a\x1b]0;owned\x07b\r\x9b2J"
    assert str(DataError(evil, evil, "look")).splitlines() == [
        "error: a\\x1b]0;owned\\x07b\\x0d\\x9b2J",
        "  where: a\\x1b]0;owned\\x07b\\x0d\\x9b2J",
        "  to do: look",
    ]


def test_a_file_of_newlines_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"\n" * (32 << 20))
    tracemalloc.start()
    try:
        assert sum(1 for _ in islice(TextFile(path).lines(), 1 << 16)) == 1 << 16
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
