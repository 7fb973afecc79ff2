"""Fetched shards in a bounded folder that all processes of a machine share.

Files are named by their SHA-256, so that equal shards of several addresses lie there once. Who reads a
shard holds a shared lock on it, who fetches one an exclusive lock on its `.part`; the kernel drops the locks
of a dead process. Room is made under one lock for the folder: the least recently used go first, and never
one that is locked. A part counts with its full size from the start, so that the bound holds at any moment.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from janus_ds.data.stream.index import ShardEntry
from janus_ds.data.stream.remote import Expected
from janus_ds.errors import DamagedDataError, JanusError, ResourceError
from janus_ds.io import check_owner, disk_faults, make_folder, open_regular, sha256_of_file

if TYPE_CHECKING:
    from janus_ds.data.stream.open_dataset import RemoteFolder

_WHOLE = re.compile(r"[0-9a-f]{64}\.tar")

_PART = re.compile(r"[0-9a-f]{64}\.([0-9]+)\.part")

_POLL_SECONDS = 0.05

_PATIENCE_SECONDS = 60.0

logger = logging.getLogger(__name__)


class ShardCache:
    """A folder of shards.

    Args:
        folder: made when first needed.
        limit: bytes that shards may take there, those that are on their way included.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def open(self, sha256: str, size: int, download: Callable[[BinaryIO], None]) -> int:
        """A descriptor of the whole shard, locked against removal until it is closed.

        Args:
            sha256: of the shard.
            size: its bytes.
            download: brings it into a file that may hold its beginning already.
        """
        while True:
            with disk_faults(self.folder):
                descriptor = self._open_whole(self._whole(sha256), size)
                if descriptor is not None:
                    return descriptor
                self._bring(sha256, size, download)

    def renew(self, sha256: str) -> bool:
        """Remove a shard whose bytes have changed here since they came; says whether it was so."""
        path = self._whole(sha256)
        try:
            damaged = sha256_of_file(path) != sha256
        except OSError:
            damaged = True
        if damaged:
            path.unlink(missing_ok=True)
        return damaged

    def has(self, sha256: str) -> bool:
        """Whether the shard is here now."""
        return self._whole(sha256).exists()

    def arrived(self) -> list[tuple[int, int]]:
        """What changes while bytes of shards come, whoever fetches them."""
        places = (self.folder, *self.folder.glob("*.part"))
        return [(status.st_mtime_ns, status.st_size) for status in map(Path.stat, places)]

    def _whole(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _open_whole(self, path: Path, size: int) -> int | None:
        try:
            check_owner(self.folder.parent, path)
            descriptor = open_regular(path)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        # Removed between the two calls, or cut by a full disk or a crash of the machine.
        if status.st_nlink == 0 or status.st_size != size:
            os.close(descriptor)
            if status.st_nlink:
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(descriptor)
        return descriptor

    def _bring(self, sha256: str, size: int, download: Callable[[BinaryIO], None]) -> None:
        whole, part = self._whole(sha256), self.folder / f"{sha256}.{size}.part"
        make_folder(self.folder)
        check_owner(self.folder.parent, part)
        descriptor = self._reserve(whole, part, size)
        if descriptor is None:
            return
        with os.fdopen(descriptor, "r+b") as file:
            download(file)
            # Under the lock: who opens it now waits until it is let go.
            part.rename(whole)

    def _reserve(self, whole: Path, part: Path, size: int) -> int | None:
        """The locked part with room for all of it; None: somebody else has brought the shard."""
        if size > self.limit:
            raise ResourceError(
                f"a shard of {size:,} bytes does not fit into a cache of {self.limit:,}",
                str(self.folder),
                "raise data.cache_gb",
            )
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            with self._turn():
                descriptor = _locked(part, create=True)
                if descriptor is not None:
                    if whole.exists():
                        part.unlink()
                        os.close(descriptor)
                        return None
                    if self._make_room(size, part):
                        return descriptor
                    if os.fstat(descriptor).st_size == 0:
                        part.unlink()
                    os.close(descriptor)
                if self._others_fetch():
                    deadline = time.monotonic() + _PATIENCE_SECONDS
            if time.monotonic() > deadline:
                raise ResourceError(
                    "the cache is full of shards that are in use",
                    str(self.folder),
                    "raise data.cache_gb, or lower data.read_ahead, data.shuffle_shards or data.workers",
                )
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One process at a time counts and removes."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise ResourceError(
                "the file system of the cache has no file locks, so that processes cannot share it",
                str(self.folder),
                "set data.cache_dir to a folder on a disk of this machine",
            ) from error
        finally:
            os.close(descriptor)

    def _make_room(self, size: int, own: Path) -> bool:
        others = [entry for entry in self._entries() if entry[2] != own]
        excess = sum(taken for _, taken, _ in others) + size - self.limit
        for _, taken, path in sorted(others):
            if excess > 0 and (descriptor := _locked(path)) is not None:
                path.unlink()
                os.close(descriptor)
                excess -= taken
        return excess <= 0

    def _others_fetch(self) -> bool:
        """Whether a fetch is under way, so that waiting makes sense."""
        for _, _, path in self._entries():
            if path.suffix == ".part":
                descriptor = _locked(path)
                if descriptor is None:
                    return True
                os.close(descriptor)
        return False

    def _entries(self) -> list[tuple[int, int, Path]]:
        """When each file of the cache was last used, in ns, the bytes it takes, and its path."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            part = _PART.fullmatch(path.name)
            if not part and not _WHOLE.fullmatch(path.name):
                continue
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, int(part[1]) if part else status.st_size, path))
        return found


def _locked(path: Path, *, create: bool = False) -> int | None:
    """A descriptor with an exclusive lock; None: another holds the file, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink and path.exists():
            return descriptor
    except BlockingIOError:
        pass
    os.close(descriptor)
    return None


class RemoteShards:
    """The shards of a distant split, fetched into the cache when they are needed."""

    def __init__(self, folder: RemoteFolder, cache: ShardCache) -> None:
        self.folder = folder
        self.cache = cache
        self._damaged: dict[str, DamagedDataError] = {}
        self._thread: threading.Thread | None = None
        self._wishes: list[ShardEntry] = []
        self._asked: list[str] = []

    def open(self, shard: ShardEntry) -> int:
        """A descriptor of the whole shard, to be closed soon.

        Raises:
            DamagedDataError: what is published is not what the index says; found out once.
            DataError: it cannot be fetched; ResourceError: no room.
        """
        if shard.name in self._damaged:
            raise self._damaged[shard.name]
        expected = Expected(shard.size, shard.sha256)
        try:
            return self.cache.open(
                shard.sha256, shard.size, lambda file: self.folder.fetch(shard.name, file, expected)
            )
        except DamagedDataError as error:
            self._damaged[shard.name] = error
            raise

    def renew(self, shard: ShardEntry) -> bool:
        """Forget the local copy if it has become damaged."""
        return shard.name not in self._damaged and self.cache.renew(shard.sha256)

    def want(self, shards: Sequence[ShardEntry]) -> None:
        """Fetch these in the background, the first first, and forget earlier wishes.

        Faults are left to the reader, who meets them with the same shard and reports them.
        """
        # After a fork the thread is the other process's.
        asked = [str(os.getpid()), *(shard.name for shard in shards)]
        if asked == self._asked:
            return
        self._asked, self._wishes = asked, list(shards)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._fetch_wishes, name="read-ahead", daemon=True)
            self._thread.start()

    def _fetch_wishes(self) -> None:
        while self._wishes:
            shard = self._wishes.pop(0)
            try:
                if not self.cache.has(shard.sha256):
                    os.close(self.open(shard))
            except JanusError as error:
                logger.debug("reading ahead: %s", error)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_asked": []}
