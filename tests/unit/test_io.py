"""A file or folder is the old one or the new one, whatever happens in between; disk faults come in words."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import pytest

from janus_ds.errors import ResourceError
from janus_ds.io import atomic_dir, atomic_file, disk_faults, write_atomic


def test_a_file_is_replaced_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for content in (b"old", b"new"):
        write_atomic(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("unique", [False, True])
def test_an_exception_leaves_the_old_file(tmp_path: Path, unique: bool) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")
    with suppress(KeyboardInterrupt), atomic_file(path, unique=unique) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "data"
    with suppress(ValueError), atomic_dir(final) as building:
        (building / "a").write_text("a")
        raise ValueError("half")
    assert not list(tmp_path.iterdir())
    # What a killed process left does not get into the folder.
    left = tmp_path / ".data.building"
    left.mkdir()
    (left / "old").touch()
    final.mkdir()
    with atomic_dir(final) as building:
        (building / "part").mkdir()
        (building / "part" / "a").write_text("a")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert [str(p.relative_to(final)) for p in sorted(final.rglob("*"))] == ["part", "part/a"]


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    final = tmp_path / "data"
    final.mkdir()
    (final / "precious").touch()
    with pytest.raises(OSError, match="not empty"), atomic_dir(final) as building:
        (building / "a").touch()
    assert [p.name for p in final.iterdir()] == ["precious"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ELOOP])
def test_a_place_that_cannot_be_written_is_named(code: int) -> None:
    with pytest.raises(ResourceError) as caught, disk_faults(Path("/x")):
        raise OSError(code, os.strerror(code), "/x/y")
    assert caught.value.where == "/x/y"
