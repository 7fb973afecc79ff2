"""Shared by all benches: command line, interleaved rounds, ratios, devices, hardware."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from janus_ds.cli.arguments import at_least, new_parser
from janus_ds.config.locations import user_path
from janus_ds.errors import UsageError
from janus_ds.io import check_writable, is_stream
from janus_ds.observe import installed_versions, processor_title

_PACKAGES = ("python", "torch", "numpy", "deepspeed", "megatron-core", "webdataset")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Names of runtime calls in a profile: kernels, and what makes the host wait."""


def bench_parser(kind: str, description: str, *options: str, rounds: int | None) -> argparse.ArgumentParser:
    """A parser with `--rounds`, `--json` and those of `--device`, `--precision`, `--threads` that are named.

    Without a default number of rounds, each shape has its own.
    """
    parser = new_parser(f"bench {kind}", description)
    known: dict[str, dict[str, Any]] = {
        "device": {"choices": ("cpu", "cuda"), "default": "cpu", "help": "default: cpu"},
        "precision": {
            "choices": ("float32", "bfloat16"), "default": "float32", "help": "default: float32"
        },
        "threads": {"type": at_least(1), "default": 1, "help": "CPU threads (default: 1)"},
    }  # fmt: skip
    for option in options:
        parser.add_argument(f"--{option}", **known[option])
    text = f"measurements of each job (default: {rounds or 'by shape'})"
    parser.add_argument("--rounds", type=at_least(1), default=rounds, help=text)
    parser.add_argument("--json", type=user_path, metavar="FILE", help="write the result as JSON")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a bench.

    Raises:
        UsageError: `--device cuda` without a CUDA device.
        ResourceError: what is measured could not be written to `--json`.
    """
    options = parser.parse_args(arguments)
    if options.json is not None and not is_stream(options.json):
        check_writable(options.json.parent)
    if getattr(options, "device", "cpu") == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here", "--device cuda", "measure with --device cpu")
    return options


def share(text: str) -> float:
    """A share of at least 0 and below 1, for argparse."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError("give a share of at least 0 and below 1")
    return value


def choices(names: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A type for argparse: names joined by commas, each of which must be known."""
    known = list(names)

    def parse_names(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        if not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"give some of {', '.join(known)}")
        return chosen

    return parse_names


def positives(text: str) -> tuple[int, ...]:
    """Whole numbers above 0, joined by commas, for argparse."""
    return tuple(map(at_least(1), text.split(",")))


def interleave(
    jobs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each job in each round.

    Every job runs once unmeasured. Then the jobs take turns, so that a machine that slows down or
    speeds up does so for all of them. Their order is reversed from one round to the next.

    The clock is the CPU time of the process by default, which other load disturbs least.
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


def measure(
    jobs: Mapping[str, Callable[[], object]],
    rounds: int,
    options: argparse.Namespace,
    ratios: Mapping[str, tuple[str, str]],
    sentences: int = 1,
) -> dict[str, Any]:
    """Time jobs in interleaved rounds.

    Args:
        options: with those of device, threads, precision that the bench has; else CPU, 1, float32.
        ratios: the two jobs of each, by its name; those whose jobs were not measured are left out.
        sentences: of a job, for milliseconds of one.

    Returns:
        `ratios` and `milliseconds`, each with median, min and max; and where it was measured (:func:`place`);
        on a GPU also `launches` of each job (:func:`count_calls`).
    """
    on = place(options)
    with cpu_threads(on["threads"]):
        seconds = interleave(jobs, rounds, _clock(on))
        launches = {name: _launches(job) for name, job in jobs.items()} if on["device"] == "cuda" else {}
    return {
        "ratios": {
            name: ratio_summary(seconds[a], seconds[b])
            for name, (a, b) in ratios.items()
            if a in seconds and b in seconds
        },
        "milliseconds": {name: summary(taken, 1e3 / sentences) for name, taken in seconds.items()},
        "launches": launches,
        **on,
    }


def place(options: argparse.Namespace) -> dict[str, Any]:
    """What every result says: clock, device, threads, precision, hardware, versions."""
    device, threads = getattr(options, "device", "cpu"), getattr(options, "threads", 1)
    return {
        "clock": "cpu" if device == "cpu" and threads == 1 else "wall",
        "device": device,
        "threads": threads,
        "precision": getattr(options, "precision", "float32"),
        "hardware": _hardware(),
        "versions": installed_versions(_PACKAGES),
    }


def _clock(on: Mapping[str, Any]) -> Callable[[], float]:
    """CPU time for one thread on a CPU, else wall time; on a GPU only after all queued work is done."""
    if on["device"] == "cpu":
        return time.process_time if on["clock"] == "cpu" else time.perf_counter

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def _hardware() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": processor_title(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _launches(job: Callable[[], object]) -> dict[str, int]:
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as taken:
        job()
        torch.cuda.synchronize()
    counted = count_calls(taken.key_averages())
    # The synchronisation above is not the job's.
    return {**counted, "waits": counted["waits"] - 1}


def count_calls(events: Iterable[Any]) -> dict[str, int]:
    """Kernels launched (`launches`) and calls that wait for the device (`waits`), by a profile's averages."""
    kinds = {"launches": _LAUNCHES, "waits": _WAITS}
    counts = {event.key: int(event.count) for event in events}
    return {kind: sum(counts.get(name, 0) for name in names) for kind, names in kinds.items()}


def summary(values: Sequence[float], factor: float = 1.0) -> dict[str, float]:
    """Median, smallest and largest, each times a factor."""
    scaled = [factor * value for value in values]
    return {"median": statistics.median(scaled), "min": min(scaled), "max": max(scaled)}


def ratio_summary(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios of two jobs, each taken within a round."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


def cells(figures: Mapping[str, float], digits: int = 1) -> list[str]:
    """Median, smallest and largest as cells of a table."""
    return [f"{figures[name]:.{digits}f}" for name in ("median", "min", "max")]


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Set torch's CPU threads, and put them back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forward_backward(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """A job: clear the gradients, compute the loss, back-propagate."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss())

    return run
