"""Fetches the shards that will be needed next, beside the process that needs them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from janus_ds.data.index import ShardEntry
from janus_ds.errors import JanusError

__all__ = ["ReadAhead"]

logger = logging.getLogger(__name__)


class _Shards(Protocol):
    def fetch(self, shard: ShardEntry) -> None: ...


class ReadAhead:
    """One background thread a process, started when first needed; may be pickled and forked.

    Faults are left to the reader, who meets them with the same shard and reports them.

    Args:
        shards: fetches.
    """

    def __init__(self, shards: _Shards) -> None:
        self._shards = shards
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._wishes: list[ShardEntry] = []
        self._asked: list[str] = []

    def want(self, shards: Sequence[ShardEntry]) -> None:
        """Fetch these, the first first, and forget earlier wishes."""
        if self._process != os.getpid():
            self._restart()
        with self._changed:
            if [shard.name for shard in shards] == self._asked:
                return
            self._asked = [shard.name for shard in shards]
            self._wishes = list(shards)
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
                self._thread.start()

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadAhead, (self._shards,)

    def _restart(self) -> None:
        """After a fork neither thread nor lock are what they were."""
        self._process = os.getpid()
        self._changed, self._thread = threading.Condition(), None
        self._wishes, self._asked = [], []

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._wishes:
                    self._changed.wait()
                shard = self._wishes.pop(0)
            try:
                self._shards.fetch(shard)
            except JanusError as error:
                logger.debug("reading ahead: %s", error)
