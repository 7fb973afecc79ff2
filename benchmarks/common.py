"""What all measurements share: interleaved rounds, summaries of ratios, devices, circumstances."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ds.errors import ResourceError, UsageError
from janus_ds.observe.run_record import installed_versions

if TYPE_CHECKING:
    import torch

__all__ = [
    "PRECISIONS",
    "add_device_argument",
    "check_device",
    "circumstances",
    "count_calls",
    "cpu_threads",
    "device_clock",
    "dtype_of",
    "interleave",
    "launches",
    "positive",
    "ratio_summary",
    "summary",
    "write_json",
]

PRECISIONS = ("float32", "bfloat16")
_PACKAGES = ("torch", "numpy", "deepspeed", "megatron-core", "webdataset")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Names of runtime calls in a profile: kernels, and what makes the host wait."""


def interleave(
    jobs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each job in each round.

    Every job runs once unmeasured; then the jobs take turns, so that a machine that slows down or
    speeds up does so for all of them. Their order turns round from one round to the next.

    Args:
        jobs: what to measure, by name.
        rounds: measurements of each.
        clock: seconds; CPU time of the process by default, which a loaded machine disturbs least.
    """
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name in list(jobs)[:: 1 if number % 2 == 0 else -1]:
            start = clock()
            jobs[name]()
            seconds[name].append(clock() - start)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio_summary(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios of two jobs, each taken within a round."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


def circumstances() -> dict[str, Any]:
    """`hardware` (processor, cores, memory, graphics cards) and `versions` of what matters for speed."""
    import torch

    page_bytes, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    hardware = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(page_bytes * pages / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    return {"hardware": hardware, "versions": installed_versions(_PACKAGES)}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result for other programs.

    Raises:
        ResourceError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ResourceError(
            f"the result cannot be written: {error.strerror}", str(path), "give another path to --json"
        ) from error


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """So many threads of torch, and as many as before afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("give a whole number above 0")
    return value


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
    """Kernels launched, and calls that wait for the device, in averages of a profile.

    Args:
        events: with `key`, a name, and `count`.
    """
    kinds = {"launches": _LAUNCHES, "waits": _WAITS}
    counts = {event.key: int(event.count) for event in events}
    return {kind: sum(counts.get(name, 0) for name in names) for kind, names in kinds.items()}
