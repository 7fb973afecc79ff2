"""Liveness: each rank keeps a TCP connection to rank 0, so that a lost rank is known and named.

A collective tells at best that some connection broke, and at worst waits for half an hour. Here the
kernel tells: the sockets of a dead process close at once, and those of a host that is cut off within
25 seconds. Rank 0 tells all others which rank it was. There are no heartbeats by threads: a rank that
compiles, or holds the interpreter's lock for a minute, is not dead.

The same connections carry a request to stop from the rank that was asked to all others, so that work which
only one rank does ends soon as well, and what the ranks tell each other of their progress.

Strangers may reach rank 0's port. It is open while ranks join, for 20 seconds at most: on the loopback
interface if all ranks share one, else on the address that MASTER_ADDR names. A rank proves by an HMAC over a
fresh challenge that it knows the token of this start; whatever else connects is dropped, and delays nobody.
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

_GRACE_SECONDS = 15.0
"""Time between the loss of a rank and the end of this process, should it wait in a collective."""
_MOST_LINE = 1 << 16
"""Bytes of a message between ranks."""
_CONNECT_SECONDS = 20.0
"""Time in which all ranks must have connected; those that have not are not watched."""
_ANSWER_SECONDS = 5.0
"""Time in which a connection must have answered the challenge."""
_MOST_BYTES = 256
"""Of an answer to the challenge; who sends more is dropped."""
_MOST_PENDING = 512
"""Connections that may be answering at once."""

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
        if topology.world_size > 1:
            self._start(topology)

    def ask_to_stop(self, reason: str) -> None:
        """Tell all other ranks that this one was asked to stop."""
        if not self._stopping:
            self._stopping = True
            self.tell("stop", f"rank {self._rank}: {reason}")

    def listen(self, listeners: Mapping[str, Callable[[int, str], None]]) -> None:
        """Call these, in a thread, with the sender and the text of messages that begin with their word."""
        self._listeners |= listeners

    def tell(self, word: str, text: str, but: int | None = None) -> None:
        """Send one line: from rank 0 to all others (`but` one of them), from the others to rank 0 alone."""
        for rank, line in self._lines.items():
            if rank != but:
                with contextlib.suppress(OSError):
                    line.sendall(f"{word} {text}\n".encode())

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
            self.tell("bye", "")
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_WR)

    def _start(self, topology: Topology) -> None:
        here = Peer(topology.rank, socket.gethostname(), os.getpid(), network())
        self._peers = topology.gather_objects(here)
        token = topology.broadcast_object(secrets.token_bytes(32))
        local = len({peer.network for peer in self._peers}) == 1
        listener = listen(local, topology.world_size) if topology.is_main else None
        address = topology.broadcast_object(listener.getsockname()[:2] if listener else ("", 0))
        if listener is not None:
            with listener:
                self._lines = accept_ranks(listener, token, topology.world_size)
            missing = topology.world_size - 1 - len(self._lines)
            if missing:
                logger.warning("%d ranks cannot be watched: no connection", missing)
        else:
            host = address[0] if local else os.environ.get("MASTER_ADDR", address[0])
            line = join((host, address[1]), token, self._rank)
            self._lines = {} if line is None else {0: line}
        topology.barrier()
        for line in self._lines.values():
            _keep_alive(line)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._watch, name="liveness", daemon=True).start()

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
                self.tell("stop", text, but=rank)
            elif word in self._listeners:
                self._listeners[word](rank, text)
        if not received:
            self._note(rank)
            self.tell("lost", str(rank), but=rank)
        return bool(received)

    def _note(self, rank: int) -> None:
        with self._news:
            if rank not in self._lost and not self._closing:
                self._lost.append(rank)
                self._since = time.monotonic()
            self._news.notify_all()

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


def _keep_alive(line: socket.socket) -> None:
    """Let the kernel ask whether the other host is there, and give up after 25 seconds of silence."""
    line.setblocking(True)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    times = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 25_000}
    for name in times.keys() & vars(socket).keys():
        line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), times[name])


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
