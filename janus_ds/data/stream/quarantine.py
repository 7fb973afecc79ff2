"""Damaged members met while training, and the list that is kept of them.

A member carries one checksum for many samples, so it is the unit: which of its samples were hit cannot be
told. Each of them is replaced by a sample of the next whole member. The number of samples stays what the
order says, so that ranks need not speak about it.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from janus_ds.io import disk_faults

QUARANTINE_NAME = "quarantine.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damage:
    """A damaged member.

    Attributes:
        shard: path or address of its shard.
        member: its key.
        first_sample: number of its first sample; the others follow.
        samples: how many are left out.
        reason: what is wrong with it.
    """

    shard: str
    member: str
    first_sample: int
    samples: int
    reason: str


class QuarantineList:
    """RUN/quarantine.jsonl: one line for each damaged member, whichever process met it first.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / QUARANTINE_NAME

    def add(self, found: Iterable[Damage], step: int | None = None) -> None:
        """Append what is not in the list yet; safe between processes.

        Args:
            found: damaged members.
            step: the update for which they were read; None: validation.

        Raises:
            ResourceError: the file cannot be written.
        """
        entries = list(found)
        if not entries:
            return
        with disk_faults(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+", encoding="utf-8", errors="replace") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                known = {_place(line) for line in file}
                for entry in entries:
                    values = {**asdict(entry), "step": step}
                    if (entry.shard, entry.member) in known:
                        continue
                    known.add((entry.shard, entry.member))
                    file.write(json.dumps(values) + "\n")
                    last = entry.first_sample + entry.samples - 1
                    logger.warning(
                        "quarantined: samples %d to %d (%s, member %s): %s",
                        *(entry.first_sample, last, entry.shard, entry.member, entry.reason),
                    )


def _place(line: str) -> tuple[str, str] | None:
    """Shard and member of a line; None where it is damaged or cut short."""
    try:
        values = json.loads(line)
        return str(values["shard"]), str(values["member"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
