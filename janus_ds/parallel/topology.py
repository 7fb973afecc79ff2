"""Ranks, their groups, and collective decisions.

Works without torch.distributed in one process. Tensor-parallel ranks are neighbours (they talk
most), data-parallel ranks are `tensor_size` apart. Values that live on the host (counts, decisions,
small objects) go through gloo even on GPU machines, so that they never wait for a device.

Each launch uses its own rendezvous key: `torchrun --max-restarts` keeps one store over all restarts (torch
2.13, `TORCHELASTIC_USE_AGENT_STORE`), in which torch finds the addresses of dead ranks, and its restart
counts differ between hosts. So rank 0 draws a key and gives it to the ranks that live.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from janus_ds.errors import PREEMPTED_EXIT_CODE, JanusError, MissingDependencyError, UsageError
from janus_ds.parallel import tensor_parallel as tp

Number = TypeVar("Number", int, float)
Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Topology:
    """This process's place among all processes.

    Ranks of one tensor group hold shards of one model and get the same batches; ranks of one data
    group hold the same shard and get different batches.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    data_rank: int = 0
    data_size: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1
    data_group: Any = None
    """Process group for tensors on `device`; None in one process."""
    host_data_group: Any = None
    """The same ranks, for values on the host."""
    host_world_group: Any = None
    """All ranks, for values on the host."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and manifests."""
        return self.rank == 0

    def sum_over_data(self, values: Sequence[Number]) -> list[Number]:
        """Sums of host numbers over the data-parallel ranks; integers stay exact integers."""
        if self.data_size == 1:
            return list(values)
        whole = all(isinstance(value, int) for value in values)
        totals = torch.tensor(values, dtype=torch.int64 if whole else torch.float64)
        dist.all_reduce(totals, group=self.host_data_group)
        return totals.tolist()

    def sum_tensor_over_data(self, values: Tensor) -> Tensor:
        """Sum of a tensor on `device` over the data-parallel ranks, as a new tensor."""
        if self.data_size == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total, group=self.data_group)
        return total

    def sum_to_first_of_data(self, values: Tensor) -> None:
        """Sum of a tensor on `device` over the data-parallel ranks, in place on the first of them.

        On the others the tensor is of no use afterwards.
        """
        if self.data_size > 1:
            dist.reduce(values, dst=self.tensor_rank, group=self.data_group)

    def agree(self, code: int) -> int:
        """The largest code over all ranks: the most serious decision holds for everybody."""
        if self.world_size == 1:
            return code
        largest = torch.tensor([code], dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.host_world_group)
        return int(largest)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier(group=self.host_world_group)

    def broadcast_object(self, value: Anything) -> Anything:
        """Rank 0's value, on every rank; it must pickle."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host_world_group)
        return box[0]

    def gather_objects(self, value: Anything) -> list[Anything]:
        """The values of all ranks in rank order, on every rank; they must pickle."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value, group=self.host_world_group)
        return box


def init_topology(
    tensor_parallel: int = 1, *, process_group: bool = False, asked: Callable[[], bool] = lambda: False
) -> Topology:
    """Find this process's place, from what `deepspeed`, `torchrun` or `srun` put in the environment.

    Args:
        tensor_parallel: ranks that share one copy of the model.
        process_group: start torch.distributed in a single process as well, as DeepSpeed wants it.
        asked: whether this process should stop; it then waits no longer for other ranks.

    Raises:
        UsageError: the number of processes does not divide by `tensor_parallel`.
        MissingDependencyError: several processes, but no address of the first one.
    """
    launched = _launch_environment(os.environ)
    world_size = int(launched.get("WORLD_SIZE", "1"))
    if tensor_parallel < 1 or world_size % tensor_parallel:
        raise UsageError(
            f"{world_size} processes do not divide into tensor-parallel groups of {tensor_parallel}",
            "--tensor-parallel",
            "start a multiple of that many processes, or choose a smaller size",
        )
    device = _pick_device(int(launched.get("LOCAL_RANK", "0")))
    share_threads(os.environ)
    if device.index is not None:
        # DeepSpeed takes its device from the environment.
        launched["LOCAL_RANK"] = str(device.index)
    if world_size == 1 and not process_group:
        return Topology(device)
    _start_distributed(launched, world_size, asked)
    if tensor_parallel > 1:
        tp.init_model_parallel(tensor_parallel)
    return _describe(device, tensor_parallel)


def share_threads(environ: Mapping[str, str]) -> None:
    """Give this rank its share of the host's cores, where the user has not chosen a number of threads.

    Ranks that each take all cores wait for each other: two on two cores were six times slower.
    """
    if environ.get("OMP_NUM_THREADS"):
        return
    ranks = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or "1"
    # Under a launcher in an interactive step of Slurm, the step's cores are those of all ranks together.
    if "SLURM_STEP_NUM_TASKS" in environ and "WORLD_SIZE" not in environ:
        threads = environ.get("SLURM_CPUS_PER_TASK", "1")
    else:
        threads = str(len(os.sched_getaffinity(0)) // int(ranks)) if ranks.isdecimal() and int(ranks) else "1"
    torch.set_num_threads(max(1, int(threads)) if threads.isdecimal() else 1)


def raise_on_all_ranks(topology: Topology, action: Callable[[], Anything]) -> Anything:
    """The result of `action`, which holds no collective, or one rank's user fault on all ranks.

    Raises:
        JanusError: what the first rank with a fault raised.
    """
    result, fault = None, None
    try:
        result = action()
    except JanusError as error:
        fault = error
    if topology.agree(int(fault is not None)):
        raise next(found for found in topology.gather_objects(fault) if found)
    return result  # type: ignore[return-value]


def on_first_rank(topology: Topology, action: Callable[[], Anything]) -> Anything:
    """What `action` gives on rank 0, or its user fault, on all ranks; it must pickle."""
    found = raise_on_all_ranks(topology, lambda: action() if topology.is_main else None)
    return topology.broadcast_object(found)  # type: ignore[return-value]


def wait_without_limit() -> None:
    """Let the collectives of all groups that there are wait as long as the watchdog lets them.

    At the limits of DeepSpeed and torch, 10 or 30 minutes, waiting ranks would end with a stack trace,
    whatever `train.stall_minutes` says, and before the rank that they wait for is named.
    """
    for group in list(_world.pg_map):
        _set_pg_timeout(_NO_LIMIT, group)


def close_topology() -> None:
    """End torch.distributed, where it runs; without it, NCCL warns at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _launch_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and the first process's address; srun names them in its own way.

    Raises:
        MissingDependencyError: several processes, but no MASTER_ADDR or MASTER_PORT.
        UsageError: numbers that cannot be; on this rank alone, which may not know of the others.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    found = {name: environ[name] for name in names if name in environ}
    if "WORLD_SIZE" not in found and "SLURM_STEP_NUM_TASKS" in environ:
        found["RANK"] = environ.get("SLURM_PROCID", "0")
        found["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
        found["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    for name, least in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)):
        text = found.get(name, str(least))
        if not text.isascii() or not text.isdigit() or int(text) < least:
            reason = f"{name} is {text!r}"
        elif name == "RANK" and int(text) >= int(found.get("WORLD_SIZE", "1")):
            reason = f"RANK is {text} of {found.get('WORLD_SIZE', '1')} processes"
        else:
            continue
        fix = "start with `deepspeed`, `torchrun` or `srun`, or unset RANK, LOCAL_RANK and WORLD_SIZE"
        raise UsageError(f"{reason}, which no launcher sets", "the environment", fix).of_this_rank()
    missing = [name for name in names if name not in found]
    if int(found.get("WORLD_SIZE", "1")) > 1 and missing:
        raise MissingDependencyError(
            f"{found['WORLD_SIZE']} processes were started, but they cannot find each other",
            f"environment: {', '.join(missing)} not set",
            "start with `deepspeed` or `torchrun`; for srun, export MASTER_ADDR (first node) and MASTER_PORT",
        )
    return found


def _pick_device(local_rank: int) -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count, alone = torch.cuda.device_count(), "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",")
    # Slurm can show each task its own GPU alone (--gpus-per-task): the first one for all of them.
    apart = count == 1 and (alone or "SLURM_LOCALID" in os.environ)
    if local_rank >= count and not apart:
        what = f"there are more ranks here than GPUs, of which torch sees {count}"
        fix = "start one rank a GPU, or set DS_ACCELERATOR=cpu to train on CPUs"
        raise UsageError(what, f"LOCAL_RANK {local_rank}, CUDA_VISIBLE_DEVICES", fix).of_this_rank()
    device = torch.device("cuda", 0 if apart else local_rank)
    torch.cuda.set_device(device)
    return device


def _start_distributed(launched: dict[str, str], world_size: int, asked: Callable[[], bool]) -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if get_accelerator().device_name() == "cpu":
        # Used for inference only; it needs a compiler and 40 s at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized() and world_size == 1:
        # A store inside the process: no port to collide on.
        backend = get_accelerator().communication_backend_name()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    os.environ.update({"LOCAL_RANK": "0"} | launched)
    with rendezvous_in_time(launched, world_size, asked):
        store = None if dist.is_initialized() else launcher_store(launched, os.environ)
        if store is not None:
            rank = int(launched["RANK"])
            store = fresh_store(store, rank, world_size)
            backend = get_accelerator().communication_backend_name()
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _describe(device: torch.device, tensor_size: int) -> Topology:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    data_group, host_data_group = None, None
    for first in range(tensor_size):
        # Every rank takes part in making every group.
        members = list(range(first, world_size, tensor_size))
        group = dist.new_group(members)
        host_group = group if device.type == "cpu" else dist.new_group(members, backend="gloo")
        if rank % tensor_size == first:
            data_group, host_data_group = group, host_group
    return Topology(
        device=device,
        rank=rank,
        world_size=world_size,
        data_rank=rank // tensor_size,
        data_size=world_size // tensor_size,
        tensor_rank=rank % tensor_size,
        tensor_size=tensor_size,
        data_group=data_group,
        host_data_group=host_data_group,
        host_world_group=None if device.type == "cpu" else dist.new_group(backend="gloo"),
    )


_NO_LIMIT = timedelta(days=365)
_LIMIT_SECONDS = 600.0
_GRACE_SECONDS = 2.0
"""Time for ranks to meet that were asked to stop, and then agree to do so together."""
_POLL_SECONDS = 0.05
_PREFIX = "janus_ds/rendezvous"


@contextmanager
def rendezvous_in_time(
    launched: Mapping[str, str], world_size: int, asked: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """End the process in words if the ranks have not all come: torch would wait for half an hour.

    It waits where no exception and no handler of a signal can reach it, so a thread has to end the process,
    also if it is `asked` to stop: launchers ask it when another rank has failed, and kill it 30 s later.

    Raises:
        MissingDependencyError: on this rank alone: the port is taken, or the network refuses.
    """
    place = f"{launched.get('MASTER_ADDR')}:{launched.get('MASTER_PORT')}"
    where, met = f"rank {launched.get('RANK', 0)}, meeting at {place}", threading.Event()
    error = MissingDependencyError(
        f"not all {world_size} ranks have come within {_LIMIT_SECONDS / 60:.0f} minutes",
        where,
        "look for a rank that failed before this, and whether all hosts reach that address "
        "(NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME choose the network)",
    )

    def watch() -> None:
        end, stop = time.monotonic() + _LIMIT_SECONDS, False
        while not met.wait(_POLL_SECONDS):
            if asked() and not stop:
                end, stop = time.monotonic() + _GRACE_SECONDS, True
            if time.monotonic() >= end:
                said = "asked to stop before all ranks had come" if stop else str(error)
                sys.stderr.write(f"{said}\n")
                sys.stderr.flush()
                os._exit(PREEMPTED_EXIT_CODE if stop else error.exit_code)

    threading.Thread(target=watch, name="rendezvous", daemon=True).start()
    try:
        yield
    except DistNetworkError as network:
        reason = (
            "another program has the port" if "EADDRINUSE" in str(network) else str(network).splitlines()[0]
        )
        raise MissingDependencyError(
            f"the ranks cannot meet: {reason}",
            where,
            "choose another port (`deepspeed --master_port N`, `torchrun --master-port N`, or MASTER_PORT)",
        ).of_this_rank() from network
    finally:
        met.set()


def launcher_store(launched: Mapping[str, str], environ: Mapping[str, str]) -> Store | None:
    """The store of a launcher that restarts ranks and keeps it; None where each start has its own."""
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
        absent = list(range(1, world_size))
        while absent:
            for other in absent:
                if store.check([f"{_PREFIX}/{other}"]):
                    store.set(f"{_PREFIX}/{store.get(f'{_PREFIX}/{other}').decode()}", key)
            absent = [other for other in absent if not store.check([f"{_PREFIX}/{key}/here/{other}"])]
            if absent:
                time.sleep(_POLL_SECONDS)
    else:
        number = secrets.token_hex(8)
        store.set(f"{_PREFIX}/{rank}", number)
        key = store.get(f"{_PREFIX}/{number}").decode()
        store.set(f"{_PREFIX}/{key}/here/{rank}", "here")
    return PrefixStore(f"{_PREFIX}/{key}", store)
