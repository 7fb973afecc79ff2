"""From text files to a data directory, once over the input, in constant memory, resumable.

Documents are read in order by the calling process, tokenised and cut into blocks by any number of
processes, and written in order again, so that the bytes depend on settings and input alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from janus_ds.data.prepare.blocks import BlockEncoder, ensure_tokenizer, read_units
from janus_ds.data.prepare.journal import (
    WORK_NAME,
    Journal,
    PrepareProgress,
    PrepareReport,
    Progress,
    SplitState,
    SplitWriter,
    finished_manifest,
)
from janus_ds.data.prepare.pool import ordered_map
from janus_ds.data.prepare.settings import Execution, PrepareSettings
from janus_ds.data.stream.index import MANIFEST_NAME, Manifest, SplitTotals
from janus_ds.data.stream.shards import ShardFormat, token_dtype
from janus_ds.data.text.documents import DocumentReader, Position
from janus_ds.data.text.text_files import list_inputs
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.errors import DataError
from janus_ds.io import disk_faults

_SPLIT_ORDER = ("train", "valid", "test")


def prepare(
    inputs: Sequence[Path | str],
    output: Path,
    settings: PrepareSettings,
    execution: Execution | None = None,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> PrepareReport:
    """Make a data directory of text files, or finish one that was interrupted.

    Args:
        inputs: files and folders of them, addresses, `pipe:` commands (`text_files.list_inputs`).
        output: the data directory; must be new, empty, or of the same preparation.

    Raises:
        ConfigError: settings that cannot be meant.
        DataError: missing, damaged or empty input; text that is not UTF-8; an output folder that
            holds something else.
        ResourceError: full disk, missing permission, a killed worker.
    """
    settings.check()
    reader = DocumentReader(list_inputs(inputs), settings.rule)
    request = _request(reader, settings)
    if (output / MANIFEST_NAME).is_file() and (manifest := finished_manifest(output, request)):
        shutil.rmtree(output / WORK_NAME, ignore_errors=True)  # left if the last act was interrupted
        return PrepareReport(output, manifest, already_whole=True)
    times = [file.changed for file in reader.files]
    with Journal(output, {**request, "times": times}) as journal:
        job = _Job(reader, output, settings, execution or Execution(), journal)
        report = job.run(request, progress or (lambda _: None))
        journal.remove()
    return report


def _request(reader: DocumentReader, settings: PrepareSettings) -> dict[str, Any]:
    """What decides the result, as JSON: settings, input files, a given tokenizer's fingerprint."""
    given = settings.trained_kind is None
    return {
        "settings": settings.to_json(),
        "inputs": [[file.name, file.size] for file in reader.files],
        "tokenizer": load_tokenizer(Path(settings.tokenizer)).fingerprint if given else None,
    }


@dataclass(frozen=True)
class _Job:
    """One call of :func:`prepare` on a folder that it holds the lock of."""

    reader: DocumentReader
    output: Path
    settings: PrepareSettings
    execution: Execution
    journal: Journal
    writers: dict[str, SplitWriter] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the input files' bytes, those that have been read."""
        return self.reader.bytes_read / max(1, self.reader.total_bytes)

    def run(self, request: dict[str, Any], show: Callable[[PrepareProgress], None]) -> PrepareReport:
        def told(stage: str) -> None:
            show(PrepareProgress(stage, self.share))

        folder, settings = self.output / "tokenizer", self.settings
        tokenizer = ensure_tokenizer(folder, self.journal.folder, settings, self.reader, told)
        encoder = BlockEncoder(tokenizer, settings)
        before = self.journal.load()
        dtype = token_dtype(tokenizer.special.vocab_size)
        form = ShardFormat(dtype, settings.samples_per_member, settings.members_per_shard)
        for name in _SPLIT_ORDER:
            left = before.splits.get(name, SplitState())
            self.writers[name] = SplitWriter(self.output / name, form, left)
        counts, done = self._encode(encoder, before, show)
        totals = self._finish(encoder, counts)
        manifest = Manifest(
            task=encoder.task,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.special.vocab_size,
            settings={"request": request, "counts": dict(sorted(counts.items()))},
            splits=totals,
        )
        manifest.save(self.output)
        resumed = before.position != Position()
        return PrepareReport(self.output, manifest, resumed=resumed, done=done)

    def _encode(
        self, encoder: BlockEncoder, before: Progress, show: Callable[[PrepareProgress], None]
    ) -> tuple[Counter[str], PrepareProgress]:
        """Tokenise and write all that `before` leaves; returns the counts of everything."""
        counts = Counter(before.counts)
        already = (counts["text_bytes"], counts["documents"])
        start = last_commit = time.monotonic()
        progress = PrepareProgress("writing shards", 1.0)
        units = read_units(self.reader, before.position, self.execution.unit_characters)
        with closing(ordered_map(encoder, units, self.execution.processes)) as results:
            for result, position in results:
                wrote = [self.writers[name].add(part) for name, part in result.samples.items()]
                counts.update(result.counts)
                now = time.monotonic()
                if any(wrote) or now - last_commit >= self.execution.commit_seconds:
                    splits = {name: writer.state() for name, writer in self.writers.items()}
                    self.journal.commit(Progress(position, counts, splits))
                    last_commit = now
                progress = PrepareProgress(
                    "writing shards",
                    self.share,
                    counts["text_bytes"] - already[0],
                    counts["documents"] - already[1],
                    now - start,
                )
                show(progress)
        return counts, progress

    def _finish(self, encoder: BlockEncoder, counts: Counter[str]) -> dict[str, SplitTotals]:
        if not counts["documents"]:
            places = ", ".join(file.where for file in self.reader.files[:3])
            raise DataError("the input holds no text", places, "give files that hold text")
        train, valid = self.writers["train"], self.writers["valid"]
        if self.settings.valid_share and valid.empty and (given := train.give(self.settings.valid_share)):
            # Few documents: a run needs a validation split to start.
            valid.add(given)
            counts["validation_blocks_of_training_documents"] = len(given["target"])
        totals = {}
        for name in _SPLIT_ORDER:
            if self.writers[name].empty:
                continue
            totals[name] = self.writers[name].finish(encoder.streams)
        if "train" not in totals:
            raise DataError(
                f"none of the {counts['documents']} documents gave training text",
                str(self.output),
                "give more documents, or smaller --valid-share and --test-share",
            )
        return totals


_CORPUS = "assets/corpus/novels.txt.xz"

_VALID_SHARE = 0.03

_TOKENIZER_SAMPLE_MB = 3


def prepare_bundled_corpus(
    output: Path | None = None,
    block_tokens: int = 30,
    vocab_size: int = 2000,
    progress: Callable[[PrepareProgress], None] | None = None,
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
    with disk_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with resources.as_file(corpus) as path, _turn(target):
        if (target / MANIFEST_NAME).is_file():
            prepare([path], target, settings)  # checks that it holds just this
            return target
        building = target.with_name(f".{target.name}.building")
        prepare([path], building, settings, progress=progress)
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
