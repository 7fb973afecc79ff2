"""Ranks as threads: who is named when one goes, and how a wish to stop reaches all."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from janus_ds.parallel import liveness
from janus_ds.parallel.liveness import Liveness, LostRankError
from janus_ds.parallel.topology import Topology
from tests.support.processes import wait_until

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
            error = call.lost(20)
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
    wait_until(lambda: all(heard[rank] for rank in others), 20, "the news")
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
