"""Ranks as threads: who is named when one goes, and how a wish to stop reaches all."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.parallel import liveness
from janus_ds.parallel.liveness import Liveness, LostRankError
from janus_ds.parallel.topology import Topology
from tests.support.hostile import note
from tests.support.processes import wait_until
from tests.support.program import PATIENCE, Program

COUNT = 4


class Crowd:
    """The collectives of COUNT threads."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(COUNT)
        self._values: list[Any] = [None] * COUNT

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._barrier.wait()
        self._values[rank] = value
        self._barrier.wait()
        return list(self._values)


class ThreadTopology(Topology):
    """A rank that is a thread."""

    crowd: Crowd

    def gather_objects(self, value: Any) -> list[Any]:
        return self.crowd.gather(self.rank, value)

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def barrier(self) -> None:
        self.gather_objects(None)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of a busy machine may need longer than hosts."""
    monkeypatch.setattr(liveness, "_CONNECT_SECONDS", 300.0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(liveness, "_GRACE_SECONDS", 1e9)
    crowd, heard = Crowd(), [[] for _ in range(COUNT)]  # type: ignore[var-annotated]

    def make(rank: int) -> Liveness:
        topology = ThreadTopology(torch.device("cpu"), rank, COUNT)
        object.__setattr__(topology, "crowd", crowd)
        return Liveness(topology, heard[rank].append)

    with ThreadPoolExecutor(COUNT) as pool:
        made = list(pool.map(make, range(COUNT)))
    yield made, heard
    for call in made:
        call.close(orderly=True)


@pytest.mark.parametrize("gone", [0, 2])
def test_a_rank_that_goes_without_a_word_is_named_to_all(calls: Any, gone: int) -> None:
    made, _ = calls
    assert all(call.complete for call in made)
    made[gone].close(orderly=False)
    for rank, call in enumerate(made):
        if rank != gone:
            error = call.lost(300)
            assert isinstance(error, LostRankError)
            assert [peer.rank for peer in error.lost] == [gone]
            assert f"rank {gone} on " in error.where
            # One rank a host speaks: the first that is left.
            assert error.speaker == (rank == (1 if gone == 0 else 0))
            assert not call.complete


def test_ranks_that_say_good_bye_are_not_missed(calls: Any) -> None:
    made, _ = calls
    for rank in (3, 1):
        made[rank].close(orderly=True)
    assert made[0].lost(0.3) is None
    assert made[2].lost(0.1) is None


@pytest.mark.parametrize("asked", [0, 2])
def test_a_wish_to_stop_reaches_every_other_rank_once(calls: Any, asked: int) -> None:
    made, heard = calls
    made[asked].ask_to_stop("SIGUSR1")
    others = [rank for rank in range(COUNT) if rank != asked]
    wait_until(lambda: all(heard[rank] for rank in others), 300, "the news")
    assert [heard[rank] for rank in others] == [[f"rank {asked}: SIGUSR1"]] * 3
    assert heard[asked] == []
    made[(asked + 1) % COUNT].ask_to_stop("SIGTERM")
    assert made[0].lost(0.3) is None
    assert [heard[rank] for rank in others] == [[f"rank {asked}: SIGUSR1"]] * 3


def test_alone_there_is_nobody_to_lose() -> None:
    call = Liveness(Topology(torch.device("cpu")), lambda reason: None)
    call.ask_to_stop("SIGTERM")
    assert call.lost(9) is None
    call.close(orderly=True)


TOKEN = b"t" * 32


@contextlib.contextmanager
def joining(ranks: int) -> Iterator[tuple[tuple[str, int], list[dict[int, socket.socket]]]]:
    """Rank 0 waiting for `ranks` others; its address, and where its result comes."""
    listener, found = liveness.listen(True, ranks), []  # type: ignore[var-annotated]
    waiting = threading.Thread(
        target=lambda: found.append(liveness.accept_ranks(listener, TOKEN, ranks + 1)), daemon=True
    )
    waiting.start()
    with listener:
        yield listener.getsockname()[:2], found
        waiting.join()
    for line in found[0].values():
        line.close()


def attack(address: tuple[str, int], kind: str) -> socket.socket:
    """A stranger's connection to the port."""
    line = socket.create_connection(address, 300)
    challenge = liveness._line_of(line, 300.0)
    texts = {
        "not ASCII": "\xff\xfe ä 1\n".encode("latin-1"),
        "digits": b"9" * 200 + b" x\n",
        "clear token": b"1 " + TOKEN + b"\n",
        "rank 0": b"0 " + liveness._proof(TOKEN, challenge, 0) + b"\n",
        "no such rank": b"7 " + liveness._proof(TOKEN, challenge, 7) + b"\n",
        "other challenge": b"1 " + liveness._proof(TOKEN, b"0" * 32, 1) + b"\n",
        "null": bytes(100) + b"\n",
    }
    with contextlib.suppress(OSError):
        if kind == "endless":
            for _ in range(1000):
                line.sendall(b"x" * 65536)
        elif kind == "reset":
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            line.close()
        elif kind in texts:
            line.sendall(texts[kind])
    return line


STRANGERS = ("silent", "not ASCII", "digits", "clear token", "rank 0", "no such rank", "other challenge")


def test_a_hundred_strangers_neither_delay_nor_break_a_start(monkeypatch: pytest.MonkeyPatch) -> None:
    # One after the other, those ten that are silent would take 60 s each, twice what all have to join.
    monkeypatch.setattr(liveness._line_of, "__defaults__", (60.0,))
    with joining(3) as (address, found):
        kinds = (*STRANGERS, "null", "endless", "reset")
        with ThreadPoolExecutor(20) as pool:
            strangers = list(pool.map(lambda i: attack(address, kinds[i % len(kinds)]), range(100)))
            lines = list(pool.map(lambda rank: liveness.join(address, TOKEN, rank), (1, 2, 3)))
    note("connections of strangers that break a start", len(strangers), not all(lines))
    assert all(lines)
    assert sorted(found[0]) == [1, 2, 3]
    for stranger in strangers:
        stranger.close()


@pytest.mark.parametrize("kind", [*STRANGERS[1:], "null", "endless"])
def test_a_stranger_is_dropped_at_once(kind: str) -> None:
    with joining(1) as (address, found):
        stranger = attack(address, kind)
        stranger.settimeout(300)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
        line = liveness.join(address, TOKEN, 1)
    assert list(found[0]) == [1]
    assert line is not None


def test_the_port_is_closed_once_all_have_joined_and_was_open_on_loopback_only(calls: Any) -> None:
    with liveness.listen(True, 4) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    made, _ = calls
    port = made[1]._lines[0].getpeername()[1]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 5)


def test_on_several_hosts_it_listens_where_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    if own in ("0.0.0.0", "127.0.0.1"):
        pytest.skip("this machine has no other interface than loopback")
    monkeypatch.setenv("MASTER_ADDR", own)
    with liveness.listen(False, 4) as listener:
        assert listener.getsockname()[0] == own
    # A name that only its own host resolves, to loopback, would shut all others out.
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with liveness.listen(False, 4) as listener:
        assert listener.getsockname()[0] in ("0.0.0.0", "::")


def test_a_rank_that_cannot_connect_goes_on_unwatched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(liveness, "_CONNECT_SECONDS", 0.5)
    with liveness.listen(True, 1) as listener:
        address = listener.getsockname()[:2]
    with caplog.at_level(logging.WARNING):
        assert liveness.join(address, TOKEN, 1) is None
    assert "rank 1 is not watched: no connection to 127.0.0.1" in caplog.text


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """The addresses at which processes wait for connections over IPv4."""
    sockets = {os.readlink(entry) for pid in pids for entry in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = [row[1].split(":") for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    return {(socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)) for host, port in found}


@pytest.mark.heavy
def test_garbage_on_every_port_while_two_ranks_start(inputs: Path) -> None:
    """The store's, gloo's and the liveness port, from the first import to the first step."""
    settings = ("train.max_steps=3", "train.save_every=3", "train.valid_every=0", "data.workers=0")
    program, thrown = Program(inputs, inputs / "strangers", ranks=2, settings=settings), 0
    with program.running_ranks() as ranks:
        while not program.steps and all(rank.poll() is None for rank in ranks):
            with contextlib.suppress(OSError):
                for address in listening([rank.pid for rank in ranks]):
                    with socket.create_connection(address, 2) as line:
                        line.sendall(os.urandom(64))
                        thrown += 1
            time.sleep(0.02)
        codes = [rank.wait(PATIENCE) for rank in ranks]
    note("connections of strangers that break a start", thrown, codes != [0, 0])
    assert codes == [0, 0], program.said[-3000:]
    assert thrown > 10
