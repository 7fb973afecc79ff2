"""`python -m benchmarks attention`: the back ends of self-attention against each other.

Forward and backward of one decoder layer's attention of all JANUS rows, without projections, on the
same random queries, keys and values. Time counts in units of `grouped`; memory is what the forward
leaves for the backward, without its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import (
    PRECISIONS,
    add_device_argument,
    check_device,
    circumstances,
    cpu_threads,
    device_clock,
    dtype_of,
    interleave,
    launches,
    positive,
    ratio_summary,
    summary,
    write_json,
)
from benchmarks.shapes import SHAPES, BenchShape, make_batch
from janus_ds.cli.arguments import new_parser
from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.schema import DataConfig, ObjectiveConfig, RunConfig
from janus_ds.tables import table

if TYPE_CHECKING:
    from torch import Tensor

    from janus_ds.batch import TwoStreamBatch

__all__ = ["bench_attention", "main"]

_REFERENCE = "grouped"


def bench_attention(
    shape: str, rounds: int = 5, dropout: float = 0.0, device: str = "cpu", precision: str = "float32"
) -> dict[str, Any]:
    """Times of all back ends that can do what is asked, interleaved; on a CPU, CPU time of one thread.

    Args:
        shape: a key of `shapes.SHAPES`.
        rounds: measurements of each.
        dropout: of attention weights.
        device: cpu or cuda.
        precision: float32 or bfloat16.

    Returns:
        `ratios.NAME_over_grouped`, `milliseconds`, `saved_megabytes`, `auto` (what is chosen), and where
        it was measured.
    """
    from janus_ds.model.attention import fitting

    check_device(device)
    setting = SHAPES[shape]
    clock_name, clock = device_clock(device)
    with cpu_threads(1):
        batch, inputs = _inputs(setting, device, precision)
        # FlexAttention gives no gradients on a CPU, and drops no attention weights.
        names = ["dense", "grouped", *(["flex"] if device == "cuda" and not dropout else [])]
        jobs = {name: _job(name, batch, inputs, dropout) for name in names}
        saved = {name: _saved_megabytes(name, batch, inputs, dropout) for name in names}
        seconds = interleave(jobs, rounds, clock)
        on_device = {name: launches(job) for name, job in jobs.items()} if device == "cuda" else {}
    return {
        "bench": "attention",
        "shape": {"name": shape, **asdict(setting), "rounds": rounds},
        "attention_dropout": dropout,
        "auto": fitting(batch.layout),
        "ratios": {
            f"{name}_over_{_REFERENCE}": ratio_summary(seconds[name], seconds[_REFERENCE])
            for name in names
            if name != _REFERENCE
        },
        "milliseconds": {name: summary([1e3 * s for s in taken]) for name, taken in seconds.items()},
        "saved_megabytes": saved,
        "launches": on_device,
        "clock": clock_name,
        "precision": precision,
        "device": device,
        "threads": 1,
        **circumstances(),
    }


def _inputs(setting: BenchShape, device: str, precision: str) -> tuple[TwoStreamBatch, list[Tensor]]:
    import torch

    run = resolve(RunConfig(data=DataConfig(task=setting.task), objective=ObjectiveConfig(preset="paper")))
    batch = make_batch(setting, run).to(device)
    preset = MODEL_PRESETS[setting.preset]
    width, heads = preset["d_model"], preset["heads"]
    torch.manual_seed(1)

    def states(rows: int) -> Tensor:
        x = torch.randn(setting.samples, rows, heads, width // heads).transpose(1, 2)
        return x.to(device, dtype_of(precision)).requires_grad_()

    layout = batch.layout
    return batch, [states(layout.rows), states(layout.content_rows), states(layout.content_rows)]


def _forward(name: str, batch: TwoStreamBatch, inputs: list[Tensor], dropout: float) -> Tensor:
    import torch.nn.functional as F

    from janus_ds.model.attention import RowsOfBatch

    def kernel(
        q_BHTE: Tensor,
        k_BHSE: Tensor,
        v_BHSE: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        options = {"is_causal": causal, "enable_gqa": q_BHTE.shape[1] != k_BHSE.shape[1]}
        out = F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, dropout, **options)
        return out.transpose(1, 2)

    return RowsOfBatch.build(batch, inputs[0].dtype, name, dropout).every.attend(kernel, *inputs)


def _job(name: str, batch: TwoStreamBatch, inputs: list[Tensor], dropout: float) -> Callable[[], None]:
    import torch

    def run() -> None:
        out = _forward(name, batch, inputs, dropout)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def _saved_megabytes(name: str, batch: TwoStreamBatch, inputs: list[Tensor], dropout: float) -> float:
    import torch

    own = {x.untyped_storage().data_ptr() for x in inputs}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = _forward(name, batch, inputs, dropout)
    del out
    return round(sum(sizes.values()) / 1e6, 2)


def main(arguments: Sequence[str]) -> int:
    """Measure, print a table, write JSON if asked."""
    parser = new_parser("bench attention", "The back ends of self-attention against each other.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="iwslt", help="batch to measure")
    parser.add_argument("--rounds", type=positive, default=5, help="measurements of each (default: 5)")
    parser.add_argument("--attention-dropout", type=float, default=0.0, help="default: 0")
    add_device_argument(parser)
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="default: float32")
    parser.add_argument("--json", type=Path, help="file for the result")
    parsed = parser.parse_args(arguments)
    result = bench_attention(
        parsed.shape, parsed.rounds, parsed.attention_dropout, parsed.device, parsed.precision
    )
    rows = [["back end", "ms (median)", "min", "max", f"x {_REFERENCE}", "kept for backward, MB"]]
    for name, ms in result["milliseconds"].items():
        ratio = result["ratios"].get(f"{name}_over_{_REFERENCE}", {"median": 1.0})["median"]
        figures = [f"{ms[k]:.1f}" for k in ("median", "min", "max")]
        rows.append([name, *figures, f"{ratio:.2f}", f"{result['saved_megabytes'][name]:.1f}"])
    print(f"{parsed.shape}: forward + backward of one layer; auto takes {result['auto']}\n{table(rows)}")
    if parsed.json is not None:
        write_json(parsed.json, result)
    return 0
