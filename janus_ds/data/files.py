"""Writing and hashing files so that a reader sees either the old file or the whole new one."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from janus_ds.errors import ResourceError

__all__ = ["check_writable", "disk_faults", "fingerprint_of", "sha256_of_file", "write_whole"]

_CHUNK_BYTES = 1 << 20


def fingerprint_of(*parts: bytes) -> str:
    """Hexadecimal SHA-256 over the parts, each preceded by its length so that borders count."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def disk_faults(path: Path) -> Iterator[None]:
    """Turn a full disk, a quota or a missing permission into an error that names `path`.

    Raises:
        ResourceError: in place of the `OSError` of the system.
    """
    try:
        yield
    except OSError as error:
        place = str(error.filename or path)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                "the disk is full",
                place,
                "free some space and start the same command again; it goes on where it stopped",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(
                "the file or folder cannot be written",
                place,
                "choose another output folder, or change the permissions of this one",
            ) from error
        raise


def check_writable(folder: Path) -> None:
    """Make a folder if it is not there, and see that a file can be written into it.

    Raises:
        ResourceError: it cannot.
    """
    probe = folder / f".probe-{os.getpid()}"
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"probe")
        probe.unlink()


def write_whole(path: Path, data: bytes, *, unique: bool = False) -> None:
    """Write a file so that after a crash there is the old file or the new one, never a part.

    Args:
        unique: under a temporary name of this process, since others may write the same file.

    Raises:
        ResourceError: full disk or missing permission.
    """
    owner = f".{os.getpid()}-{threading.get_ident()}" if unique else ""
    temporary = path.with_name(f"{path.name}{owner}.part")
    with disk_faults(path):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
