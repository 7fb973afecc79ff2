"""Files and folders that appear complete or not at all, and checksums of files.

Everything that the package writes for later use goes through here: it is written beside its place,
brought to disk, and renamed into it, so a crash or a kill leaves the old content or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from janus_ds.errors import BusyError, DataError, ResourceError

MOST_VALUES = 1 << 22
"""In one piece of JSON among others."""
_BYTES_A_VALUE = 16
"""Fewer bytes than values take in any file that this package reads, on average over the largest one."""
LOCK_FILE = ".lock"
_LOCK_POLL_SECONDS = 0.2
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FAILED = {errno.EIO, errno.ESTALE}
_REFUSED = {
    errno.EACCES,
    errno.EBUSY,
    errno.EEXIST,
    errno.EFBIG,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENODEV,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENXIO,
    errno.EPERM,
    errno.EROFS,
}


def fingerprint_of(*parts: bytes) -> str:
    """Hexadecimal SHA-256 over the parts, each preceded by its length so that borders count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_regular(path: Path) -> int:
    """A descriptor of a file, open for reading.

    Raises:
        OSError: it cannot be opened, or is a FIFO, a device or a folder (which could block, or never end).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "this is not a regular file", str(path))
    return descriptor


def check_owner(root: Path, path: Path) -> None:
    """Refuse a cached file or folder that another user has put there, or can change.

    Args:
        root: the cache. Its owner is trusted as well: a network disk may show ourselves so.
        path: below it; folders between the two are looked at, too, and what is not there passes.

    Raises:
        DataError: it, or a link to it, belongs to another user, or everyone may write to it.
    """
    trusted = {os.geteuid(), 0, root.stat().st_uid}
    for place in (path, *path.parents[: len(path.parts) - len(root.parts)]):
        with suppress(FileNotFoundError):
            for status in (place.lstat(), place.stat()):
                kept_apart = status.st_mode & stat.S_ISVTX or stat.S_ISLNK(status.st_mode)
                if status.st_uid not in trusted or (status.st_mode & stat.S_IWOTH and not kept_apart):
                    raise DataError(
                        "a file or folder of the cache belongs to another user, or everyone may write to it",
                        str(place),
                        "give data.cache_dir a folder of your own, or close this one: chmod -R o-w FOLDER",
                    )


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises:
        OSError: as :func:`open_regular`, or the file is larger.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"the file is larger than {most:,} bytes", str(path))
    return data


def parse_json(text: str | bytes, most: int = MOST_VALUES) -> Any:
    """The value of a JSON text; three bytes of one can take 70 of memory, so that its values are counted.

    Raises:
        ValueError: it is no JSON, nested too deeply, or has more than `most` values in arrays and objects.
    """
    if text.count("," if isinstance(text, str) else b",") > most:  # type: ignore[arg-type]
        raise ValueError(f"it holds more than {most:,} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, most: int = 64 << 20) -> dict[str, Any]:
    """The JSON object in a regular file of at most `most` bytes.

    Raises:
        OSError: as :func:`read_bounded`.
        ValueError: the file holds something else.
    """
    values = parse_json(read_bounded(path, most), most // _BYTES_A_VALUE)
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values


def mapping(value: Any) -> dict[str, Any]:
    """The JSON object that a file should hold there; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn a full or failing disk, a quota or a place that cannot be written into an error that names `path`.

    Raises:
        ResourceError: in place of the `OSError` of the system.
    """
    try:
        yield
    except OSError as error:
        place = str(error.filename or path)
        if error.errno in _FULL:
            fix = "free some space and start the same command again"
            raise ResourceError("the disk is full", place, fix) from error
        if error.errno in _FAILED:
            what = f"the disk or the network file system failed ({error.strerror})"
            fix = "look at it (dmesg, its mount), then start the same command again"
            raise ResourceError(what, place, fix) from error
        if error.errno in _REFUSED:
            raise ResourceError(
                f"the file or folder cannot be written ({error.strerror})",
                place,
                "raise the limit (ulimit -f), or write to another file system"
                if error.errno == errno.EFBIG
                else "choose another output folder, or change the permissions of this one",
            ) from error
        raise


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where they are not there."""
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)


def check_writable(folder: Path) -> None:
    """Make a folder if it is not there, and see that a file can be written into it."""
    make_folder(folder)
    probe = folder / f".probe-{os.getpid()}"
    with disk_faults(folder):
        probe.write_bytes(b"probe")
        probe.unlink()


def is_stream(path: Path) -> bool:
    """Whether a path is a device, a FIFO or an open descriptor (/dev/stdout): written to, never replaced."""
    place = os.readlink(path) if path.is_symlink() else str(path)
    named = place.startswith(("/proc/", "/dev/fd/"))
    return named or (path.exists() and not path.is_file() and not path.is_dir())


@contextmanager
def atomic_file(path: Path, *, unique: bool = False) -> Iterator[BinaryIO]:
    """A new file, open for writing, that takes the name `path` at the end of the block.

    On an exception the file is removed and `path` stays as it was. A device or a FIFO, such as /dev/stdout,
    is not replaced but written to.

    Args:
        unique: write under a temporary name of this thread, since others may write the same file.

    Raises:
        OSError: full disk or missing permission.
    """
    if is_stream(path):
        with path.open("wb") as file:
            yield file
        return
    owner = f".{os.getpid()}-{threading.get_ident()}" if unique else ""
    temporary = path.with_name(f"{path.name}{owner}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_path(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes, *, unique: bool = False) -> None:
    """Write a file so that after a crash there is the old file or the new one, never a part.

    Several processes may write the same file, each in its turn; `unique`, as :func:`atomic_file` has it, is
    for where the file system may know no locks of folders.

    Raises:
        ResourceError: full disk or missing permission.
    """
    with disk_faults(path), _turn(path.parent), atomic_file(path, unique=unique) as file:
        file.write(data)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, if it can be had: not on every network file system."""
    with ExitStack() as stack:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX)
            # Explicitly: a child that is forked meanwhile would hold it on.
            stack.callback(fcntl.flock, handle, fcntl.LOCK_UN)
        yield


def replaceable_folder(path: Path) -> Path:
    """Where a folder lies, links followed, in whose place a new one can be put.

    Raises:
        DataError: it is a mount point or the working folder, which cannot be replaced.
    """
    place = Path(os.path.realpath(path))
    kinds = {
        "a mount point": os.path.ismount(place),
        "the working folder": place == Path(os.path.realpath(".")),
    }
    if kind := next((kind for kind, found in kinds.items() if found), None):
        what = f"the output is {kind}, in whose place no new folder can be put"
        raise DataError(what, str(path), "give a new folder inside of it")
    return place


@contextmanager
def atomic_dir(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the name `path` at the end of the block.

    Args:
        path: the folder to make; it must not exist, or be empty. A link to such a folder stays a link.

    Raises:
        DataError: as :func:`replaceable_folder`, before the block.
        BusyError: another process makes the same folder.
        OSError: full disk or missing permission, or `path` is not an empty folder. The folder that was
            begun is removed, as is one that an earlier process left.
    """
    path = replaceable_folder(path)
    work = path.with_name(f".{path.name}.building")
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        error.filename = str(path)  # of which the user knows
        raise
    try:
        with folder_lock(work, 0.0):
            building = work / path.name
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            try:
                yield building
                sync_tree(building)
                if path.is_dir():
                    path.rmdir()
                building.rename(path)
                sync_path(path.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    finally:
        # On NFS a file that is open, as the lock was, stays in its folder under another name.
        with suppress(OSError):
            work.rmdir()


@contextmanager
def folder_lock(folder: Path, patience: float) -> Iterator[None]:
    """Keep other processes out of a folder; the lock ends with this process at the latest.

    A record lock on FOLDER/.lock: unlike `flock`, it does not pass to forked children, which may outlive
    a killed process, and it holds between hosts on NFS.

    Args:
        patience: seconds to wait for another process to leave.

    Raises:
        BusyError: another process is in the folder.
        OSError: the lock file cannot be opened.
    """
    holder, path, deadline = "", folder / LOCK_FILE, time.monotonic() + patience
    while (file := _locked(path)) is None:
        if time.monotonic() > deadline:
            with suppress(OSError):
                holder = path.read_text(encoding="utf-8", errors="replace")[:200].strip()
            raise BusyError(
                "another process is at work in the folder",
                f"{folder}: {holder or 'it has not said which'}",
                "wait for it, stop it, or give another --output",
            )
        time.sleep(_LOCK_POLL_SECONDS)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path) -> TextIO | None:
    """The lock file, locked; None where another process has it."""
    # A link that lies in a folder of somebody else's making would have its target emptied.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its last holder may have removed it between the two calls.
        if os.fstat(file.fileno()).st_nlink:
            return file
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file  # a file system without locks
    file.close()
    return None


def sync_tree(folder: Path) -> None:
    """Bring all files and folders below `folder`, and itself, to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() or path.is_dir():
            sync_path(path)
    sync_path(folder)


def sync_path(path: Path) -> None:
    """Bring a file, or a folder's own entries (names, renames) where the file system can do that, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # SMB and some file systems in user space know no such call for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)
