"""How far a preparation has come, kept on disk so that it goes on after a kill.

`OUT/.prepare/` holds `key.json` (what is being prepared), `state.json` (position in the input, counts,
finished shards) and the samples that are in no shard yet. `state.json` is replaced whole and names
its file of samples, so the two always belong together. A lock keeps a second preparation out.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as validated

from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.stream.index import (
    MANIFEST_NAME,
    STRICT,
    Manifest,
    Name,
    ShardEntry,
    SoundShard,
    SplitIndex,
    SplitTotals,
    Sum,
)
from janus_ds.data.stream.shards import ShardFormat, shard_name, write_shard
from janus_ds.data.text.documents import Position
from janus_ds.errors import DataError
from janus_ds.io import disk_faults, fingerprint_of, write_atomic

WORK_NAME = ".prepare"

_KEY, _STATE, _LOCK = "key.json", "state.json", "lock"


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is.

    Args:
        stage: "reading text for the tokenizer", "training the tokenizer" or "writing shards".
        share: of the input files' bytes, 0 to 1.
        text_bytes: bytes of text tokenised by this call.
    """

    stage: str
    share: float
    text_bytes: int = 0
    documents: int = 0
    seconds: float = 0.0

    @property
    def megabytes_per_second(self) -> float:
        """Text tokenised, 10^6 bytes a second."""
        return self.text_bytes / 1e6 / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class PrepareReport:
    """What a preparation made.

    Args:
        already_whole: the directory was finished before, nothing was done.
        resumed: the call went on with an interrupted preparation.
        done: what this call tokenised, and in what time.
    """

    output: Path
    manifest: Manifest
    already_whole: bool = False
    resumed: bool = False
    done: PrepareProgress = field(default_factory=lambda: PrepareProgress("writing shards", 1.0))

    @property
    def counts(self) -> dict[str, Any]:
        """What was read, cut or left out: over the whole input; of pairs, by split."""
        return dict(self.manifest.settings["counts"])


@dataclass
class SplitState:
    """One split: shards on disk, and samples that wait for the next shard, by stream."""

    shards: list[ShardEntry] = field(default_factory=list)
    pending: dict[str, Ragged] = field(default_factory=dict)


@dataclass
class Progress:
    """Everything that a preparation has to remember."""

    position: Position = field(default_factory=Position)
    counts: Counter[str] = field(default_factory=Counter)
    splits: dict[str, SplitState] = field(default_factory=dict)


@validated(config=STRICT)
class _SavedSplit:
    """A split in `state.json`; `pending` names streams."""

    shards: list[SoundShard]
    pending: list[str]


@validated(config=STRICT)
class _State:
    """The form of `state.json`."""

    serial: Sum
    samples: Name
    samples_sha256: str
    position: dict[str, Sum]
    counts: dict[str, Sum]
    splits: dict[Name, _SavedSplit]


class Journal:
    """The working folder of one preparation; use as a context, which holds the lock.

    Args:
        key: what is prepared: settings and inputs with sizes and times of change.

    Raises:
        DataError: another preparation is at work there, or an unfinished one of something else is.
    """

    def __init__(self, output: Path, key: dict[str, Any]) -> None:
        self._output = output
        self._dir = output / WORK_NAME
        self._key = json.dumps(key, sort_keys=True)
        self._lock: int | None = None
        self._serial = 0

    @property
    def folder(self) -> Path:
        """For files of the preparation itself; removed at the end."""
        return self._dir

    def __enter__(self) -> Journal:
        with disk_faults(self._output):
            self._dir.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise DataError(
                "another preparation is writing to this folder",
                str(self._output),
                "wait for it to end, or choose another output folder",
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            self._take_key()
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_key(self) -> None:
        path = self._dir / _KEY
        same = path.is_file() and path.read_text() == self._key
        if not same and (self._dir / _STATE).is_file():
            raise DataError(
                "the folder holds an unfinished preparation with other settings or of other input "
                "(or the input files have changed since)",
                str(self._output),
                "start again with the same settings and input, or delete the folder, or choose another",
            )
        if not same:
            self._refuse_foreign()
            write_atomic(path, self._key.encode())

    def _refuse_foreign(self) -> None:
        """A new preparation needs an empty folder; what an earlier start left may go."""
        foreign = sorted(p.name for p in self._output.iterdir() if p.name != WORK_NAME)
        if (self._dir / _KEY).is_file() and set(foreign) <= {"tokenizer", "train", "valid", "test"}:
            for name in foreign:
                shutil.rmtree(self._output / name)
        elif foreign:
            raise DataError(
                f"the output folder is not empty: it holds {', '.join(foreign[:4])}",
                str(self._output),
                "choose another output folder, or delete this one",
            )

    def load(self) -> Progress:
        """The last lasting progress; a fresh start where there is none or it is damaged."""
        try:
            state = TypeAdapter(_State).validate_json((self._dir / _STATE).read_bytes())
            samples = (self._dir / state.samples).read_bytes()
            if fingerprint_of(samples) != state.samples_sha256:
                return Progress()
            arrays = np.load(io.BytesIO(samples), allow_pickle=False)
            splits = {name: self._split(name, split, arrays) for name, split in state.splits.items()}
            found = Progress(Position(**state.position), Counter(state.counts), splits)
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            return Progress()
        self._serial = state.serial
        return found

    def _split(self, name: str, saved: _SavedSplit, arrays: Any) -> SplitState:
        for shard in saved.shards:
            if (self._output / name / shard.name).stat().st_size != shard.size:
                raise ValueError(f"{shard.name} has changed")
        pending = {
            stream: Ragged(arrays[f"{name}.{stream}.values"], arrays[f"{name}.{stream}.offsets"])
            for stream in saved.pending
        }
        return SplitState(saved.shards, pending)

    def commit(self, progress: Progress) -> None:
        """Make the progress lasting."""
        arrays = {
            f"{name}.{stream}.{part}": getattr(rows, part)
            for name, split in progress.splits.items()
            for stream, rows in split.pending.items()
            for part in ("values", "offsets")
        }
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        self._serial += 1
        samples_name = f"samples-{self._serial:06d}.npz"
        write_atomic(self._dir / samples_name, buffer.getvalue())
        state = _State(
            serial=self._serial,
            samples=samples_name,
            samples_sha256=fingerprint_of(buffer.getvalue()),
            position=asdict(progress.position),
            counts=dict(progress.counts),
            splits={n: _SavedSplit(s.shards, sorted(s.pending)) for n, s in progress.splits.items()},
        )
        write_atomic(self._dir / _STATE, TypeAdapter(_State).dump_json(state))
        for old in self._dir.glob("samples-*.npz*"):
            if old.name != samples_name:
                old.unlink()

    def remove(self) -> None:
        """Delete the working folder, after the data is whole."""
        shutil.rmtree(self._dir)


class SplitWriter:
    """Writes the shards of one split; what they hold depends on the order of samples alone."""

    def __init__(self, directory: Path, packing: ShardFormat, state: SplitState) -> None:
        self._dir = directory
        self._packing = packing
        self._shards = list(state.shards)
        self._parts = [state.pending] if state.pending else []
        self._waiting = sum(_samples(part) for part in self._parts)

    def add(self, samples: dict[str, Ragged]) -> bool:
        """Take samples in; True if a shard was written."""
        self._parts.append(samples)
        self._waiting += _samples(samples)
        full = self._packing.samples_per_shard
        wrote = self._waiting >= full
        while self._waiting >= full:
            self._write(full)
        return wrote

    @property
    def empty(self) -> bool:
        """No sample has come yet."""
        return not self._shards and not self._waiting

    def give(self, share: float) -> dict[str, Ragged]:
        """Take away this share, at least one, of the waiting samples, from their end; a single one stays."""
        waiting = self._gather() if self._waiting > 1 else {}
        kept = self._waiting - max(1, round(share * self._waiting))
        given = {name: rows.slice(kept, len(rows)) for name, rows in waiting.items()}
        if given:
            self._parts, self._waiting = [{name: rows.slice(0, kept) for name, rows in waiting.items()}], kept
        return given

    def state(self) -> SplitState:
        """Shards on disk and the samples that are not in one."""
        return SplitState(list(self._shards), self._gather() if self._parts else {})

    def finish(self, streams: tuple[str, ...]) -> SplitTotals:
        """Write what is left and the index; returns what the manifest says of it."""
        if self._waiting:
            self._write(self._waiting)
        index = SplitIndex(self._packing.stream_dtype, streams, tuple(self._shards))
        return SplitTotals(len(index.shards), index.samples, index.tokens, index.save(self._dir))

    def _gather(self) -> dict[str, Ragged]:
        """All waiting samples as one part."""
        if len(self._parts) > 1:
            streams = self._parts[0]
            self._parts = [{name: Ragged.concatenate([p[name] for p in self._parts]) for name in streams}]
        return self._parts[0]

    def _write(self, count: int) -> None:
        waiting = self._gather()
        first = {name: rows.slice(0, count) for name, rows in waiting.items()}
        rest = {name: rows.slice(count, len(rows)) for name, rows in waiting.items()}
        with disk_faults(self._dir):
            self._dir.mkdir(exist_ok=True)
        path = self._dir / shard_name(len(self._shards))
        members = sum(len(shard.members) for shard in self._shards)
        self._shards.append(write_shard(path, first, self._packing, members))
        self._waiting -= count
        self._parts = [rest] if self._waiting else []


def _samples(part: dict[str, Ragged]) -> int:
    return len(next(iter(part.values())))


def finished_manifest(output: Path, request: dict[str, Any]) -> Manifest | None:
    """The manifest of a directory that is there already; None where the output is new or empty.

    Raises:
        DataError: it was made on another request, or holds something else.
    """
    if not (output / MANIFEST_NAME).is_file():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise DataError("the output is not an empty folder", str(output), "choose another output folder")
        return None
    manifest = Manifest.load(output)
    if manifest.settings.get("request") != request:
        raise DataError(
            "the output folder holds data prepared with other settings or from other input",
            str(output),
            "choose another output folder, or delete this one",
        )
    return manifest
