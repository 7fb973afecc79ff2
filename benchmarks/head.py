"""`python -m benchmarks head`: the fused head against the plain losses, in time and peak memory.

Output projection and all losses of the `paper` preset, forward and backward, on random hidden rows of
the shape. `naive` is the form of the released code: all logits, a log-softmax for each loss, and one and
a softmax more for each direction of each KL pair. `ar_fused` and `ar_naive` are the same for plain AR.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.authors import smoothed_loss, two_way_kl
from benchmarks.common import cells, cpu_threads, measure, summary
from benchmarks.shapes import SHAPES, BenchShape
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.objective.chunk_math import Terms, compiler_is_at_hand
from janus_ds.objective.fused_head import HeadPlan, RowGroup, fused_head
from janus_ds.parallel.tensor_parallel import ParallelLayers
from janus_ds.progress import table

_SMOOTHING = 0.1
_KL = 2.0


class _Rows:
    """Hidden rows of all streams, their targets, and the table."""

    def __init__(self, setting: BenchShape) -> None:
        width = MODEL_PRESETS[setting.preset]["d_model"]
        self.vocab = setting.vocab_size
        self.tokens = setting.samples * setting.target_tokens
        self.masked = setting.samples * setting.masked_tokens
        torch.manual_seed(1)
        self.weight = torch.randn(self.vocab, width).mul_(0.02).requires_grad_()
        sizes = {"ar": self.tokens, "nar": self.masked, "aux": self.masked}
        self.hidden = {name: torch.randn(n, width).requires_grad_() for name, n in sizes.items()}
        self.target = torch.randint(0, self.vocab, (self.tokens,))

    def fused(self, compiled: bool, aux: bool) -> Tensor:
        """Total of the fused head; the first tokens of AR are the masked ones."""
        masked, every = (torch.arange(n) for n in (self.masked, self.tokens))
        ar = 1.0 / self.tokens
        if not aux:
            groups = [RowGroup(("ar",), (every,), self.target, Terms((ar,), (), _SMOOTHING))]
            hidden = {"ar": self.hidden["ar"]}
        else:
            own = 1.0 / self.masked
            terms = Terms((ar, own, own), ((0, 2, _KL * own), (1, 2, _KL * own)), _SMOOTHING)
            target_T, target_U = self.target.split([self.masked, self.tokens - self.masked])
            groups = [
                RowGroup(("ar", "nar", "aux"), (masked,) * 3, target_T, terms),
                RowGroup(("ar",), (every[self.masked :],), target_U, Terms((ar,), (), _SMOOTHING)),
            ]
            hidden = self.hidden
        plan = HeadPlan(tuple(groups), self.vocab, ParallelLayers(), compiled=compiled)
        return fused_head(hidden, self.weight, plan)[0]

    def naive(self, aux: bool) -> Tensor:
        """Total from whole logits under autograd."""
        names = ["ar", "nar", "aux"] if aux else ["ar"]
        logits = {name: F.linear(self.hidden[name], self.weight) for name in names}
        total = self.weight.new_zeros(())
        for z_NV in logits.values():
            total = total + smoothed_loss(z_NV, self.target[: len(z_NV)], _SMOOTHING)
        for first, second in (("ar", "aux"), ("nar", "aux")) if aux else ():
            divergence = two_way_kl(logits[first][: self.masked], logits[second])
            total = total + _KL * divergence.sum() / self.masked
        return total


SHARED, ROUNDS = (), 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="iwslt", help="default: iwslt")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled form out")


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Interleaved times, CPU time of one thread, and the peak of memory beyond the inputs.

    Returns:
        `ratios.{naive_over_fused, naive_over_compiled, fused_over_ar, head_memory_over_naive,
        head_memory_over_naive_beyond_table}` (memory: fused over naive, with the gradient of the table
        in both, and without), `milliseconds`, `peak_megabytes`, hardware and versions.
    """
    rows = _Rows(SHAPES[options.shape])
    losses: dict[str, Callable[[], Tensor]] = {
        "ar_naive": lambda: rows.naive(aux=False),
        "ar_fused": lambda: rows.fused(compiled=False, aux=False),
        "naive": lambda: rows.naive(aux=True),
        "fused": lambda: rows.fused(compiled=False, aux=True),
    }
    if not options.no_compile and compiler_is_at_hand(torch.device("cpu")):
        losses["compiled"] = lambda: rows.fused(compiled=True, aux=True)
    jobs, best = {name: _job(loss, rows) for name, loss in losses.items()}, list(losses)[-1]
    pairs = {f"naive_over_{name}": ("naive", name) for name in ("fused", "compiled")}
    measured = measure(jobs, options.rounds, options, {**pairs, "fused_over_ar": (best, "ar_fused")})
    with cpu_threads(1):
        peaks = {name: _peak_bytes(job) for name, job in jobs.items()}
    for name, table_bytes in (("", 0), ("_beyond_table", rows.weight.nbytes)):
        share = (peaks[best] - table_bytes) / (peaks["naive"] - table_bytes)
        measured["ratios"][f"head_memory_over_naive{name}"] = summary([share])
    return {
        "bench": "head",
        "shape": {"name": options.shape, **asdict(SHAPES[options.shape]), "rounds": options.rounds},
        "peak_megabytes": {name: round(peak / 1e6, 1) for name, peak in peaks.items()},
        "table_gradient_megabytes": round(rows.weight.nbytes / 1e6, 1),
        **measured,
    }


def describe(result: dict[str, Any]) -> str:
    """A table of the result."""
    rows = [["head", "ms (median)", "min", "max", "peak MB"]]
    for name, ms in result["milliseconds"].items():
        rows.append([name, *cells(ms), f"{result['peak_megabytes'][name]:.1f}"])
    ratios = "\n".join(f"{name} {ratio['median']:.3f}" for name, ratio in result["ratios"].items())
    gradient = result["table_gradient_megabytes"]
    head = f"{result['shape']['name']}; the table's gradient alone is {gradient} MB"
    return f"{head}\n{table(rows)}\n{ratios}"


def _job(loss: Callable[[], Tensor], rows: _Rows) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(loss(), [rows.weight, *rows.hidden.values()], allow_unused=True)

    return run


def _peak_bytes(job: Callable[[], None]) -> int:
    """Largest number of bytes that torch's allocator had given out at once while a job ran."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        job()
    results: Any = profile.profiler
    changes = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        live += change.nbytes()
        peak = max(peak, live)
    return peak
