"""Bytes of a distant file: by HTTP, by a shell command, or through fsspec; broken transfers are continued.

HTTP needs nothing but the standard library; s3://, gs:// and others go through fsspec, which this module
alone imports. Pauses grow from try to try.
"""

from __future__ import annotations

import base64
import http
import http.client
import os
import random
import re
import select
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from janus_ds.config.locations import PIPE
from janus_ds.errors import MissingDependencyError

_CHUNK_BYTES = 1 << 18
_LEAST_BYTES = 4096
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_PASSING_STATUS = (408, 425, 429)
_INSTALL = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


class TransferError(Exception):
    """A transfer failed; says why without naming the address, which may hold secrets.

    Args:
        passing: another try may succeed.
        damaged: bytes came, but not the right ones.

    Attributes:
        tries: transfers one after the other that brought next to nothing.
    """

    tries = 1

    def __init__(self, reason: str, *, passing: bool = True, damaged: bool = False) -> None:
        super().__init__(reason)
        self.passing, self.damaged = passing, damaged


@dataclass(frozen=True)
class Patience:
    """How long to go on after faults.

    Args:
        retries: further tries after one that brought nothing new, or damaged bytes.
        stall_seconds: how long a transfer may bring nothing.
    """

    retries: int = 5
    stall_seconds: float = 60.0
    sleep: Callable[[float], None] = time.sleep

    def pause(self, attempt: int) -> None:
        """Wait before try number `attempt` (from 1): twice as long each time, and never all at once."""
        longest = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (attempt - 1))
        self.sleep(longest * random.uniform(0.5, 1.0))


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it comes: its size or the most it may have, and its SHA-256."""

    size: int | None = None
    sha256: str | None = None
    most: int = 1 << 40

    def too_large(self) -> TransferError:
        """More came than that."""
        if self.size is None:
            return TransferError(f"the file has more than {self.most:,} bytes", passing=False)
        return TransferError(f"more came than the {self.size:,} bytes that the index says", damaged=True)


def transferred(
    location: str, patience: Patience, expected: Expected, at: int = 0
) -> Generator[bytes, None, None]:
    """The bytes of a file from position `at` on; a transfer that breaks off is continued.

    Args:
        location: an address, or a command after `pipe:`.
        expected: what is known of the file.

    Raises:
        TransferError: it cannot be brought; damage is not tried again.
        MissingDependencyError: a package for this kind of address is not installed.
    """
    tries, most = 0, expected.most if expected.size is None else expected.size
    version: tuple[int | None, str] | None = None
    while True:
        begun = at
        try:
            with _opened(location, at, patience.stall_seconds) as transfer:
                total = transfer.total
                told = (total, transfer.version)
                version = (version if at else None) or told
                # What is streamed whole may have no size, while its rest has one.
                changed = any(old and new and old != new for old, new in zip(version, told, strict=True))
                if changed and expected.sha256 is None:
                    raise TransferError("the file there has changed while it came", damaged=True)
                if expected.size is not None and total not in (None, expected.size):
                    reason = f"the file there has {total:,} bytes, the index says {expected.size:,}"
                    raise TransferError(reason, damaged=True)
                if total is not None and total > most:
                    raise expected.too_large()
                # Where the other side begins anew: pass over what is here already.
                skip = at - transfer.start
                for chunk in _steady(transfer.chunks, patience.stall_seconds):
                    kept, skip = chunk[skip:], max(0, skip - len(chunk))
                    if (at := at + len(kept)) > most:
                        raise expected.too_large()
                    yield kept
                total = expected.size if total is None else total
                if total is not None and at < total:
                    raise TransferError(f"the transfer ended after {at:,} of {total:,} bytes")
                if skip:
                    raise TransferError("less came than at the try before: it has changed", damaged=True)
                return
        except TransferError as fault:
            # A transfer that is cut again and again but goes on is no failure.
            tries = 0 if at - begun >= _CHUNK_BYTES else tries + 1
            if fault.damaged or not fault.passing or tries > patience.retries:
                fault.tries = tries
                raise
        patience.pause(max(tries, 1))


def _steady(chunks: Iterator[bytes], stall_seconds: float) -> Iterator[bytes]:
    """The chunks, until fewer than `_LEAST_BYTES` come in `stall_seconds`: a drip is a stall too.

    What the reader takes between two chunks does not count.
    """
    waited, came, since = 0.0, 0, time.monotonic()
    for chunk in chunks:
        waited, came = waited + time.monotonic() - since, came + len(chunk)
        if came >= _LEAST_BYTES:
            waited, came = 0.0, 0
        elif waited > stall_seconds:
            raise TransferError("the transfer stalled: next to nothing came")
        yield chunk
        since = time.monotonic()


@dataclass
class _Transfer:
    """A file on its way.

    Attributes:
        start: where its first byte belongs: what was asked for, or 0 where that is not possible.
        total: bytes of the whole file, where the other side says so.
        version: what the other side calls this state of the file; "" where it does not.
        chunks: the bytes, never empty; raises TransferError.
    """

    start: int
    total: int | None
    version: str
    chunks: Iterator[bytes]


def _opened(location: str, start: int, stall_seconds: float) -> AbstractContextManager[_Transfer]:
    if location.startswith(PIPE):
        return _pipe(location.removeprefix(PIPE), stall_seconds)
    over_http = location.startswith(("http://", "https://"))
    return _pumped(
        _http(location, start, stall_seconds) if over_http else _fsspec(location, start), stall_seconds
    )


@contextmanager
def _pumped(items: Iterator[Any], stall_seconds: float) -> Iterator[_Transfer]:
    """A transfer read in a thread of its own: whatever blocks in it, the reader waits `stall_seconds` only.

    Args:
        items: (start, total, version), then the chunks.
    """
    stop = threading.Event()
    arrived: Queue[Any] = Queue(2)

    def offer(item: object) -> bool:
        while not stop.is_set():
            try:
                arrived.put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False

    def run() -> None:
        try:
            if all(map(offer, items)):
                offer(b"")
        except Exception as error:
            offer(error)

    def take() -> Any:
        try:
            item = arrived.get(timeout=stall_seconds)
        except Empty:
            raise TransferError("the transfer stalled") from None
        if isinstance(item, Exception):
            raise item
        return item

    threading.Thread(target=run, daemon=True).start()
    try:
        start, total, version = take()
        yield _Transfer(start, total, version, iter(take, b""))
    finally:
        stop.set()


def _http(address: str, start: int, stall_seconds: float) -> Iterator[Any]:
    try:
        with urllib.request.urlopen(_request(address, start), timeout=stall_seconds) as response:
            resumed = response.status == 206
            length = response.headers.get("Content-Length") or ""
            total = int(length) + (start if resumed else 0) if _LENGTH.fullmatch(length) else None
            version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            # A proxy that packs the whole, and not its parts, calls the mark weak.
            yield (start if resumed else 0), total, version.removeprefix("W/")
            while chunk := response.read1(_CHUNK_BYTES):
                yield chunk
    except urllib.error.HTTPError as error:
        with error:
            shorter = error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
            raise TransferError(
                f"HTTP status {error.code}",
                passing=error.code >= 500 or error.code in _PASSING_STATUS or shorter,
                damaged=shorter,
            ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise TransferError("the transfer stalled") from None
        # Texts of other errors can quote the address.
        what = (isinstance(cause, OSError) and cause.strerror) or type(cause).__name__
        passing = isinstance(cause, OSError) or not isinstance(cause, ValueError | http.client.InvalidURL)
        raise TransferError(f"the connection failed ({what})", passing=passing) from None


def _request(address: str, start: int) -> urllib.request.Request:
    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    # As browsers do: letters and spaces that no address may have are encoded, what is encoded stays.
    path, query = (quote(part, safe="!#$%&'()*+,/:;=?@[]~") for part in (parts.path, parts.query))
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host, path=path, query=query)))
    if at:
        secret = base64.b64encode(unquote(user).encode()).decode()
        # Unredirected: another host must not get the password.
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    return request


@contextmanager
def _pipe(command: str, stall_seconds: float) -> Iterator[_Transfer]:
    # What the command says of its faults may hold secrets, so it is not shown. Its own session, so that
    # what the shell started ends with it.
    process = subprocess.Popen(
        command,
        shell=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield _Transfer(0, None, "", _pipe_chunks(process, stall_seconds))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def _pipe_chunks(process: subprocess.Popen[bytes], stall_seconds: float) -> Iterator[bytes]:
    output = process.stdout.fileno() if process.stdout else -1
    while True:
        if not select.select([output], [], [], stall_seconds)[0]:
            raise TransferError("the command stalled")
        chunk = os.read(output, _CHUNK_BYTES)
        if not chunk:
            break
        yield chunk
    if code := process.wait():
        raise TransferError(f"the command ended with status {code}; run it by hand to see why")


def _fsspec(address: str, start: int) -> Iterator[Any]:
    scheme = address.split("://")[0]
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(address)
        with system.open(path, "rb") as file:
            size = getattr(file, "size", None)
            yield start, None if size is None else int(size), ""
            file.seek(start)
            while chunk := file.read(_CHUNK_BYTES):
                yield bytes(chunk)
    except FileNotFoundError:
        raise TransferError("there is no such file", passing=False) from None
    except PermissionError:
        raise TransferError("access is refused", passing=False) from None
    except (ImportError, ValueError):
        raise MissingDependencyError(
            f"this installation cannot read {scheme}:// addresses",
            f"fsspec and its package for {scheme}",
            f"pip install {_INSTALL.get(scheme, 'its package')}, or: pip install 'janus_ds[remote]'",
        ) from None
    except Exception as error:
        # The text of such an error can quote the address or its credentials.
        raise TransferError(f"reading failed ({type(error).__name__})") from None
