"""Rendezvous: each launch uses its own key, and ranks that do not come are reported in time.

`torchrun --max-restarts` keeps one store over all restarts (torch 2.13, `TORCHELASTIC_USE_AGENT_STORE`), and
torch finds the addresses of dead ranks in it. The restart counts that it gives to ranks differ between hosts,
so that they cannot tell the starts apart. Here rank 0 draws a key and gives it to the ranks that live.
"""

from __future__ import annotations

import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError

from janus_ds.errors import MissingDependencyError

_LIMIT_SECONDS = 600.0
_POLL_SECONDS = 0.05
_PREFIX = "janus_ds/rendezvous"


@contextmanager
def rendezvous_in_time(launched: Mapping[str, str], world_size: int) -> Iterator[None]:
    """End the process in words if the ranks have not all come: torch would wait for half an hour.

    It waits where no exception can reach it, so a timer has to end the process.

    Raises:
        MissingDependencyError: on this rank alone: the port is taken, or the network refuses.
    """
    place = f"{launched.get('MASTER_ADDR')}:{launched.get('MASTER_PORT')}"
    error = MissingDependencyError(
        f"not all {world_size} ranks have come within {_LIMIT_SECONDS / 60:.0f} minutes",
        f"rank {launched.get('RANK', 0)}, meeting at {place}",
        "look for a rank that failed before this, and whether all hosts reach that address "
        "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME choose the network)",
    )

    def leave() -> None:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(error.exit_code)

    timer = threading.Timer(_LIMIT_SECONDS, leave)
    timer.daemon = True
    timer.start()
    try:
        yield
    except DistNetworkError as network:
        reason = (
            "another program has the port" if "EADDRINUSE" in str(network) else str(network).splitlines()[0]
        )
        fault = MissingDependencyError(
            f"the ranks cannot meet: {reason}",
            f"rank {launched.get('RANK', 0)}, meeting at {place}",
            "choose another port (`deepspeed --master_port N`, `torchrun --master-port N`, or MASTER_PORT)",
        )
        fault.local = True  # type: ignore[misc]
        raise fault from network
    finally:
        timer.cancel()


def launcher_store(launched: Mapping[str, str], environ: Mapping[str, str]) -> Store | None:
    """The store of a launcher that restarts ranks and keeps it; None where each start has its own.

    Args:
        launched: MASTER_ADDR and MASTER_PORT, where the store is.
        environ: of this process.
    """
    kept = environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if not kept or environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    patience = timedelta(seconds=_LIMIT_SECONDS)
    return TCPStore(launched["MASTER_ADDR"], int(launched["MASTER_PORT"]), is_master=False, timeout=patience)


def fresh_store(store: Store, rank: int, world_size: int) -> Store:
    """A part of a store in which nothing of an earlier start is; all ranks of this start get the same.

    Every rank but the first leaves a number of its own, and waits for the answer to that number: an
    answer to a dead rank's number is of no use to it. The first one answers until all are there.
    """
    if rank == 0:
        key = secrets.token_hex(8)
        absent = set(range(1, world_size))
        while absent:
            _answer(store, absent, key)
            absent = {other for other in absent if not store.check([_here(key, other)])}
            if absent:
                time.sleep(_POLL_SECONDS)
    else:
        number = secrets.token_hex(8)
        store.set(f"{_PREFIX}/{rank}", number)
        key = store.get(f"{_PREFIX}/{number}").decode()
        store.set(_here(key, rank), "here")
    return PrefixStore(f"{_PREFIX}/{key}", store)


def _answer(store: Store, ranks: set[int], key: str) -> None:
    for rank in ranks:
        if store.check([f"{_PREFIX}/{rank}"]):
            store.set(f"{_PREFIX}/{store.get(f'{_PREFIX}/{rank}').decode()}", key)


def _here(key: str, rank: int) -> str:
    return f"{_PREFIX}/{key}/here/{rank}"
