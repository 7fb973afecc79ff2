"""Bytes of a distant file from a position on: by HTTP, by a shell command, or through fsspec.

HTTP needs nothing but the standard library; s3://, gs:// and others go through fsspec, which this module
alone imports. A transfer that brings nothing for a while is ended here; tries and pauses are `fetch`'s.
"""

from __future__ import annotations

import base64
import http
import http.client
import os
import re
import select
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from janus_ds.config.locations import PIPE
from janus_ds.errors import MissingDependencyError

CHUNK_BYTES = 1 << 18

_LENGTH = re.compile(r"[0-9]{1,18}", re.ASCII)
_PASSING_STATUS = (408, 425, 429)

_INSTALL = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


class TransferError(Exception):
    """A transfer failed; says why without naming the address, which may hold secrets.

    Args:
        passing: another try may succeed.
        missing: there is no such file.
        damaged: bytes came, but not the right ones.
    """

    def __init__(
        self, reason: str, *, passing: bool = True, missing: bool = False, damaged: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason, self.passing, self.missing, self.damaged = reason, passing, missing, damaged


@dataclass
class Transfer:
    """A file on its way.

    Attributes:
        start: where its first byte belongs: what was asked for, or 0 where that is not possible.
        total: bytes of the whole file, where the other side says so.
        chunks: the bytes, never empty; raises TransferError.
    """

    start: int
    total: int | None
    chunks: Iterator[bytes]


@contextmanager
def open_transfer(location: str, start: int, stall_seconds: float) -> Iterator[Transfer]:
    """Begin to read a file.

    Args:
        location: an address, or a command after `pipe:`.
        stall_seconds: how long nothing may come.

    Raises:
        TransferError: it cannot be opened; also from the chunks.
        MissingDependencyError: a package for this kind of address is not installed.
    """
    opened: AbstractContextManager[Transfer]
    if location.startswith(PIPE):
        opened = _pipe(location.removeprefix(PIPE), stall_seconds)
    elif location.startswith(("http://", "https://")):
        opened = _http(location, start, stall_seconds)
    else:
        opened = _fsspec(location, start, stall_seconds)
    with opened as transfer:
        yield transfer


_Put = Callable[[Any], None]


class _StoppedError(Exception):
    """The reader of a transfer has gone."""


@contextmanager
def _pumped(produce: Callable[[_Put], None], stall_seconds: float) -> Iterator[Transfer]:
    """A transfer read in a thread of its own: whatever blocks in it, the reader waits `stall_seconds` only.

    Args:
        produce: hands over (start, total), then the chunks; raises TransferError.
        stall_seconds: how long nothing may come.
    """
    stop = threading.Event()
    arrived: Queue[Any] = Queue(2)

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return arrived.put(item, timeout=0.2)
            except Full:
                continue
        raise _StoppedError

    def run() -> None:
        with suppress(_StoppedError):
            try:
                produce(put)
                put(b"")
            except _StoppedError:
                raise
            except Exception as error:
                put(error)

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
        start, total = take()
        yield Transfer(start, total, iter(take, b""))
    finally:
        stop.set()


# HTTP


def _http(address: str, start: int, stall_seconds: float) -> AbstractContextManager[Transfer]:
    def produce(put: _Put) -> None:
        try:
            with urllib.request.urlopen(_request(address, start), timeout=stall_seconds) as response:
                resumed = response.status == 206
                length = response.headers.get("Content-Length") or ""
                total = int(length) + (start if resumed else 0) if _LENGTH.fullmatch(length) else None
                put((start if resumed else 0, total))
                while chunk := response.read1(CHUNK_BYTES):
                    put(chunk)
        except urllib.error.HTTPError as error:
            with error:
                shorter = error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
                raise TransferError(
                    f"HTTP status {error.code}",
                    passing=error.code >= 500 or error.code in _PASSING_STATUS or shorter,
                    missing=error.code in (404, 410),
                    damaged=shorter,
                ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _connection_fault(error) from None

    return _pumped(produce, stall_seconds)


def _request(address: str, start: int) -> urllib.request.Request:
    parts = urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)))
    if at:
        secret = base64.b64encode(unquote(user).encode()).decode()
        # Unredirected: another host must not get the password.
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    if start:
        request.add_header("Range", f"bytes={start}-")
    return request


def _connection_fault(error: Exception) -> TransferError:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return TransferError("the transfer stalled")
    if isinstance(cause, OSError):
        return TransferError(f"the connection failed ({cause.strerror or type(cause).__name__})")
    # Texts of other errors can quote the address.
    passing = not isinstance(cause, ValueError | http.client.InvalidURL)
    return TransferError(f"the connection failed ({type(cause).__name__})", passing=passing)


# Commands


@contextmanager
def _pipe(command: str, stall_seconds: float) -> Iterator[Transfer]:
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
        yield Transfer(0, None, _pipe_chunks(process, stall_seconds))
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
        chunk = os.read(output, CHUNK_BYTES)
        if not chunk:
            break
        yield chunk
    code = process.wait()
    if code:
        raise TransferError(f"the command ended with status {code}; run it by hand to see why")


# fsspec


def _fsspec(address: str, start: int, stall_seconds: float) -> AbstractContextManager[Transfer]:
    def produce(put: _Put) -> None:
        try:
            from fsspec.core import url_to_fs

            system, path = url_to_fs(address)
            with system.open(path, "rb") as file:
                size = getattr(file, "size", None)
                put((start, None if size is None else int(size)))
                file.seek(start)
                while chunk := file.read(CHUNK_BYTES):
                    put(bytes(chunk))
        except _StoppedError:
            raise
        except Exception as error:
            raise _fsspec_fault(error, address.split("://")[0]) from None

    return _pumped(produce, stall_seconds)


def _fsspec_fault(error: Exception, scheme: str) -> Exception:
    if isinstance(error, FileNotFoundError):
        return TransferError("there is no such file", passing=False, missing=True)
    if isinstance(error, PermissionError):
        return TransferError("access is refused", passing=False)
    if isinstance(error, ImportError | ValueError):
        return MissingDependencyError(
            f"this installation cannot read {scheme}:// addresses",
            f"fsspec and its package for {scheme}",
            f"pip install {_INSTALL.get(scheme, 'its package')}, or: pip install 'janus_ds[remote]'",
        )
    # The text of such an error can quote the address or its credentials.
    return TransferError(f"reading failed ({type(error).__name__})")
