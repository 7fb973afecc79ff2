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
import socket
import threading
import time
from pathlib import Path

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


def accept_ranks(listener: socket.socket, token: bytes, world_size: int) -> dict[int, socket.socket]:
    """The connections of the ranks that have proved to know the token, by rank; for rank 0.

    Each connection has a thread: the fault of one (silence, garbage, a reset) ends that one only.
    """
    joined: dict[int, socket.socket] = {}
    answering: set[socket.socket] = set()
    one_at_a_time = threading.Lock()
    deadline = time.monotonic() + _CONNECT_SECONDS

    def admit(line: socket.socket) -> None:
        try:
            rank = _proved_rank(line, token)
            with one_at_a_time:
                if not 0 < rank < world_size or rank in joined or time.monotonic() >= deadline:
                    raise OSError("refused")
                line.sendall(b"welcome\n")
                joined[rank] = line
        except (OSError, ValueError):
            line.close()
        finally:
            answering.discard(line)

    listener.settimeout(0.05)
    while len(joined) < world_size - 1 and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            line, _ = listener.accept()
            if len(answering) == _MOST_PENDING:
                line.close()
                continue
            answering.add(line)
            threading.Thread(target=admit, args=(line,), daemon=True).start()
    for line in list(answering):
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)
    with one_at_a_time:
        return joined


def _proved_rank(line: socket.socket, token: bytes) -> int:
    """The rank that a connection has proved to be; an OSError or a ValueError for a stranger's."""
    line.settimeout(_ANSWER_SECONDS)
    challenge = secrets.token_hex(16).encode()
    line.sendall(challenge + b"\n")
    number, _, proof = _line_of(line).partition(b" ")
    rank = int(number)
    if not hmac.compare_digest(proof, _proof(token, challenge, rank)):
        raise OSError("a stranger")
    return rank


def join(address: tuple[str, int], token: bytes, rank: int) -> socket.socket | None:
    """Connect to rank 0 and answer its challenge; None, with a warning, where that cannot be."""
    deadline = time.monotonic() + _CONNECT_SECONDS
    fault: Exception | None = None
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = socket.create_connection(address, left)
            try:
                line.sendall(b"%d %s\n" % (rank, _proof(token, _line_of(line, left), rank)))
                if _line_of(line, left) == b"welcome":
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


def _line_of(line: socket.socket, seconds: float = _ANSWER_SECONDS) -> bytes:
    """One short line, byte by byte: what follows belongs to the messages."""
    found, deadline = b"", time.monotonic() + seconds
    while not found.endswith(b"\n"):
        line.settimeout(max(deadline - time.monotonic(), 1e-3))
        byte = line.recv(1)
        if not byte or len(found) > _MOST_BYTES:
            raise OSError("the connection was closed")
        found += byte
    return found[:-1]
