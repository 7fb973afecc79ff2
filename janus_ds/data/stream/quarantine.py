"""Damaged members met while training: who stands in for them, and the list that is kept of them.

A member carries one checksum for many samples, so it is the unit: which of its samples were hit cannot be
told. Each of them is replaced by a sample of the next whole member. The number of samples stays what the
order says, so that ranks need not speak about it.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from janus_ds.errors import DamagedDataError, DataError
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

    def shifted(self, by: int) -> Damage:
        """The same with the sample numbers of a mixture."""
        return replace(self, first_sample=self.first_sample + by)


class StandIns:
    """Which whole member stands in for each one; found out when a member is first needed.

    Args:
        members: how many there are.
        max_share: of damaged ones among them; at least one is always allowed.
    """

    def __init__(self, members: int, max_share: float) -> None:
        self._members = members
        self._most = max(1, int(max_share * members))
        self._found: dict[int, int] = {}
        self._damaged: set[int] = set()
        self._new: list[Damage] = []

    def of(self, member: int, read: Callable[[int], object], describe: Callable[[int, str], Damage]) -> int:
        """The member itself if it is whole, or else the next whole one.

        Args:
            member: its number.
            read: raises DamagedDataError for a damaged member.
            describe: makes the entry of a damaged member, from its number and what is wrong.

        Raises:
            DataError: more members are damaged than allowed.
        """
        known = self._found.get(member)
        if known is not None:
            return known
        for step in range(self._members):
            other = (member + step) % self._members
            if other not in self._damaged and self._is_whole(other, read, describe):
                self._found[member] = other
                return other
        raise DataError("no member of the data is whole", "all shards", "copy or prepare the data again")

    def take(self) -> list[Damage]:
        """Damage found since the last call."""
        found, self._new = self._new, []
        return found

    def _is_whole(
        self, member: int, read: Callable[[int], object], describe: Callable[[int, str], Damage]
    ) -> bool:
        try:
            read(member)
        except DamagedDataError as error:
            self._damaged.add(member)
            self._new.append(describe(member, error.what))
            if len(self._damaged) > self._most:
                raise DataError(
                    f"{len(self._damaged)} of {self._members} members are damaged, data.max_damage allows "
                    f"{self._most}; the last: {error.what}",
                    error.where,
                    error.fix,
                ) from error
            return False
        return True


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
