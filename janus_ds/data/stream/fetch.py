"""Whole files from a distant directory: tries, growing pauses, continued transfers, checksums."""

from __future__ import annotations

import hashlib
import random
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from janus_ds.config.locations import PIPE, expanded, join_location, public_location
from janus_ds.data.stream.remote import CHUNK_BYTES, TransferError, open_transfer
from janus_ds.errors import DamagedDataError, DataError, JanusError
from janus_ds.io import disk_faults, write_atomic

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_LEAST_BYTES = 4096

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Patience:
    """How long to go on after faults.

    Args:
        retries: further tries after one that brought nothing new, or damaged bytes.
        stall_seconds: how long a transfer may bring nothing.
    """

    retries: int = 5
    stall_seconds: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def pause(self, attempt: int) -> None:
        """Wait before try number `attempt` (from 1): twice as long each time, and never all at once."""
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (attempt - 1))
        self.sleep(longest * random.uniform(0.5, 1.0))

    def until_sound(self, fetch: Callable[[], None], check: Callable[[], _Found]) -> _Found:
        """What `check` makes of what was fetched; as long as it refuses that, it is fetched again."""
        for attempt in range(1, self.retries + 1):
            fetch()
            try:
                return check()
            except JanusError:
                self.pause(attempt)
        fetch()
        return check()


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it comes: its size or the most it may have, and its SHA-256."""

    size: int | None = None
    sha256: str | None = None
    most: int = 1 << 40


class RemoteFolder:
    """A distant directory.

    Args:
        location: an address, or `pipe:COMMAND {}`.
    """

    def __init__(self, location: str, patience: Patience) -> None:
        self._location = location
        self.patience = patience

    @property
    def public(self) -> str:
        """The directory as messages name it."""
        return public_location(self._location)

    def inside(self, name: str) -> RemoteFolder:
        """A directory in it."""
        return RemoteFolder(join_location(self._location, name), self.patience)

    def place(self, name: str) -> str:
        """A file of it as messages name it."""
        if self._location.startswith(PIPE):
            return f"{self.public}, file {name}"
        return public_location(join_location(self._location, name))

    def fetch(self, name: str, file: BinaryIO, expected: Expected) -> None:
        """Bring a file whole into `file`; what is in it already is continued where its hash is known.

        Args:
            name: relative to the directory.
            file: open for reading and writing.

        Raises:
            DamagedDataError: after the last try the bytes are still not those of `expected`.
            DataError: the file is missing, or could not be brought; names file and address.
        """
        if expected.sha256 is None:
            file.truncate(0)
        tries = 0
        while True:
            before = file.seek(0, 2)
            try:
                return self._attempt(name, file, expected)
            except TransferError as fault:
                came = file.seek(0, 2) - before
                # A transfer that is cut again and again but goes on is no failure.
                tries = 0 if came >= CHUNK_BYTES and not fault.damaged else tries + 1
                if fault.damaged:
                    file.truncate(0)
                if not fault.passing or tries > self.patience.retries:
                    raise self._error(name, fault, tries) from None
            self.patience.pause(max(tries, 1))

    def fetch_small(self, name: str, target: Path, most: int, sha256: str | None = None) -> None:
        """Bring a small file, of at most `most` bytes, to `target`, whole or not at all."""
        from tempfile import TemporaryFile

        with TemporaryFile() as file:
            self.fetch(name, file, Expected(sha256=sha256, most=most))
            file.seek(0)
            with disk_faults(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, file.read(), unique=True)

    def fetch_any(self, choices: Sequence[Sequence[str]], folder: Path, most: int) -> None:
        """Bring the first group of files that is there, under their last names, into `folder`;
        none may have more than `most` bytes.

        Raises:
            DataError: no group is there whole, after all tries.
        """
        once = RemoteFolder(self._location, Patience(0, self.patience.stall_seconds))
        for attempt in range(1, self.patience.retries + 2):
            problem: DataError | None = None
            for names in choices:
                try:
                    for name in names:
                        once.fetch_small(name, folder / Path(name).name, most)
                    return
                except DataError as error:
                    problem = problem or error
            if problem is not None and attempt > self.patience.retries:
                raise problem
            self.patience.pause(attempt)

    def _attempt(self, name: str, file: BinaryIO, expected: Expected) -> None:
        """One transfer.

        Raises:
            TransferError: it failed; what came of the file stays, unless it is wrong.
        """
        have = file.seek(0, 2)
        if expected.size is None or have < expected.size or have == 0:
            total = self._copy(name, file, have, expected)
        else:
            total = expected.size
        have = file.seek(0, 2)
        if total is not None and have < total:
            raise TransferError(f"the transfer ended after {have:,} of {total:,} bytes")
        self._check(file, have, expected)

    def _copy(self, name: str, file: BinaryIO, have: int, expected: Expected) -> int | None:
        with open_transfer(self._target(name), have, self.patience.stall_seconds) as transfer:
            if expected.size is not None and transfer.total not in (None, expected.size):
                reason = f"the file there has {transfer.total:,} bytes, the index says {expected.size:,}"
                raise TransferError(reason, damaged=True)
            if transfer.total is not None and transfer.total > expected.most:
                raise _too_large(expected)
            skip = have - transfer.start
            with disk_faults(Path(name)):
                for chunk in self._steady(transfer.chunks):
                    # The other side began anew: pass over what is here already.
                    kept, skip = chunk[skip:], max(0, skip - len(chunk))
                    file.write(kept)
                    if file.tell() > (expected.most if expected.size is None else expected.size):
                        raise _too_large(expected)
                file.flush()
            return expected.size if expected.size is not None else transfer.total

    def _steady(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """The chunks, until fewer than `_LEAST_BYTES` come in `stall_seconds`: a drip is a stall too."""
        since, came = time.monotonic(), 0
        for chunk in chunks:
            came += len(chunk)
            if came >= _LEAST_BYTES:
                since, came = time.monotonic(), 0
            elif time.monotonic() - since > self.patience.stall_seconds:
                raise TransferError("the transfer stalled: next to nothing came")
            yield chunk

    def _check(self, file: BinaryIO, have: int, expected: Expected) -> None:
        if expected.size is not None and have > expected.size:
            raise _too_large(expected)
        if expected.sha256 is None:
            return
        digest = hashlib.sha256()
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
        if digest.hexdigest() != expected.sha256:
            raise TransferError("the bytes that came are not those that were written (SHA-256)", damaged=True)

    def _target(self, name: str) -> str:
        place = join_location(expanded(self._location), name)  # which refuses odd names
        return self._location.replace("{}", shlex.quote(name)) if self._location.startswith(PIPE) else place

    def _error(self, name: str, fault: TransferError, tries: int) -> DataError:
        count = f", {tries} tries" if tries > 1 else ""
        kind = DamagedDataError if fault.damaged else DataError
        fix = (
            "publish the file again, or prepare the data again"
            if fault.damaged
            else "look whether the address is right and the file there"
            if fault.missing
            else "start the same command again when the other side is well; data.retries and "
            "data.stall_seconds say how long to wait"
        )
        return kind(f"cannot fetch {name}: {fault.reason}{count}", self.place(name), fix)


def _too_large(expected: Expected) -> TransferError:
    if expected.size is not None:
        return TransferError(f"more came than the {expected.size:,} bytes that the index says", damaged=True)
    return TransferError(f"the file has more than {expected.most:,} bytes", passing=False)
