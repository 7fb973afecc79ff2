"""A file or folder is the old one or the new one, whatever happens in between; disk faults come in words."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from janus_ds.errors import BusyError, DataError, ResourceError
from janus_ds.io import atomic_dir, atomic_file, disk_faults, folder_lock, write_atomic


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
    # What is begun anew says nothing else.
    with pytest.raises(ResourceError, match=r"(?s)the disk is full.*start the same command again$"):
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


def test_two_processes_do_not_make_the_same_folder(tmp_path: Path) -> None:
    """The second one would take away what the first one has written, or write into it."""
    with atomic_dir(tmp_path / "data") as building:
        (building / "a").write_text("a")
        if (other := os.fork()) == 0:
            with suppress(BusyError), atomic_dir(tmp_path / "data"):
                os._exit(1)
            os._exit(0)
        assert os.waitpid(other, 0)[1] == 0
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["data", "data/a"]


def test_nothing_stays_beside_a_folder_on_nfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, what is removed while it is open stays under another name: the folder of a lock that is held."""
    held, remove = [False], os.rmdir

    @contextmanager
    def held_lock(folder: Path, patience: float) -> Iterator[None]:
        with folder_lock(folder, patience):
            held[0] = True
            try:
                yield
            finally:
                held[0] = False

    def rmdir(path: str | Path, **options: int) -> None:
        if held[0] and str(path).endswith(".data.building"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        remove(path, **options)

    monkeypatch.setattr("janus_ds.io.folder_lock", held_lock)
    monkeypatch.setattr(os, "rmdir", rmdir)
    with atomic_dir(tmp_path / "data") as building:
        (building / "a").touch()
    with suppress(ValueError), atomic_dir(tmp_path / "other.data"):
        raise ValueError("half")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["data", "data/a"]


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    final = tmp_path / "data"
    final.mkdir()
    (final / "precious").touch()
    with pytest.raises(OSError, match="not empty"), atomic_dir(final) as building:
        (building / "a").touch()
    with pytest.raises(NotADirectoryError) as caught, atomic_dir(final / "precious" / "new"):
        pass
    assert caught.value.filename == str(final / "precious" / "new")
    assert [p.name for p in final.iterdir()] == ["precious"]


def test_a_link_to_an_empty_folder_leads_to_the_new_one(tmp_path: Path) -> None:
    link, disk = tmp_path / "data", tmp_path / "disk"
    (disk / "empty").mkdir(parents=True)
    link.symlink_to(disk / "empty")
    with atomic_dir(link) as building:
        (building / "a").touch()
    assert link.is_symlink()
    assert [str(p.relative_to(disk)) for p in sorted(disk.rglob("*"))] == ["empty", "empty/a"]


@pytest.mark.parametrize(("path", "kind"), [(".", "the working folder"), ("/proc", "a mount point")])
def test_a_folder_that_cannot_be_replaced_is_refused_before_the_work(
    path: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match=f"the output is {kind}") as caught, atomic_dir(Path(path)):
        pytest.fail("the work has begun")
    assert caught.value.where == path
    assert [p.name for p in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize(
    "code",
    [
        errno.EACCES,
        errno.EBUSY,
        errno.EROFS,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.EIO,
        errno.ESTALE,
    ],
)
def test_a_place_that_cannot_be_written_is_named(code: int) -> None:
    with pytest.raises(ResourceError) as caught, disk_faults(Path("/x")):
        raise OSError(code, os.strerror(code), "/x/y")
    assert caught.value.where == "/x/y"


HOLDER = """
import os, sys, time
from pathlib import Path
from janus_ds.io import folder_lock
with folder_lock(Path(sys.argv[1]), 0.0):
    # A child that outlives its parent does not keep the lock.
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_keeps_others_out_and_ends_with_its_process(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(BusyError) as caught, folder_lock(tmp_path, 0.3):
                pass
            assert f"process {holder.pid} on " in caught.value.where
            assert caught.value.exit_code == 9
            holder.kill()
            holder.wait()
            with folder_lock(tmp_path, 0.0):
                pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_is_taken_again_after_an_orderly_end(tmp_path: Path) -> None:
    for _ in range(2):
        with folder_lock(tmp_path, 0.0):
            assert "process" in (tmp_path / ".lock").read_text()
        assert not list(tmp_path.iterdir())
