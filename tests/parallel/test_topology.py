"""Ranks and groups without other processes: what launchers set, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from janus_ds.errors import PREEMPTED_EXIT_CODE, MissingDependencyError, UsageError
from janus_ds.parallel import topology
from janus_ds.parallel.topology import init_topology, share_threads, wait_without_limit
from tests.support.launch import free_port, rank_environment
from tests.support.warm import warm_starter

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_one_process_needs_no_process_group() -> None:
    topology = init_topology()
    assert (topology.rank, topology.world_size, topology.data_size, topology.tensor_size) == (0, 1, 1, 1)
    assert topology.is_main
    assert topology.agree(7) == 7
    assert topology.sum_over_data([1, 2]) == [1, 2]
    assert topology.sum_tensor_over_data(torch.ones(2)).tolist() == [1, 1]
    assert topology.broadcast_object("x") == "x"
    assert topology.gather_objects("x") == ["x"]
    topology.barrier()
    assert not torch.distributed.is_initialized()


def test_processes_that_do_not_divide_into_tensor_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(LAUNCHED, ("0", "3", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="3 processes do not divide into tensor-parallel groups of 2"):
        init_topology(2)


def test_srun_without_an_address_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(MissingDependencyError, match="MASTER_ADDR, MASTER_PORT not set"):
        init_topology()


@pytest.mark.parametrize(("visible", "index"), [(1, 0), (4, 3)])
def test_a_task_of_slurm_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch, visible: int, index: int) -> None:
    chosen: list[torch.device] = []
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    environment = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "3"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert init_topology().device == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]


def test_deepspeed_is_told_the_gpu_that_a_rank_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapper counts ranks for torch, and Slurm shows each of them its own GPU alone."""
    for name, value in zip(LAUNCHED, ("1", "2", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    told: list[str] = []
    monkeypatch.setattr(topology, "_pick_device", lambda local_rank: torch.device("cuda", 0))
    monkeypatch.setattr(topology, "_describe", lambda *_: None)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: told.append(os.environ["LOCAL_RANK"]))
    init_topology()
    assert told == ["0"]


@pytest.mark.parametrize(("count", "visible"), [(4, None), (1, None), (1, "0,1")])
def test_more_ranks_than_gpus_are_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None
) -> None:
    """By `torchrun`, and by `deepspeed`, which names as many GPUs as it is asked for."""
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name, value in zip(LAUNCHED, ("7", "8", "7", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"more ranks here than GPUs, of which torch sees {count}") as caught:
        init_topology()
    assert caught.value.local


def test_collectives_wait_as_long_as_the_watchdog_lets_them() -> None:
    """Groups that others make, as DeepSpeed does, have limits of their own."""
    dist.init_process_group(
        "gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(minutes=10)
    )
    try:
        dist.new_group([0])
        wait_without_limit()
        groups: list[Any] = list(_world.pg_map)
        limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    finally:
        dist.destroy_process_group()
    assert len(limits) == 2
    assert min(limits) > timedelta(days=30)


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 8),
        ({"LOCAL_WORLD_SIZE": "2"}, 4),
        ({"LOCAL_SIZE": "16"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "2"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "5"}, None),
        # `deepspeed` in `srun --cpus-per-task=8 --pty bash`.
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_CPUS_PER_TASK": "8", "WORLD_SIZE": "4", "LOCAL_SIZE": "4"}, 2),
    ],
)
def test_ranks_share_the_cores_of_their_host(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threads: int | None
) -> None:
    chosen: list[int | None] = [None]
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    share_threads(environment)
    assert chosen[-1] == threads


def said(folder: Path, script: str, environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a process that runs a script."""
    file, log = folder / "rank.py", folder / "log"
    file.write_text(f"import time\nfrom janus_ds.parallel import topology\n{script}\n")
    return warm_starter().start([str(file)], log, environment).wait(900), log.read_text()


def test_ranks_that_do_not_come_are_waited_for_in_words(tmp_path: Path) -> None:
    """One of two ranks alone."""
    environment = rank_environment(0, 2, free_port())
    code, text = said(tmp_path, "topology._LIMIT_SECONDS = 0.5\ntopology.init_topology()", environment)
    assert code == MissingDependencyError.exit_code
    assert "error: not all 2 ranks have come" in text
    assert f"rank 0, meeting at 127.0.0.1:{environment['MASTER_PORT']}" in text
    assert "Traceback" not in text


def test_a_rank_that_is_asked_to_stop_waits_no_longer_for_others(tmp_path: Path) -> None:
    script = "topology._GRACE_SECONDS = 0.2\n"
    script += "with topology.rendezvous_in_time({}, 2, lambda: True):\n    time.sleep(600)"
    assert said(tmp_path, script, {}) == (PREEMPTED_EXIT_CODE, "asked to stop before all ranks had come\n")


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(given: dict[str, str], policy: str) -> None:
    code = "import os, sys, janus_ds; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{policy} False\n"
