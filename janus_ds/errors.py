"""The errors a user can cause or meet, each in three parts, and the exit code of each.

An error says what happened, where (file, key, shard, step, rank) and what to do. Programs print it
without a stack trace and exit with the class's code; `launch/*.py` and `eval/*.py` do so through
:func:`exit_on_error`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import select
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self

PREEMPTED_EXIT_CODE = 75
"""Exit code of a run that was asked to stop, has saved, and wants to be started again."""

STALLED_EXIT_CODE = 76
"""Exit code of a run in which no rank made progress; it wants to be started again as well."""


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def shown(text: str) -> str:
    """Text whose control characters stand as `\\x1b`, so that names and texts from outside do nothing to a
    terminal."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class PlainFormatter(logging.Formatter):
    """Log lines without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; its own line ends stay."""
        return shown(super().format(record))


class JanusError(Exception):
    """A fault that a user can understand and mend.

    Args:
        what: what happened, one sentence.
        where: the file, key, shard, step or rank concerned.
        fix: what to do about it.
    """

    exit_code: ClassVar[int] = 1
    local: bool = False
    """One rank alone meets it, and says so itself, while the others may wait for it in a collective."""

    def __init__(self, what: str, where: str, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def of_this_rank(self) -> Self:
        """The same error, as :attr:`local`."""
        self.local = True
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # Ranks send each other their errors; a subclass may take other arguments than this class.
        return _restored, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        return shown(f"error: {self.what}\n  where: {self.where}\n  to do: {self.fix}")


def _restored(kind: type[JanusError], args: tuple[Any, ...], values: dict[str, Any]) -> JanusError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(values)
    return error


class UsageError(JanusError):
    """A command line that asks for something that does not exist."""

    exit_code = 2


class ConfigError(JanusError):
    """A fault in a recipe, a DeepSpeed file or an override."""

    exit_code = 3


class DataError(JanusError):
    """Missing, damaged or unfit data."""

    exit_code = 4


class DamagedDataError(DataError):
    """Bytes of a shard are missing or are not those that were written."""


class CheckpointError(JanusError):
    """A checkpoint that is missing, damaged, or made for something else."""

    exit_code = 5


class TrainingError(JanusError):
    """Training cannot go on: losses or gradients that are not finite, or a rank that is lost."""

    exit_code = 6


class ResourceError(JanusError):
    """Disk, memory or permission ran out."""

    exit_code = 7


class MissingDependencyError(JanusError):
    """Something that must be installed or set on this machine is not."""

    exit_code = 8


class BusyError(JanusError):
    """Another process works in the folder."""

    exit_code = 9


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most likely means, or None."""
    # Few programs end with a misspelt name, and all import this file.
    import difflib

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


def outlive_standard_error() -> None:
    """From now on nothing ends because it cannot be said, as on a full disk or a terminal that is gone."""

    def quiet(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with contextlib.suppress(OSError):
                return method(*arguments)

        return call

    if sys.stderr is not None:
        # Python itself flushes at exit, and would make another exit code of a fault in it.
        for name in ("write", "flush"):
            setattr(sys.stderr, name, quiet(getattr(sys.stderr, name)))


def exit_on_error(main: Callable[[], int | None]) -> None:
    """Run `main` and leave the process with its exit code.

    A :class:`JanusError` is printed to standard error without a stack trace, as is standard output on a full
    disk; any other exception keeps its stack, since it is a fault of ours. A reader of standard output that
    has seen enough (`... | head`) is no fault. Standard output and warnings are as :func:`shown`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Text from outside must not end a program because a terminal cannot show it.
        sys.stdout.reconfigure(errors="backslashreplace")
        write = sys.stdout.write
        sys.stdout.write = lambda text: write(shown(text))  # type: ignore[method-assign]
    outlive_standard_error()
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(PlainFormatter())
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except JanusError as error:
        print(error, file=sys.stderr, flush=True)
        code = error.exit_code
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            code = 0
        elif error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            fix = "raise the limit (ulimit -f)" if error.errno == errno.EFBIG else "free some space"
            what = f"the output cannot be written ({error.strerror})"
            fault = ResourceError(what, "standard output", fix)
            print(fault, file=sys.stderr, flush=True)
            code = fault.exit_code
        elif error.filename is not None and error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
            what = f"the path cannot be used ({error.strerror})"
            fix = "give another path, or change its permissions"
            print(UsageError(what, str(error.filename), fix), file=sys.stderr, flush=True)
            sys.exit(UsageError.exit_code)
        else:
            raise
        # What is still buffered goes nowhere, without a second complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("stopped from the keyboard", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code or 0)


def _reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))
