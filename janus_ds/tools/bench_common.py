"""What all measurements share: interleaved rounds, summaries of ratios, where and with what they ran."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_ds.errors import ResourceError
from janus_ds.observe.run_record import installed_versions

__all__ = ["hardware", "interleave", "ratio_summary", "summary", "versions", "write_json"]

_PACKAGES = ("torch", "numpy", "deepspeed", "megatron-core", "webdataset")


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


def hardware() -> dict[str, Any]:
    """Processor, cores and memory; graphics cards where torch sees any."""
    import torch

    page_bytes, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(page_bytes * pages / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that matter for speed."""
    return installed_versions(_PACKAGES)


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


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
