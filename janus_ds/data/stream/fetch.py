"""Whole files from a distant directory, with tries and checksums."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, TypeVar

from janus_ds.config.locations import PIPE, expanded, join_location, public_location
from janus_ds.data.stream.remote import Expected, Patience, TransferError, transferred
from janus_ds.errors import DamagedDataError, DataError, JanusError
from janus_ds.io import disk_faults, write_atomic

_Found = TypeVar("_Found")


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
        location = join_location(expanded(self._location), name)  # which refuses odd names
        if location.startswith(PIPE):
            location = self._location.replace("{}", shlex.quote(name))
        if expected.sha256 is None:
            file.truncate(0)
        for damaged in range(1, self.patience.retries + 2):
            try:
                have = file.seek(0, 2)
                if not have or have != expected.size:
                    with (
                        disk_faults(Path(name)),
                        closing(transferred(location, self.patience, expected, have)) as chunks,
                    ):
                        file.writelines(chunks)
                        file.flush()
                return _check_sha256(file, expected.sha256)
            except TransferError as fault:
                if not fault.damaged or damaged > self.patience.retries:
                    raise self._error(name, fault, damaged if fault.damaged else fault.tries) from None
                file.truncate(0)
            self.patience.pause(damaged)

    def fetch_small(self, name: str, target: Path, most: int, sha256: str | None = None) -> None:
        """Bring a small file, of at most `most` bytes, to `target`, whole or not at all."""
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

    def until_sound(self, fetch: Callable[[], None], check: Callable[[], _Found]) -> _Found:
        """What `check` makes of what was fetched; as long as it refuses that, it is fetched again."""
        for attempt in range(1, self.patience.retries + 1):
            fetch()
            try:
                return check()
            except JanusError:
                self.patience.pause(attempt)
        fetch()
        return check()

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
        return kind(f"cannot fetch {name}: {fault}{count}", self.place(name), fix)


def _check_sha256(file: BinaryIO, expected: str | None) -> None:
    file.seek(0)
    if expected is not None and hashlib.file_digest(file, "sha256").hexdigest() != expected:  # type: ignore[arg-type]
        raise TransferError("the bytes that came are not those that were written (SHA-256)", damaged=True)
