"""The processes of a training run that was started by a launcher, found by their run folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def find_ranks(run: Path) -> dict[int, int]:
    """Rank -> process of the ranks that train into `run`, without launchers and data workers."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _trains(int(entry.name), run):
            rank = _rank(int(entry.name))
            if rank is not None and not _trains(parent(int(entry.name)), run, rank):
                found[rank] = int(entry.name)
    return found


def alive(run: Path) -> list[int]:
    """Every process with the run folder on its command line: launchers, ranks, data workers."""
    return [int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit() and str(run) in _words(e.name)]


def in_session(leader: int) -> list[int]:
    """The processes of a session that have not ended, whoever their parents are."""
    found = [int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit()]
    return [pid for pid in found if lives(pid) and int((_stat(pid) or "0000")[3]) == leader]


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for does not."""
    stat = _stat(pid)
    return bool(stat) and stat[0] not in "ZX"


def resident(pid: int) -> int:
    """Bytes of a process that lie in memory, as VmRSS; 0 if there is no such process."""
    return 1024 * int(_status(pid, "VmRSS") or 0)


def takes(pid: int, number: int, field: str = "SigCgt") -> bool:
    """Whether a process has a handler for a signal, or ignores it (SigIgn)."""
    return bool(int(_status(pid, field) or "0", 16) >> (number - 1) & 1)


def halted(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP."""
    return _stat(pid)[:1] == ["T"]


def variables(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    words = _read(pid, "environ").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def parent(pid: int) -> int:
    """The parent of a process; 0 if there is no such process."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def wait_until(condition: Callable[[], bool], patience: float, what: str) -> float:
    """Wait until the condition holds; returns the seconds that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < patience, f"not within {patience:.0f} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - begin


def _trains(pid: int, run: Path, rank: int | None = None) -> bool:
    words = _words(pid)
    return (
        str(run) in words
        and Path(words[0]).name.startswith("python")
        and _rank(pid) is not None
        and rank in (None, _rank(pid))
    )


def _rank(pid: int) -> int | None:
    found = variables(pid)
    number = found.get("RANK", found.get("SLURM_PROCID") if "SLURM_STEP_ID" in found else None)
    return None if number is None else int(number)


def _stat(pid: int) -> list[str]:
    """State, parent, process group, session and so on; empty if there is no such process."""
    return _read(pid, "stat").rpartition(")")[2].split()


def _status(pid: int, field: str) -> str:
    """The first word of a field; empty if there is no such process."""
    return "".join(_read(pid, "status").partition(f"\n{field}:")[2].split(maxsplit=1)[:1])


def _words(pid: int | str) -> list[str]:
    return _read(pid, "cmdline").split("\0")


def _read(pid: int | str, name: str) -> str:
    try:
        return (Path("/proc") / str(pid) / name).read_bytes().decode(errors="replace")
    except OSError:
        return ""
