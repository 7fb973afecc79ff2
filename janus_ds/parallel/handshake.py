"""Ranks connect to rank 0 on a port that strangers may reach too.

The port is open while ranks join, for 20 seconds at most: on the loopback interface if all ranks share one,
else on the address that MASTER_ADDR names. A rank proves by an HMAC over a fresh challenge that it knows
the token of this start; whatever else connects is dropped, and delays nobody.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import selectors
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONNECT_SECONDS = 20.0
"""Time in which all ranks must have connected; those that have not are not watched."""
_ANSWER_SECONDS = 5.0
"""Time in which a connection must have answered the challenge."""
_MOST_BYTES = 256
"""Of an answer to the challenge; who sends more is dropped."""
_MOST_PENDING = 512
"""Connections that may be answering at once."""

logger = logging.getLogger(__name__)


def network() -> str:
    """Equal on processes of one machine in one network namespace, which share a loopback interface."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(8)}"


def listen(local: bool, backlog: int) -> socket.socket:
    """A port on the loopback interface, else on the address of MASTER_ADDR if it is one of this host.

    Behind an address translation it is not: then, and only then, on all interfaces.
    """
    names = ["127.0.0.1", "::1"] if local else _addresses(os.environ.get("MASTER_ADDR", ""))
    for name in names:
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        with contextlib.suppress(OSError):
            return socket.create_server((name, 0), family=family, backlog=backlog + _MOST_PENDING)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", 0), family=family, backlog=backlog + _MOST_PENDING, dualstack_ipv6=dual)


def _addresses(host: str) -> list[str]:
    """What a host's name stands for, without loopback addresses, which other hosts cannot reach."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []
    return [name for name in dict.fromkeys(found) if not name.startswith("127.") and name != "::1"]


def _proof(token: bytes, challenge: bytes, rank: int) -> bytes:
    return hmac.new(token, challenge + b" %d" % rank, hashlib.sha256).hexdigest().encode()


@dataclass
class _Candidate:
    """A connection that has not yet answered its challenge."""

    challenge: bytes
    deadline: float
    received: bytes = b""


def accept_ranks(listener: socket.socket, token: bytes, world_size: int) -> dict[int, socket.socket]:
    """The connections of the ranks that have proved to know the token, by rank; for rank 0.

    All connections are served at once. The fault of one (silence, garbage, a reset) ends that one only.
    """
    joined: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _CONNECT_SECONDS
    listener.setblocking(False)
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        while len(joined) < world_size - 1 and time.monotonic() < deadline:
            for key, _ in waiting.select(0.2):
                if key.fileobj is listener:
                    _challenge(listener, waiting)
                    continue
                line, candidate = key.fileobj, key.data
                rank = _answered(line, candidate, token)
                if rank is None:
                    continue
                waiting.unregister(line)
                if 0 < rank < world_size and rank not in joined and _welcomed(line):
                    joined[rank] = line  # type: ignore[assignment]
                else:
                    line.close()  # type: ignore[union-attr]
            _drop_late(waiting)
        for key in list(waiting.get_map().values()):
            if key.data is not None:
                key.fileobj.close()  # type: ignore[union-attr]
    return joined


def _challenge(listener: socket.socket, waiting: selectors.BaseSelector) -> None:
    """Take one connection and send it a challenge."""
    with contextlib.suppress(OSError):
        line, _ = listener.accept()
        line.setblocking(False)
        candidate = _Candidate(secrets.token_hex(16).encode(), time.monotonic() + _ANSWER_SECONDS)
        if len(waiting.get_map()) > _MOST_PENDING or line.send(candidate.challenge + b"\n") < 33:
            line.close()
            return
        waiting.register(line, selectors.EVENT_READ, candidate)


def _answered(line: Any, candidate: _Candidate, token: bytes) -> int | None:
    """The rank that a connection has proved to be; None while its answer is incomplete; -1: a stranger."""
    try:
        received = line.recv(_MOST_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return -1
    candidate.received += received
    answer, end, _ = candidate.received.partition(b"\n")
    if not end and received and len(candidate.received) < _MOST_BYTES:
        return None
    number, _, proof = answer.partition(b" ")
    if not end or not number.isdigit() or len(number) > 9:
        return -1
    rank = int(number)
    return rank if hmac.compare_digest(proof, _proof(token, candidate.challenge, rank)) else -1


def _welcomed(line: Any) -> bool:
    """Tell a rank that it is watched; False where it has gone."""
    try:
        line.send(b"welcome\n")
    except OSError:
        return False
    return True


def _drop_late(waiting: selectors.BaseSelector) -> None:
    """Close the connections that have not answered in time."""
    now = time.monotonic()
    for key in list(waiting.get_map().values()):
        if key.data is not None and now > key.data.deadline:
            waiting.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]


def join(address: tuple[str, int], token: bytes, rank: int) -> socket.socket | None:
    """Connect to rank 0 and answer its challenge; None, with a warning, where that cannot be."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    fault: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = socket.create_connection(address, left)
            try:
                line.sendall(b"%d %s\n" % (rank, _proof(token, _line_of(line), rank)))
                if _line_of(line) == b"welcome":
                    return line
                raise OSError("refused")
            except BaseException:
                line.close()
                raise
        except OSError as error:
            fault = error
            time.sleep(min(0.2, max(left, 0.0)))
    logger.warning("rank %d is not watched: no connection to %s:%d (%s)", rank, *address, fault)
    return None


def _line_of(line: socket.socket) -> bytes:
    """One short line, byte by byte: what follows belongs to the messages."""
    found = b""
    while not found.endswith(b"\n"):
        byte = line.recv(1)
        if not byte or len(found) > _MOST_BYTES:
            raise OSError("the connection was closed")
        found += byte
    return found[:-1]
