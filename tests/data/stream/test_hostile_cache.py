"""A cache that others can write to, and text that would act on a terminal."""

from __future__ import annotations

import os
import tracemalloc
from itertools import islice
from pathlib import Path

import pytest

from janus_ds.cli.decode_lines import as_blocks
from janus_ds.data.stream.shard_cache import ShardCache
from janus_ds.data.text.text_files import TextFile
from janus_ds.errors import DataError
from janus_ds.evaluate.passages import Passage

SHA256 = "a" * 64


def no_download(_: object) -> None:
    raise AssertionError("nothing is to be fetched")


def test_a_shard_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{SHA256}.tar").write_bytes(b"x" * 10)
    cache = ShardCache(tmp_path, 1000)
    os.close(cache.open(SHA256, 10, no_download))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    os.chown(tmp_path / f"{SHA256}.tar", 54321, -1) if os.getuid() == 0 else pytest.skip("needs root")
    with pytest.raises(DataError, match="belongs to another user"):
        cache.open(SHA256, 10, no_download)


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
