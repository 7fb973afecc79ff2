"""Opening a data directory wherever it lies: what is small is fetched at once, shards when needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from janus_ds.config.locations import is_remote, parse_locations
from janus_ds.config.schema import DataConfig
from janus_ds.data.stream.fetch import Patience, RemoteFolder
from janus_ds.data.stream.index import INDEX_NAME, MANIFEST_NAME, MOST_BYTES, Manifest
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

    @classmethod
    def of(cls, split: Path | SplitPlace) -> SplitPlace:
        """A local folder as a place."""
        return split if isinstance(split, SplitPlace) else cls(split, str(split))


@dataclass(frozen=True)
class DataPlace:
    """A data directory, or several that are mixed."""

    names: tuple[str, ...]
    folders: tuple[Path, ...]
    """Local folders with manifest, tokenizer and, of distant data, the indexes fetched so far."""
    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]
    tokenizer: Tokenizer
    remotes: tuple[RemoteFolder | None, ...]
    data: DataConfig

    @property
    def manifest(self) -> Manifest:
        """Of the first source."""
        return self.manifests[0]

    @property
    def name(self) -> str:
        """How messages call it."""
        return ", ".join(self.names)

    def split(self, name: str) -> tuple[SplitPlace, ...]:
        """A split of each source; fetches its index.

        Raises:
            DataError: the index cannot be fetched, or is not the manifest's.
        """
        parts = (self._part(number, name) for number in range(len(self.names)))
        return tuple(replace(part, weight=w) for part, w in zip(parts, self.weights, strict=True))

    def fingerprint(self, split: str) -> str:
        """What the order of samples means: the index, or all indexes with their weights."""
        indexes = [
            manifest.splits[split].index_sha256 if split in manifest.splits else ""
            for manifest in self.manifests
        ]
        if len(indexes) == 1:
            return indexes[0]
        return fingerprint_of(*(f"{i}={w!r}".encode() for i, w in zip(indexes, self.weights, strict=True)))

    def _part(self, number: int, split: str) -> SplitPlace:
        folder, remote = self.folders[number] / split, self.remotes[number]
        if remote is None:
            return SplitPlace(folder, str(folder))
        totals = self.manifests[number].splits.get(split)
        if totals is None:
            where = f"{self.names[number]}: {MANIFEST_NAME}"
            raise DataError(f"the data has no split {split!r}", where, "prepare it again with that split")
        return _fetched_split(remote.inside(split), folder, self.data, totals.index_sha256)


def open_data(location: str, data: DataConfig) -> DataPlace:
    """Look at a data directory, or several with weights.

    Args:
        location: as `data.path` gives it.
        data: cache and patience; other fields do not matter.

    Raises:
        DataError: a directory is missing or damaged, or several do not belong together.
    """
    sources = parse_locations(location)
    found = [_open_one(source.location, data) for source in sources]
    folders, manifests, remotes, names = zip(*found, strict=True)
    for name, manifest in zip(names, manifests, strict=True):
        _check_alike(names[0], manifests[0], name, manifest)
    return DataPlace(
        names=names,
        folders=folders,
        manifests=manifests,
        weights=tuple(source.weight for source in sources),
        tokenizer=_checked_tokenizer(folders[0], names[0], manifests[0]),
        remotes=remotes,
        data=data,
    )


def open_split(location: str, data: DataConfig) -> SplitPlace:
    """A split by itself, as `data.valid_path` names it.

    Raises:
        DataError: it is missing.
    """
    if not is_remote(location):
        return SplitPlace(Path(location), location)
    remote = RemoteFolder(location, Patience(data.retries, data.stall_seconds))
    return _fetched_split(remote, _cached_folder(location, data), data, None)


def _open_one(location: str, data: DataConfig) -> tuple[Path, Manifest, RemoteFolder | None, str]:
    if not is_remote(location):
        folder = Path(location)
        return folder, Manifest.load(folder), None, location
    remote = RemoteFolder(location, Patience(data.retries, data.stall_seconds))
    folder = _cached_folder(location, data)
    manifest = _fetched_manifest(remote, folder)
    for attempt in range(data.retries + 1):
        if _has_tokenizer(folder, manifest):
            break
        if attempt:
            remote.patience.pause(attempt)
        remote.inside("tokenizer").fetch_any(TOKENIZER_FILES, folder / "tokenizer", MOST_TOKENIZER_BYTES)
    return folder, manifest, remote, remote.public


def _fetched_manifest(remote: RemoteFolder, folder: Path) -> Manifest:
    """The manifest, whose checksum stands in itself: flipped bytes are a reason to fetch it again."""
    attempt = 0
    while True:
        remote.fetch_small(MANIFEST_NAME, folder / MANIFEST_NAME, MOST_BYTES[MANIFEST_NAME])
        try:
            with _named(folder, remote.public):
                return Manifest.load(folder)
        except DataError:
            attempt += 1
            if attempt > remote.patience.retries:
                raise
        remote.patience.pause(attempt)


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
    """Where what is small of a distant directory is kept; nothing there is another user's.

    Raises:
        DataError: something is.
    """
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


def _has_tokenizer(folder: Path, manifest: Manifest) -> bool:
    try:
        return load_tokenizer(folder / "tokenizer").fingerprint == manifest.tokenizer_fingerprint
    except JanusError:
        return False


def _checked_tokenizer(folder: Path, name: str, manifest: Manifest) -> Tokenizer:
    with _named(folder, name):
        tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
        raise DataError(
            "the tokenizer is not the one that the data was prepared with",
            f"{Path(name) / 'tokenizer' if folder == Path(name) else name + ': tokenizer'}: "
            f"{tokenizer.fingerprint[:12]}, manifest: {manifest.tokenizer_fingerprint[:12]}",
            "restore the data directory's own tokenizer, or prepare the data again",
        )
    return tokenizer


def _check_alike(first: str, expected: Manifest, name: str, manifest: Manifest) -> None:
    if manifest.tokenizer_fingerprint != expected.tokenizer_fingerprint:
        raise DataError(
            "the sources were prepared with different tokenizers, so that equal numbers mean other tokens",
            f"{first}: {expected.tokenizer_fingerprint[:12]}, {name}: {manifest.tokenizer_fingerprint[:12]}",
            "prepare one of them again with the other's tokenizer (prepare_data.py --tokenizer DIR)",
        )
    if manifest.task != expected.task:
        raise DataError(
            f"the sources are of different tasks: {expected.task} and {manifest.task}",
            f"{first}, {name}",
            "mix blocks of text with blocks of text, or pairs with pairs",
        )
