"""Opening a data directory wherever it lies: what is small is fetched at once, shards when needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from janus_ds.config.locations import is_remote, parse_locations
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.fetch import RemoteFolder
from janus_ds.data.stream.index import INDEX_NAME, MANIFEST_NAME, MOST_BYTES, Manifest
from janus_ds.data.stream.remote import Patience
from janus_ds.data.stream.shard_cache import RemoteShards, ShardCache
from janus_ds.data.text.tokenizer import MOST_TOKENIZER_BYTES, TOKENIZER_FILES, Tokenizer, load_tokenizer
from janus_ds.errors import DataError, JanusError
from janus_ds.io import check_owner, disk_faults, fingerprint_of, sha256_of_file

_BYTES_A_GB = 1e9


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
        folder = self.folder / name
        if self.remote is None:
            return SplitPlace(folder, str(folder), weight=self.weight)
        totals = self.manifest.splits.get(name)
        if totals is None:
            where = f"{self.name}: {MANIFEST_NAME}"
            raise DataError(f"the data has no split {name!r}", where, "prepare it again with that split")
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
    """
    sources = tuple(_open_one(found.location, found.weight, data) for found in parse_locations(location))
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
        return Path(data.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "janus_ds"


def _cached_folder(location: str, data: DataConfig) -> Path:
    """Where what is small of a distant directory is kept; nothing there is another user's."""
    # The address itself could hold a password.
    folder = _cache_folder(data) / "folders" / fingerprint_of(location.encode())[:24]
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, *folder.rglob("*")):
        check_owner(_cache_folder(data), path)
    return folder


@contextmanager
def _named(folder: Path, name: str) -> Iterator[None]:
    """Lets messages about a fetched file name the address that it came from."""
    try:
        yield
    except JanusError as error:
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
