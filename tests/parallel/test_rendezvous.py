"""Ranks of one start that find each other in a store where those of an earlier start have been."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from janus_ds.errors import MissingDependencyError
from janus_ds.parallel.topology import fresh_store, launcher_store, rendezvous_in_time

RANKS = 3
AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "2"}


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=600)
    )


def start(server: dist.TCPStore, late: int) -> list[dist.Store]:
    """All ranks of one start; one of them comes after the others have looked around."""
    others = threading.Event()

    def rank(number: int) -> Callable[[], dist.Store]:
        def meet() -> dist.Store:
            if number == late:
                others.wait(0.3)
            launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
            store = launcher_store(launched, AGENT)
            assert store is not None
            return fresh_store(store, number, RANKS)

        return meet

    with ThreadPoolExecutor(RANKS) as pool:
        return [future.result(600) for future in [pool.submit(rank(number)) for number in range(RANKS)]]


@pytest.mark.parametrize("late", range(RANKS))
def test_the_next_start_sees_nothing_of_the_one_before(server: dist.TCPStore, late: int) -> None:
    before = start(server, 0)
    for number, store in enumerate(before):
        store.set(f"address/{number}", f"dead {number}")
    after = start(server, late)
    assert not any(store.check([f"address/{number}"]) for store in after for number in range(RANKS))
    after[1].set("address/1", "alive")
    assert [store.get("address/1") for store in after] == [b"alive"] * RANKS
    assert before[0].get("address/1") == b"dead 1"


@pytest.mark.parametrize(
    "environment", [{}, {**AGENT, "TORCHELASTIC_MAX_RESTARTS": "0"}, {"TORCHELASTIC_MAX_RESTARTS": "2"}]
)
def test_a_store_of_its_own_needs_no_meeting(environment: dict[str, str]) -> None:
    assert launcher_store({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, environment) is None


def test_a_port_that_another_program_has_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0"}
        with (
            pytest.raises(MissingDependencyError, match="another program has the port") as raised,
            rendezvous_in_time(place, 2),
        ):
            dist.TCPStore("127.0.0.1", port, 2, is_master=True, timeout=timedelta(seconds=2))
    assert raised.value.local
    assert raised.value.where == f"rank 0, meeting at 127.0.0.1:{port}"
