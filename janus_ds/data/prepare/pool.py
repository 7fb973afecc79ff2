"""Work spread over processes with the results in order: the output does not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from janus_ds.errors import JanusError, ResourceError

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
            workers.append(_start(function, [worker.connection for worker in workers]))
        under_way: deque[tuple[_Worker, Note]] = deque()
        for item, note in items:
            if len(under_way) == processes:
                worker, earlier = under_way.popleft()
                yield _receive(worker), earlier
            else:
                worker = workers[len(under_way)]
            _send(worker, item)
            under_way.append((worker, note))
        for worker, earlier in under_way:
            yield _receive(worker), earlier
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.terminate()
            worker.process.join()


@dataclass(frozen=True)
class _Worker:
    process: Any
    connection: Connection


def _start(function: Callable[[Any], Any], others: list[Connection]) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    # The fork inherits the caller's ends of all pipes; it closes them, so that each pipe ends with
    # the caller and no process is left behind when the caller is killed.
    inherited = [*others, ours]
    process = context.Process(target=_serve, args=(function, theirs, inherited), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(function: Callable[[Any], Any], connection: Connection, inherited: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends us
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core a process
    for other in inherited:
        other.close()
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer: Any = (True, function(item))
        except Exception as error:
            answer = (False, error)
        try:
            connection.send(answer)
        except OSError:
            return


def _send(worker: _Worker, item: object) -> None:
    try:
        worker.connection.send(item)
    except OSError:
        raise _lost(worker) from None


def _receive(worker: _Worker) -> Any:
    try:
        fine, value = worker.connection.recv()
    except (EOFError, OSError):
        raise _lost(worker) from None
    if not fine:
        raise value
    return value


def _lost(worker: _Worker) -> JanusError:
    worker.process.join(5)
    return ResourceError(
        f"a worker process ended (exit code {worker.process.exitcode}), perhaps for want of memory",
        f"process {worker.process.pid}",
        "start the same command again with fewer --processes; it goes on where it stopped",
    )
