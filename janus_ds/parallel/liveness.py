"""Liveness: each rank keeps a TCP connection to rank 0, so that a lost rank is known and named.

A collective tells at best that some connection broke, and at worst waits for half an hour. Here the
kernel tells: the sockets of a dead process close at once, and those of a host that is cut off within
25 seconds. Rank 0 tells all others which rank it was. There are no heartbeats by threads: a rank that
compiles, or holds the interpreter's lock for a minute, is not dead.

The same connections carry a request to stop from the rank that was asked to all others, so that work which
only one rank does ends soon as well, and what the ranks tell each other of their progress.

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
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ds.errors import TrainingError
from janus_ds.parallel.topology import Topology

__all__ = ["Liveness", "LostRankError", "Peer"]

_GRACE_SECONDS = 15.0
"""Time between the loss of a rank and the end of this process, should it wait in a collective."""
_CONNECT_SECONDS = 20.0
"""Time in which all ranks must have connected; those that have not are not watched."""
_ANSWER_SECONDS = 5.0
"""Time in which a connection must have answered the challenge."""
_MOST_BYTES = 256
"""Of an answer to the challenge; who sends more is dropped."""
_MOST_PENDING = 512
"""Connections that may be answering at once."""
_MOST_LINE = 1 << 16
"""Bytes of a message between ranks."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Peer:
    """A rank and where it runs; `network` is equal for ranks that share a loopback interface."""

    rank: int
    host: str
    pid: int
    network: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


class LostRankError(TrainingError):
    """A rank has ended without notice, or its host cannot be reached.

    Args:
        lost: the ranks.
        speaker: whether this rank is the one of its host to say so.
    """

    def __init__(self, lost: Sequence[Peer], speaker: bool) -> None:
        names = ", ".join(str(peer) for peer in lost[:8]) + (" and others" if len(lost) > 8 else "")
        super().__init__(
            "another rank was lost: it was killed, it failed, or its host cannot be reached",
            names,
            "look for that rank's own last message and its host's log (out of memory?); "
            "the same command resumes from the last checkpoint",
        )
        self.lost = tuple(lost)
        self.speaker = speaker


class Liveness:
    """The connections between rank 0 and all others. Made by all ranks together.

    Args:
        topology: the ranks; alone, there is nothing to do.
        on_stop: called in a thread with the reason when another rank was asked to stop.
    """

    def __init__(self, topology: Topology, on_stop: Callable[[str], None]) -> None:
        self._rank = topology.rank
        self._on_stop = on_stop
        self._news = threading.Condition()
        self._lost: list[int] = []
        self._closing = False
        self._taken = False
        self._stopping = False
        self._since, self._grace = 0.0, _GRACE_SECONDS
        self._rests: dict[int, bytes] = {}
        self._listeners: dict[str, Callable[[int, str], None]] = {}
        self._lines: dict[int, socket.socket] = {}
        self._peers: list[Peer] = []
        self._thread: threading.Thread | None = None
        if topology.world_size > 1:
            self._start(topology)

    def ask_to_stop(self, reason: str) -> None:
        """Tell all other ranks that this one was asked to stop."""
        if not self._stopping:
            self._stopping = True
            self._send(f"stop rank {self._rank}: {reason}")

    def listen(self, listeners: Mapping[str, Callable[[int, str], None]]) -> None:
        """Call these, in a thread, with the sender and the text of messages that begin with their word."""
        self._listeners |= listeners

    def tell(self, word: str, text: str) -> None:
        """Send one line: from rank 0 to all others, from the others to rank 0."""
        self._send(f"{word} {text}")

    @property
    def peers(self) -> Sequence[Peer]:
        """All ranks, in their order; empty for one rank."""
        return self._peers

    def lost(self, wait: float) -> LostRankError | None:
        """The ranks that are lost, if that is known or becomes known within `wait` seconds."""
        with self._news:
            self._news.wait_for(lambda: self._lost, wait if self._lines else 0)
            if not self._lost:
                return None
            self._taken = True
            return self._error()

    @property
    def complete(self) -> bool:
        """Whether no rank is known to be lost."""
        return not self._lost

    def close(self, *, orderly: bool) -> None:
        """End. `orderly`: this rank leaves as all do, for a reason that is known."""
        self._closing = True
        if orderly:
            self._send("bye")
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_WR)

    def _start(self, topology: Topology) -> None:
        here = Peer(topology.rank, socket.gethostname(), os.getpid(), _network())
        self._peers = topology.gather_objects(here)
        token = topology.broadcast_object(secrets.token_bytes(32))
        local = len({peer.network for peer in self._peers}) == 1
        listener = _listen(local, topology.world_size) if topology.is_main else None
        address = topology.broadcast_object(listener.getsockname()[:2] if listener else ("", 0))
        if listener is not None:
            with listener:
                self._lines = _accept_ranks(listener, token, topology.world_size)
            missing = topology.world_size - 1 - len(self._lines)
            if missing:
                logger.warning("%d ranks cannot be watched: no connection", missing)
        else:
            host = address[0] if local else os.environ.get("MASTER_ADDR", address[0])
            line = _join((host, address[1]), token, self._rank)
            self._lines = {} if line is None else {0: line}
        topology.barrier()
        for line in self._lines.values():
            _keep_alive(line)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._thread.start()

    def _forget(self) -> None:
        # A data worker that inherits the sockets would keep a dead rank's connections open.
        for line in self._lines.values():
            line.close()

    def _watch(self) -> None:
        waiting = selectors.DefaultSelector()
        for rank, line in self._lines.items():
            waiting.register(line, selectors.EVENT_READ, rank)
        while waiting.get_map():
            for key, _ in waiting.select(1.0):
                if not self._hear(key.data, key.fileobj):
                    waiting.unregister(key.fileobj)
            self._leave_in_time()
        while self._lost:
            self._leave_in_time()
            time.sleep(1.0)

    def _hear(self, rank: int, line: Any) -> bool:
        """Take in what came on a connection; False at its end."""
        try:
            received = line.recv(4096)
        except OSError:
            received = b""
        *messages, rest = (self._rests.get(rank, b"") + received).split(b"\n")
        self._rests[rank] = rest[-_MOST_LINE:]
        for message in messages:
            word, _, text = message.decode(errors="replace").partition(" ")
            if word == "bye":
                return False
            if word == "lost":
                self._note(int(text))
            elif word == "stop" and not self._stopping:
                self._stopping = True
                self._on_stop(text)
                self._pass_on(f"stop {text}", but=rank)
            elif word in self._listeners:
                self._listeners[word](rank, text)
        if not received:
            self._note(rank)
            self._pass_on(f"lost {rank}", but=rank)
        return bool(received)

    def _note(self, rank: int) -> None:
        with self._news:
            if rank not in self._lost and not self._closing:
                self._lost.append(rank)
                self._since = time.monotonic()
            self._news.notify_all()

    def _pass_on(self, message: str, but: int) -> None:
        if self._rank == 0:
            self._send(message, but)

    def _send(self, message: str, but: int | None = None) -> None:
        for rank, line in self._lines.items():
            if rank != but:
                with contextlib.suppress(OSError):
                    line.sendall(f"{message}\n".encode())

    def _leave_in_time(self) -> None:
        if not self._lost or time.monotonic() - self._since < self._grace:
            return
        if not self._taken:
            error = self._error()
            sys.stderr.write(f"{error}\n" if error.speaker else "")
            sys.stderr.flush()
        os._exit(TrainingError.exit_code)

    def _error(self) -> LostRankError:
        lost = [self._peers[rank] for rank in sorted(self._lost)]
        host = self._peers[self._rank].host
        left = [peer.rank for peer in self._peers if peer.host == host and peer.rank not in self._lost]
        return LostRankError(lost, speaker=self._rank == left[0])


def _network() -> str:
    """Equal on processes of one machine in one network namespace, which share a loopback interface."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(8)}"


def _listen(local: bool, backlog: int) -> socket.socket:
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


def _accept_ranks(listener: socket.socket, token: bytes, world_size: int) -> dict[int, socket.socket]:
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


def _join(address: tuple[str, int], token: bytes, rank: int) -> socket.socket | None:
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


def _keep_alive(line: socket.socket) -> None:
    """Let the kernel ask whether the other host is there, and give up after 25 seconds of silence."""
    line.setblocking(True)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)
