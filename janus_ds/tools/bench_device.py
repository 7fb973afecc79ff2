"""What benches need to know of the device: whether it is there, its clock, its precision, its launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from janus_ds.errors import UsageError

if TYPE_CHECKING:
    import argparse

    import torch

__all__ = [
    "PRECISIONS",
    "add_device_argument",
    "check_device",
    "count_calls",
    "device_clock",
    "dtype_of",
    "launches",
]

PRECISIONS = ("float32", "bfloat16")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
_GRAPHS = ("cudaGraphLaunch",)
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Names of runtime calls in a profile: kernels, graphs, and what makes the host wait."""


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: no CUDA device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here", "--device cuda", "measure with --device cpu")


def dtype_of(precision: str) -> torch.dtype:
    """torch's type of a precision of :data:`PRECISIONS`."""
    import torch

    found: torch.dtype = getattr(torch, precision)
    return found


def device_clock(device: str, threads: int = 1) -> tuple[str, Callable[[], float]]:
    """The clock's name and the clock: CPU time for one thread on a CPU, else time on the wall.

    On a GPU it first waits for what was begun.
    """
    if device == "cpu":
        return ("cpu", time.process_time) if threads == 1 else ("wall", time.perf_counter)

    def wall() -> float:
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    return "wall", wall


def launches(job: Callable[[], object]) -> dict[str, int]:
    """What one run of a job asks of a GPU: see :func:`count_calls`. The job has run before."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as taken:
        job()
        # Its own wait is counted below, and taken off.
        torch.cuda.synchronize()
    counted = count_calls(taken.key_averages())
    return {**counted, "waits": counted["waits"] - 1}


def count_calls(events: Iterable[Any]) -> dict[str, int]:
    """Kernels and graphs launched, and calls that wait for the device, in averages of a profile.

    Args:
        events: with `key`, a name, and `count`.
    """
    kinds = {"launches": _LAUNCHES, "graphs": _GRAPHS, "waits": _WAITS}
    counts = {event.key: int(event.count) for event in events}
    return {kind: sum(counts.get(name, 0) for name in names) for kind, names in kinds.items()}
