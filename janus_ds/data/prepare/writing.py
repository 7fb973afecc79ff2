"""What all preparations share: work spread over processes, the shards of a split, and the report."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from janus_ds.batch import Ragged
from janus_ds.data.stream.index import MANIFEST_NAME, Manifest, ShardEntry, SplitIndex, SplitTotals
from janus_ds.data.stream.shards import ShardFormat, shard_name, write_shard
from janus_ds.errors import DataError, ResourceError
from janus_ds.io import disk_faults

Item = TypeVar("Item")
Note = TypeVar("Note")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[tuple[Item, Note]], processes: int
) -> Generator[tuple[Result, Note], None, None]:
    """Apply `function` to the first of each pair, results in the order of the items.

    At most one item a process is under way, so memory is bounded. The processes are forked, so
    `function` need not be picklable; they end when the caller does, whatever ends it.

    Args:
        function: must not depend on state that changes.
        items: pairs of an item and a note that stays with its result.
        processes: how many; 1 applies the function here.

    Raises:
        JanusError: as raised by `function` in any process.
        ResourceError: a process was killed.
    """
    if processes <= 1:
        for item, note in items:
            yield function(item), note
        return
    workers: list[_Worker] = []
    try:
        for _ in range(processes):
            workers.append(_Worker(function, [worker.connection for worker in workers]))
        idle, busy = deque(workers), deque[tuple[_Worker, Note]]()
        for item, note in items:
            if not idle:
                worker, earlier = busy.popleft()
                yield worker.receive(), earlier
                idle.append(worker)
            idle[0].send(item)
            busy.append((idle.popleft(), note))
        for worker, earlier in busy:
            yield worker.receive(), earlier
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


def portions(
    items: Iterable[tuple[Item, Note]], size: Callable[[Item], int], limit: int
) -> Iterator[tuple[list[Item], Note]]:
    """Items in portions whose sizes sum to about `limit`, each with the note of its last item."""
    portion: list[Item] = []
    total = 0
    for item, note in items:
        portion.append(item)
        total += size(item)
        if total >= limit:
            yield portion, note
            portion, total = [], 0
    if portion:
        yield portion, note


class _Worker:
    """A forked process that applies a function to what it is sent."""

    def __init__(self, function: Callable[[Any], Any], others: list[Connection]) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        # The fork inherits the caller's ends of all pipes; it closes them, so that each pipe ends with
        # the caller and no process is left behind when the caller is killed.
        inherited = [*others, self.connection]
        self.process = context.Process(target=_serve, args=(function, theirs, inherited), daemon=True)
        self.process.start()
        theirs.close()

    def send(self, item: object) -> None:
        with self._watched():
            self.connection.send(item)

    def receive(self) -> Any:
        with self._watched():
            fine, value = self.connection.recv()
        if not fine:
            raise value
        return value

    @contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):
            self.process.join(5)
            raise ResourceError(
                f"a worker process ended (exit code {self.process.exitcode}), perhaps for want of memory",
                f"process {self.process.pid}",
                "start the same command again with fewer --processes",
            ) from None


def _serve(function: Callable[[Any], Any], connection: Connection, inherited: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process
    for other in inherited:
        other.close()
    try:
        while True:
            item = connection.recv()
            try:
                answer: Any = (True, function(item))
            except Exception as error:
                answer = (False, error)
            connection.send(answer)
    except (EOFError, OSError):
        return


@dataclass
class SplitState:
    """One split: shards on disk, and samples that wait for the next shard, by stream."""

    shards: list[ShardEntry] = field(default_factory=list)
    pending: dict[str, Ragged] = field(default_factory=dict)


class SplitWriter:
    """Writes the shards of one split; what they hold depends on the order of samples alone.

    Args:
        state: what an interrupted preparation left.
    """

    def __init__(self, directory: Path, form: ShardFormat, state: SplitState | None = None) -> None:
        state = state or SplitState()
        self._dir, self._form = directory, form
        self._shards = list(state.shards)
        self._parts = [state.pending] if state.pending else []

    @property
    def _waiting(self) -> int:
        return sum(len(next(iter(part.values()))) for part in self._parts)

    def add(self, samples: dict[str, Ragged]) -> bool:
        """Take samples in; True if a shard was written."""
        self._parts.append(samples)
        wrote = False
        while self._waiting >= self._form.samples_per_shard:
            self._write(self._form.samples_per_shard)
            wrote = True
        return wrote

    @property
    def empty(self) -> bool:
        """No sample has come yet."""
        return not self._shards and not self._waiting

    def give(self, share: float) -> dict[str, Ragged]:
        """Take away this share, at least one, of the waiting samples, from their end; a single one stays."""
        if self._waiting < 2:
            return {}
        given = max(1, round(share * self._waiting))
        kept, rest = self._divided(self._waiting - given)
        self._parts = [kept]
        return rest

    def state(self) -> SplitState:
        """Shards on disk and the samples that are not in one."""
        self._parts = [self._divided(self._waiting)[0]] if self._waiting else []
        return SplitState(list(self._shards), self._parts[0] if self._parts else {})

    def finish(self, streams: tuple[str, ...]) -> SplitTotals:
        """Write what is left and the index; returns what the manifest says of it."""
        if self._waiting:
            self._write(self._waiting)
        index = SplitIndex(self._form.stream_dtype, streams, tuple(self._shards))
        return SplitTotals(len(index.shards), index.samples, index.tokens, index.save(self._dir))

    def _divided(self, count: int) -> tuple[dict[str, Ragged], dict[str, Ragged]]:
        """The first `count` waiting samples, and the others."""
        rows = self._parts[0]
        if len(self._parts) > 1:
            rows = {name: Ragged.concatenate([part[name] for part in self._parts]) for name in rows}
        first = {name: whole.slice(0, count) for name, whole in rows.items()}
        return first, {name: whole.slice(count, len(whole)) for name, whole in rows.items()}

    def _write(self, count: int) -> None:
        first, rest = self._divided(count)
        with disk_faults(self._dir):
            self._dir.mkdir(exist_ok=True)
        members = sum(len(shard.members) for shard in self._shards)
        path = self._dir / shard_name(len(self._shards))
        self._shards.append(write_shard(path, first, self._form, members))
        self._parts = [rest]


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
