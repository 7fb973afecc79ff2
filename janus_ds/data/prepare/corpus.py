"""From text files to a data directory, once over the input, in constant memory, resumable.

Documents are read in order by the calling process, tokenised and cut into blocks by any number of
processes, and written in order again, so that the bytes depend on settings and input alone.

How far it has come is kept in `OUT/.prepare/`: `key.json` (what is being prepared), `state.json` (position in
the input, counts, finished shards) and the samples that are in no shard yet. `state.json` is replaced whole
and names its file of samples, so the two always belong together. A lock keeps a second preparation out.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from pydantic import TypeAdapter
from pydantic.dataclasses import dataclass as validated

from janus_ds.batch import Ragged
from janus_ds.data.prepare.blocks import encode_blocks
from janus_ds.data.prepare.settings import PrepareSettings
from janus_ds.data.prepare.train_tokenizer import ensure_tokenizer
from janus_ds.data.prepare.writing import (
    PrepareProgress,
    PrepareReport,
    SplitState,
    SplitWriter,
    finished_manifest,
    ordered_map,
    portions,
)
from janus_ds.data.stream.index import MANIFEST_NAME, STRICT, Manifest, Name, SoundShard, SplitTotals, Sum
from janus_ds.data.stream.shards import ShardFormat, token_dtype
from janus_ds.data.text.documents import DocumentReader, Position
from janus_ds.data.text.text_files import list_inputs
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.errors import DataError
from janus_ds.io import disk_faults, fingerprint_of, folder_lock, make_folder, write_atomic

_SPLITS = ("train", "valid", "test")
_WORK, _KEY, _STATE = ".prepare", "key.json", "state.json"
_UNIT_CHARACTERS = 1 << 20
"""Text handed to a process at once."""
_COMMIT_SECONDS = 20.0
"""Progress is made lasting at least this often, and after every shard."""


def prepare(
    inputs: Sequence[Path | str],
    output: Path,
    settings: PrepareSettings,
    processes: int = 1,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> PrepareReport:
    """Make a data directory of text files, or finish one that was interrupted.

    Args:
        inputs: files and folders of them, addresses, `pipe:` commands (`text_files.list_inputs`).
        output: the data directory; must be new, empty, or of the same preparation.
        processes: processes that tokenise; 1 works in the calling process. Changes nothing.

    Raises:
        ConfigError: settings that cannot be meant.
        DataError: missing, damaged or empty input; text that is not UTF-8; an output folder that
            holds something else.
        ResourceError: full disk, missing permission, a killed worker.
        BusyError: another process prepares the same.
    """
    settings.check()
    reader = DocumentReader(list_inputs(inputs, output), settings.rule)
    given = None if settings.trained_kind else load_tokenizer(Path(settings.tokenizer)).fingerprint
    files = [[file.name, file.size] for file in reader.files]
    request = {"settings": settings.to_json(), "inputs": files, "tokenizer": given}
    if (output / MANIFEST_NAME).is_file() and (manifest := finished_manifest(output, request)):
        shutil.rmtree(output / _WORK, ignore_errors=True)  # left if the last act was interrupted
        return PrepareReport(output, manifest, already_whole=True)
    times = [file.changed for file in reader.files]
    with Journal(output, {**request, "times": times}) as journal:
        job = _Job(reader, output, settings, processes, journal, progress or (lambda _: None))
        report = job.run(request)
        journal.remove()
    return report


@dataclass(frozen=True)
class _Job:
    """One call of :func:`prepare` on a folder that it holds the lock of."""

    reader: DocumentReader
    output: Path
    settings: PrepareSettings
    processes: int
    journal: Journal
    show: Callable[[PrepareProgress], None]
    writers: dict[str, SplitWriter] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the input files' bytes, those that have been read."""
        return self.reader.bytes_read / max(1, self.reader.total_bytes)

    def run(self, request: dict[str, Any]) -> PrepareReport:
        settings, work = self.settings, self.journal.folder
        tokenizer = ensure_tokenizer(
            self.output / "tokenizer",
            work,
            settings,
            self.reader,
            lambda stage: self.show(PrepareProgress(stage, self.share)),
        )
        before = self.journal.load()
        dtype = token_dtype(tokenizer.special.vocab_size)
        form = ShardFormat(dtype, settings.samples_per_member, settings.members_per_shard)
        for name in _SPLITS:
            self.writers[name] = SplitWriter(self.output / name, form, before.splits.get(name))
        counts, done = self._encode(partial(encode_blocks, tokenizer, settings), before)
        totals = self._finish(counts)
        manifest = Manifest(
            task="denoise",
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.special.vocab_size,
            settings={"request": request, "counts": dict(sorted(counts.items()))},
            splits=totals,
        )
        manifest.save(self.output)
        return PrepareReport(self.output, manifest, resumed=before.position != Position(), done=done)

    def _encode(
        self, encode: Callable[[list[str]], Any], before: Progress
    ) -> tuple[Counter[str], PrepareProgress]:
        """Tokenise and write all that `before` leaves; returns the counts of everything."""
        counts = Counter(before.counts)
        already = {name: counts[name] for name in ("text_bytes", "documents")}
        start = last_commit = time.monotonic()
        progress = PrepareProgress("writing shards", 1.0)
        units = portions(self.reader.read(before.position), len, _UNIT_CHARACTERS)
        with closing(ordered_map(encode, units, self.processes)) as results:
            for (samples, counted), position in results:
                wrote = [self.writers[name].add(part) for name, part in samples.items()]
                counts.update(counted)
                now = time.monotonic()
                if any(wrote) or now - last_commit >= _COMMIT_SECONDS:
                    splits = {name: writer.state() for name, writer in self.writers.items()}
                    self.journal.commit(Progress(position, counts, splits))
                    last_commit = now
                text, documents = (counts[name] - old for name, old in already.items())
                progress = PrepareProgress("writing shards", self.share, text, documents, now - start)
                self.show(progress)
        return counts, progress

    def _finish(self, counts: Counter[str]) -> dict[str, SplitTotals]:
        if not counts["documents"]:
            places = ", ".join(file.where for file in self.reader.files[:3])
            raise DataError("the input holds no text", places, "give files that hold text")
        train, valid = self.writers["train"], self.writers["valid"]
        if self.settings.valid_share and valid.empty and (given := train.give(self.settings.valid_share)):
            # Few documents: a run needs a validation split to start.
            valid.add(given)
            counts["validation_blocks_of_training_documents"] = len(given["target"])
        found = {name: writer for name, writer in self.writers.items() if not writer.empty}
        totals = {name: writer.finish(("target",)) for name, writer in found.items()}
        if "train" not in totals:
            raise DataError(
                f"none of the {counts['documents']} documents gave training text",
                str(self.output),
                "give more documents, or smaller --valid-share and --test-share",
            )
        return totals


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
        BusyError: another preparation is at work there; DataError: an unfinished one of something else is.
    """

    def __init__(self, output: Path, key: dict[str, Any]) -> None:
        self._output, self.folder = output, output / _WORK
        self._key = json.dumps(key, sort_keys=True)
        self._lock = ExitStack()
        self._serial = 0

    def __enter__(self) -> Journal:
        with disk_faults(self._output), ExitStack() as lock:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.enter_context(folder_lock(self.folder, 0.0))
            self._take_key()
            self._lock = lock.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()
        with suppress(OSError):  # empty after `remove` alone
            self.folder.rmdir()

    def _take_key(self) -> None:
        path = self.folder / _KEY
        begun = path.read_text() if path.is_file() else ""
        same = begun == self._key or self._later_files_differ(begun)
        if not same and (self.folder / _STATE).is_file():
            raise DataError(
                "the folder holds an unfinished preparation with other settings or of other input "
                "(or the input files have changed since)",
                str(self._output),
                "start again with the same settings and input, or delete the folder, or choose another",
            )
        if not same:
            self._refuse_foreign()
        if begun != self._key:
            write_atomic(path, self._key.encode())

    def _later_files_differ(self, begun: str) -> bool:
        """Whether what has begun differs in files alone that nothing is written of, such as one that was at
        fault and is mended; a tokenizer that is trained has seen them all."""
        position = self.load().position
        try:
            keys = [json.loads(text) for text in (begun, self._key)]
            for key, name in product(keys, ("inputs", "times")):
                del key[name][position.file + 1 :]
            return position != Position() and keys[0]["tokenizer"] is not None and bool(keys[0] == keys[1])
        except (ValueError, KeyError, TypeError):
            return False

    def _refuse_foreign(self) -> None:
        """A new preparation needs an empty folder; what an earlier start left may go."""
        foreign = sorted(p.name for p in self._output.iterdir() if p.name != _WORK)
        if (self.folder / _KEY).is_file() and set(foreign) <= {"tokenizer", "train", "valid", "test"}:
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
            state = TypeAdapter(_State).validate_json((self.folder / _STATE).read_bytes())
            samples = (self.folder / state.samples).read_bytes()
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
        write_atomic(self.folder / samples_name, buffer.getvalue())
        state = _State(
            serial=self._serial,
            samples=samples_name,
            samples_sha256=fingerprint_of(buffer.getvalue()),
            position=asdict(progress.position),
            counts=dict(progress.counts),
            splits={n: _SavedSplit(s.shards, sorted(s.pending)) for n, s in progress.splits.items()},
        )
        write_atomic(self.folder / _STATE, TypeAdapter(_State).dump_json(state))
        for old in self.folder.glob("samples-*.npz*"):
            if old.name != samples_name:
                old.unlink()

    def remove(self) -> None:
        """Empty the working folder, after the data is whole; it goes with the lock, whose file NFS keeps."""
        shutil.rmtree(self.folder, ignore_errors=True)


_CORPUS = "assets/corpus/novels.txt.xz"
_VALID_SHARE = 0.03
_TOKENIZER_SAMPLE_MB = 3


def prepare_bundled_corpus(
    output: Path | None = None,
    block_tokens: int = 30,
    vocab_size: int = 2000,
    tokenizer: Path | None = None,
) -> Path:
    """Shards of the bundled novels; returns at once where they are there already.

    Several processes may call it at the same time: one builds, beside the place and renamed into it
    when whole, the others wait.

    Args:
        output: the data directory; None: `runs/data/novels-BLOCK-VOCABULARY` in the working folder, for a
            given tokenizer `novels-BLOCK-FINGERPRINT`.
        block_tokens: most tokens of a block, without bos and eos.
        vocab_size: symbols of the unigram tokenizer trained on it.
        tokenizer: folder of a given one, of a model to start from; None: one is trained.

    Returns:
        The data directory.
    """
    words = load_tokenizer(tokenizer).fingerprint[:8] if tokenizer else str(vocab_size)
    target = output or Path("runs", "data", f"novels-{block_tokens}-{words}")
    settings = PrepareSettings(
        tokenizer=str(tokenizer) if tokenizer else PrepareSettings.tokenizer,
        vocab_size=vocab_size,
        tokenizer_sample_mb=_TOKENIZER_SAMPLE_MB,
        block_tokens=block_tokens,
        valid_share=_VALID_SHARE,
    )
    corpus = resources.files("janus_ds").joinpath(_CORPUS)
    make_folder(target.parent)
    with resources.as_file(corpus) as path, _turn(target):
        if target.is_dir() and any(target.iterdir()):
            prepare([path], target, settings)  # checks that it holds just this
            return target
        building = target.with_name(f".{target.name}.building")
        prepare([path], building, settings)
        with disk_faults(target):
            building.rename(target)
    return target


@contextmanager
def _turn(target: Path) -> Iterator[None]:
    """One process at a time, by a lock file beside the target."""
    with disk_faults(target):
        lock = os.open(target.with_name(f".{target.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
