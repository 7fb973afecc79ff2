"""Opening a data directory wherever it lies: what is small is fetched at once, shards when needed, with
tries and checksums."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO, TypeVar

from janus_ds.config.locations import (
    PIPE,
    expanded,
    is_remote,
    join_location,
    parse_locations,
    public_location,
    user_path,
)
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    MOST_BYTES,
    Manifest,
    SplitIndex,
    SplitTotals,
)
from janus_ds.data.stream.remote import Expected, Patience, TransferError, transferred
from janus_ds.data.stream.shard_cache import RemoteShards, ShardCache
from janus_ds.data.text.tokenizer import MOST_TOKENIZER_BYTES, TOKENIZER_FILES, Tokenizer, load_tokenizer
from janus_ds.errors import ConfigError, DamagedDataError, DataError, JanusError
from janus_ds.io import check_owner, disk_faults, fingerprint_of, make_folder, sha256_of_file, write_atomic

_BYTES_A_GB = 1e9
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
            OSError: `file` cannot be written.
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
                    with closing(transferred(location, self.patience, expected, have)) as chunks:
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
        make_folder(target.parent)
        with disk_faults(target.parent), TemporaryFile(dir=target.parent) as file:
            self.fetch(name, file, Expected(sha256=sha256, most=most))
            file.seek(0)
            write_atomic(target, file.read(), unique=True)

    def fetch_any(self, choices: Sequence[Sequence[str]], folder: Path, most: int) -> None:
        """Bring the first group of files that is there, under their last names, into `folder`, which keeps
        none of the other groups; none may have more than `most` bytes.

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
                    for other in {name for group in choices for name in group} - {*names}:
                        (folder / Path(other).name).unlink(missing_ok=True)
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
            else "look whether the address is right, and the file there for you to read"
            if not fault.passing
            else "start the same command again when the other side is well; data.retries and "
            "data.stall_seconds say how long to wait"
        )
        return kind(f"cannot fetch {name}: {fault}{count}", self.place(name), fix)


def _check_sha256(file: BinaryIO, expected: str | None) -> None:
    file.seek(0)
    if expected is not None and hashlib.file_digest(file, "sha256").hexdigest() != expected:  # type: ignore[arg-type]
        raise TransferError("the bytes that came are not those that were written (SHA-256)", damaged=True)


@dataclass(frozen=True)
class SplitPlace:
    """One split of one source.

    Attributes:
        folder: holds the index, and the shards unless they are distant.
        name: how messages call it.
        shards: brings distant shards.
        weight: of the source, where several are mixed.
    """

    folder: Path
    name: str
    shards: RemoteShards | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class DataSource:
    """One data directory."""

    name: str
    """How messages call it."""
    folder: Path
    """Local folder with manifest, tokenizer and, of distant data, the indexes fetched so far."""
    manifest: Manifest
    remote: RemoteFolder | None
    weight: float

    def split(self, name: str, data: DataConfig) -> SplitPlace:
        """A split of it; fetches its index."""
        folder, totals = self.folder / name, self.manifest.splits.get(name)
        if totals is None and (self.remote is not None or not folder.is_dir()):
            fix = f"name one of {', '.join(self.manifest.splits)}, or prepare it again with that split"
            raise DataError(f"the data has no split {name!r}", f"{self.name}: {MANIFEST_NAME}", fix)
        if self.remote is None or totals is None:
            _check_index(folder, totals)
            return SplitPlace(folder, str(folder), weight=self.weight)
        fetched = _fetched_split(self.remote.inside(name), folder, data, totals.index_sha256)
        return replace(fetched, weight=self.weight)


@dataclass(frozen=True)
class DataPlace:
    """A data directory, or several that are mixed."""

    sources: tuple[DataSource, ...]
    tokenizer: Tokenizer
    data: DataConfig

    @property
    def manifest(self) -> Manifest:
        """Of the first source."""
        return self.sources[0].manifest

    def split(self, name: str) -> tuple[SplitPlace, ...]:
        """A split of each source; fetches its index."""
        return tuple(source.split(name, self.data) for source in self.sources)

    def fingerprint(self, split: str) -> str:
        """What the order of samples means: the index, or all indexes with their weights."""
        found = [(source.manifest.splits.get(split), source.weight) for source in self.sources]
        indexes = [(totals.index_sha256 if totals else "", weight) for totals, weight in found]
        if len(indexes) == 1:
            return indexes[0][0]
        return fingerprint_of(*(f"{index}={weight!r}".encode() for index, weight in indexes))


def open_data(location: str, data: DataConfig) -> DataPlace:
    """Look at a data directory, or several with weights.

    Args:
        location: as `data.path` gives it.
        data: cache and patience; other fields do not matter.

    Raises:
        ConfigError: a source comes twice.
    """
    found = parse_locations(location)
    names = [source.location for source in found]
    # Not of a recorded mixture: what is left of two commands or addresses without their secrets may be alike.
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            "a source comes twice, so that its samples would",
            f"data.path: {public_location(twice)}",
            "name it once, with the sum of the weights",
        )
    sources = tuple(_open_one(source.location, source.weight, data) for source in found)
    for source in sources:
        _check_alike(sources[0], source)
    return DataPlace(sources, _checked_tokenizer(sources[0]), data)


def open_split(location: str, data: DataConfig) -> SplitPlace:
    """A split by itself, as `data.valid_path` names it."""
    if not is_remote(location):
        return SplitPlace(Path(location), location)
    remote = RemoteFolder(location, Patience(data.retries, data.stall_seconds))
    return _fetched_split(remote, _cached_folder(location, data), data, None)


def _open_one(location: str, weight: float, data: DataConfig) -> DataSource:
    if not is_remote(location):
        folder = Path(location)
        return DataSource(location, folder, Manifest.load(folder), None, weight)
    remote = RemoteFolder(location, Patience(data.retries, data.stall_seconds))
    folder = _cached_folder(location, data)
    path, most = folder / MANIFEST_NAME, MOST_BYTES[MANIFEST_NAME]
    with _named(folder, remote.public):
        # Its checksum stands in itself: flipped bytes are a reason to fetch it again.
        manifest = remote.until_sound(
            lambda: remote.fetch_small(MANIFEST_NAME, path, most), lambda: Manifest.load(folder)
        )
    source = DataSource(remote.public, folder, manifest, remote, weight)
    try:
        _checked_tokenizer(source)
    except JanusError:
        own, most = remote.inside("tokenizer"), MOST_TOKENIZER_BYTES
        remote.until_sound(
            lambda: own.fetch_any(TOKENIZER_FILES, folder / "tokenizer", most),
            lambda: _checked_tokenizer(source),
        )
    return source


def _fetched_split(
    remote: RemoteFolder, folder: Path, data: DataConfig, index_sha256: str | None
) -> SplitPlace:
    path = folder / INDEX_NAME
    here = path.is_file() and index_sha256 is not None and sha256_of_file(path) == index_sha256
    if not here:
        remote.fetch_small(INDEX_NAME, path, MOST_BYTES[INDEX_NAME], index_sha256)
    cache = ShardCache(_cache_folder(data) / "shards", int(data.cache_gb * _BYTES_A_GB))
    return SplitPlace(folder, remote.public, RemoteShards(remote, cache))


def _cache_folder(data: DataConfig) -> Path:
    if data.cache_dir:
        return user_path(data.cache_dir)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "janus_ds"


def _cached_folder(location: str, data: DataConfig) -> Path:
    """Where what is small of a distant directory is kept; nothing there is another user's."""
    # The address itself could hold a password.
    folder = _cache_folder(data) / "folders" / fingerprint_of(os.fsencode(location))[:24]
    make_folder(folder)
    for path in (folder, *folder.rglob("*")):
        check_owner(_cache_folder(data), path)
    return folder


@contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Lets messages about a fetched file name the address that it came from."""
    try:
        yield
    except DataError as error:
        raise type(error)(error.what, error.where.replace(str(folder), name), error.fix) from None


def _checked_tokenizer(source: DataSource) -> Tokenizer:
    name, expected = source.name, source.manifest.tokenizer_fingerprint
    with _named(source.folder, name):
        tokenizer = load_tokenizer(source.folder / "tokenizer")
    if tokenizer.fingerprint != expected:
        place = f"{name}: tokenizer" if source.remote else str(source.folder / "tokenizer")
        raise DataError(
            "the tokenizer is not the one that the data was prepared with",
            f"{place}: {tokenizer.fingerprint[:12]}, manifest: {expected[:12]}",
            "restore the data directory's own tokenizer, or prepare the data again",
        )
    return tokenizer


def _check_index(folder: Path, totals: SplitTotals | None) -> None:
    """Refuse an index other than the manifest's, which says what the order of samples means."""
    path = folder / INDEX_NAME
    if totals is not None and path.is_file() and sha256_of_file(path) != totals.index_sha256:
        SplitIndex.load(folder)  # tells of a damaged one
        raise DataError(
            "the index is not the one that the manifest was written with",
            str(path),
            "copy the whole directory again, or prepare the data again",
        )


def _check_alike(first: DataSource, other: DataSource) -> None:
    expected, found = first.manifest, other.manifest
    if found.tokenizer_fingerprint != expected.tokenizer_fingerprint:
        raise DataError(
            "the sources were prepared with different tokenizers, so that equal numbers mean other tokens",
            f"{first.name}: {expected.tokenizer_fingerprint[:12]}, "
            f"{other.name}: {found.tokenizer_fingerprint[:12]}",
            "prepare one of them again with the other's tokenizer (prepare_data.py --tokenizer DIR)",
        )
    if found.task != expected.task:
        raise DataError(
            f"the sources are of different tasks: {expected.task} and {found.task}",
            f"{first.name}, {other.name}",
            "mix blocks of text with blocks of text, or pairs with pairs",
        )


def check_task(found: str, asked: str, name: str) -> None:
    """Refuse data of another task than the run's; `name` is how messages call it.

    Raises:
        ConfigError: it is.
    """
    if found != asked:
        raise ConfigError(
            f"the data is prepared for task {found!r}, the run asks for {asked!r}",
            f"data.task, {name}",
            "set data.task to what the data is, or give other data",
        )
