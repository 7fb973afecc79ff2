"""`python -m benchmarks head`: the fused head against the plain losses, in time and peak memory.

Output projection and all losses of the `paper` preset, forward and backward, on random hidden rows of
the shape. `naive` is the form of the released code: all logits, a log-softmax for each loss, and one and
a softmax more for each direction of each KL pair. `ar_fused` and `ar_naive` are the same for plain AR.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    circumstances,
    cpu_threads,
    interleave,
    positive,
    ratio_summary,
    summary,
    write_json,
)
from benchmarks.shapes import SHAPES, BenchShape
from janus_ds.cli.arguments import new_parser
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.tables import table

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["bench_head", "main"]

_SMOOTHING = 0.1
_KL = 2.0


class _Rows:
    """Hidden rows of all streams, their targets, and the table."""

    def __init__(self, setting: BenchShape) -> None:
        import torch

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
        import torch

        from janus_ds.objective.chunk_math import Terms
        from janus_ds.objective.fused_head import HeadPlan, RowGroup, fused_head
        from janus_ds.parallel.layers import DenseLayers

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
        plan = HeadPlan(tuple(groups), self.vocab, DenseLayers(), compiled=compiled)
        return fused_head(hidden, self.weight, None, plan)[0]

    def naive(self, aux: bool) -> Tensor:
        """Total from whole logits under autograd."""
        import torch.nn.functional as F

        names = ["ar", "nar", "aux"] if aux else ["ar"]
        logits = {name: F.linear(self.hidden[name], self.weight) for name in names}
        total = self.weight.new_zeros(())
        for name in names:
            log_p = F.log_softmax(logits[name], -1)
            nll = -log_p.gather(-1, self.target[: len(log_p), None]).sum()
            spread = -log_p.sum() / self.vocab
            total = total + ((1 - _SMOOTHING) * nll + _SMOOTHING * spread) / len(log_p)
        for first, second in (("ar", "aux"), ("nar", "aux")) if aux else ():
            z, w = logits[first][: self.masked], logits[second]
            there = F.kl_div(F.log_softmax(z, -1), F.softmax(w, -1), reduction="none")
            back = F.kl_div(F.log_softmax(w, -1), F.softmax(z, -1), reduction="none")
            total = total + _KL * 0.5 * (there + back).sum() / self.masked
        return total


def bench_head(shape: str, rounds: int = 5, compiled: bool = True) -> dict[str, Any]:
    """Times interleaved, CPU time of one thread, and the peak of memory beyond the inputs.

    Args:
        shape: a key of `shapes.SHAPES`.
        rounds: measurements of each.
        compiled: measure the compiled chunk mathematics too, where a compiler is at hand.

    Returns:
        `ratios.{naive_over_fused, naive_over_compiled, fused_over_ar, head_memory_over_naive,
        head_memory_over_naive_beyond_table}` (memory: fused over naive, with the gradient of the table
        in both, and without), `milliseconds`, `peak_megabytes`, and where it was measured.
    """
    import torch

    from janus_ds.objective.compiled_chunk import compiler_is_at_hand

    setting = SHAPES[shape]
    with cpu_threads(1):
        rows = _Rows(setting)
        losses: dict[str, Callable[[], Tensor]] = {
            "ar_naive": lambda: rows.naive(aux=False),
            "ar_fused": lambda: rows.fused(compiled=False, aux=False),
            "naive": lambda: rows.naive(aux=True),
            "fused": lambda: rows.fused(compiled=False, aux=True),
        }
        if compiled and compiler_is_at_hand(torch.device("cpu")):
            losses["compiled"] = lambda: rows.fused(compiled=True, aux=True)
        jobs = {name: _job(loss, rows) for name, loss in losses.items()}
        seconds = interleave(jobs, rounds, time.process_time)
        peaks = {name: _peak_bytes(job) for name, job in jobs.items()}
    best, table = "compiled" if "compiled" in jobs else "fused", rows.weight.nbytes
    ratios = {
        "naive_over_fused": ratio_summary(seconds["naive"], seconds["fused"]),
        "fused_over_ar": ratio_summary(seconds[best], seconds["ar_fused"]),
        "head_memory_over_naive": summary([peaks[best] / peaks["naive"]]),
        "head_memory_over_naive_beyond_table": summary([(peaks[best] - table) / (peaks["naive"] - table)]),
    }
    if "compiled" in jobs:
        ratios["naive_over_compiled"] = ratio_summary(seconds["naive"], seconds["compiled"])
    return {
        "bench": "head",
        "shape": {"name": shape, **asdict(setting), "rounds": rounds},
        "ratios": ratios,
        "milliseconds": {name: summary([1e3 * s for s in taken]) for name, taken in seconds.items()},
        "peak_megabytes": {name: round(peak / 1e6, 1) for name, peak in peaks.items()},
        "table_gradient_megabytes": round(rows.weight.nbytes / 1e6, 1),
        "clock": "cpu",
        "precision": "float32",
        "threads": 1,
        **circumstances(),
    }


def _job(loss: Callable[[], Tensor], rows: _Rows) -> Callable[[], None]:
    import torch

    def run() -> None:
        torch.autograd.grad(loss(), [rows.weight, *rows.hidden.values()], allow_unused=True)

    return run


def _peak_bytes(job: Callable[[], None]) -> int:
    """Highest sum of what torch's allocator gave out while a job ran."""
    import torch

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


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, write JSON if asked."""
    parser = new_parser("bench head", "The fused head against the plain losses (CPU).")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="iwslt", help="rows and vocabulary")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled form out")
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    result = bench_head(parsed.shape, parsed.rounds, not parsed.no_compile)
    rows = [["head", "ms (median)", "min", "max", "peak MB"]]
    for name, ms in result["milliseconds"].items():
        figures = [f"{ms[k]:.1f}" for k in ("median", "min", "max")]
        rows.append([name, *figures, f"{result['peak_megabytes'][name]:.1f}"])
    ratios = "\n".join(f"{name} {ratio['median']:.3f}" for name, ratio in result["ratios"].items())
    gradient = result["table_gradient_megabytes"]
    print(f"{parsed.shape}; the table's gradient alone is {gradient} MB\n{table(rows)}\n{ratios}")
    if parsed.json is not None:
        write_json(parsed.json, result)
    return 0
