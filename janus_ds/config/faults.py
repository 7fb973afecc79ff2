"""Faults of a configuration: collected one by one, reported all together.

A user with three mistakes in a recipe should read about three mistakes, not about the first one
three times. Readers add what they find to a :class:`FaultList` and go on with a default value;
:meth:`FaultList.raise_if_any` then reports everything in one :class:`ConfigFaultsError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from janus_ds.config.locations import packaged_names
from janus_ds.errors import ConfigError

_MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Fault:
    """One mistake: what it is, where it stands (file and key), what to do about it."""

    what: str
    where: str
    fix: str


class ConfigFaultsError(ConfigError):
    """All mistakes of a configuration in one error; `faults` holds them one by one."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        if len(self.faults) == 1:
            only = self.faults[0]
            super().__init__(only.what, only.where, only.fix)
            return
        lines = [
            f"\n  {number}. {fault.what}\n       where: {fault.where}\n       to do: {fault.fix}"
            for number, fault in enumerate(self.faults, start=1)
        ]
        super().__init__(
            f"{len(self.faults)} faults in the configuration:{''.join(lines)}",
            ", ".join(dict.fromkeys(f.where.partition(": ")[0] for f in self.faults)),
            "mend them all, then run `janus-ds check` again",
        )


@dataclass
class FaultList:
    """Collects faults, and remembers which keys are spoilt.

    A rule over several keys says nothing of use once one of them could not be read, so faults
    that depend on a spoilt key are left out.
    """

    faults: list[Fault] = field(default_factory=list)
    spoilt: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    """What is no fault, but not as it was written either."""

    def add(self, what: str, where: str, fix: str, keys: Iterable[str] = ()) -> None:
        """Add a fault, unless one of the keys that it speaks of is spoilt already."""
        keys = tuple(keys)
        if not self.spoilt.isdisjoint(keys):
            return
        self.faults.append(Fault(what, where, fix))
        self.spoilt.update(keys)

    def raise_if_any(self) -> None:
        """Report everything found so far.

        Raises:
            ConfigFaultsError: something was found.
        """
        if self.faults:
            raise ConfigFaultsError(self.faults)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most likely means, or None."""
    candidates = list(known)
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if matches:
        return matches[0]
    # `lr` for `optim.lr`: the right name without its section.
    ends = [key for key in candidates if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return ends[0] if ends else None


def suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    """The `to do` of an unknown name: its nearest known name, or else a way to find the right one."""
    near = nearest(name, known)
    return f"did you mean {near!r}? ({otherwise})" if near else otherwise


def read_text(path: Path, what: str, example: str, faults: FaultList) -> str | None:
    """The text of a file of settings, a byte-order mark included; None with a fault.

    Args:
        what: what messages call it.
        example: a path of such a file; names of neighbours with its ending are suggested.
    """
    if path.is_fifo() and Path("/dev") not in path.parents:
        # To open it would wait for a writer, deaf to signals. A shell's <(COMMAND) is one of /dev/fd.
        faults.add(f"{what} is a named pipe, which is not read", str(path), f"give the path of {example}")
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            faults.add(f"{what} is larger than {_MOST_BYTES:,} bytes", str(path), f"give {example}")
            return None
        if b"\0" not in data:
            return data.decode("utf-8")
        faults.add(f"{what} is not UTF-8 text: it has NUL bytes, as UTF-16", str(path), "save it as UTF-8")
    except OSError as error:
        suffix = Path(example).suffix
        if path.suffix or len(path.parts) > 1:
            names, fix = [p.name for p in path.parent.glob(f"*{suffix}")], f"give the path of {example}"
        else:
            names = packaged_names(suffix)
            fix = f"give a path, or one of the names {', '.join(names)}"
        fix = suggestion(path.name, names, fix)
        faults.add(f"{what} cannot be read: {error.strerror}", str(path), fix)
    except UnicodeDecodeError as error:
        faults.add(f"{what} is not UTF-8 text: {error.reason}", str(path), "save it as UTF-8")
    return None
