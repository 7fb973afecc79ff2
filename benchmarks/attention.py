"""`python -m benchmarks attention`: the back ends of self-attention against each other.

Forward and backward of one decoder layer's attention over all JANUS rows, without projections, on the
same random queries, keys and values. Ratios are relative to `grouped`; memory is what the forward pass
keeps for the backward pass, without its inputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import cells, measure, share
from benchmarks.shapes import SHAPES, BenchShape, make_batch
from janus_ds.batch import TwoStreamBatch
from janus_ds.config.presets import MODEL_PRESETS, resolve
from janus_ds.config.schema import DataConfig, ObjectiveConfig, RunConfig
from janus_ds.model.attention import BACKENDS, RowsOfBatch, fitting
from janus_ds.progress import table

SHARED, ROUNDS = ("device", "precision"), 5


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of this bench."""
    parser.add_argument("--shape", choices=sorted(SHAPES), default="iwslt", help="default: iwslt")
    parser.add_argument("--attention-dropout", type=share, default=0.0, help="default: 0")


def bench(options: argparse.Namespace) -> dict[str, Any]:
    """Time all back ends.

    Returns:
        `ratios.NAME_over_grouped`, `milliseconds`, `saved_megabytes`, `auto` (what `auto` chooses),
        hardware and versions.
    """
    shape, dropout = SHAPES[options.shape], options.attention_dropout
    batch, inputs = _inputs(shape, options)
    forwards = {name: attention_of(name, batch, inputs, dropout) for name in BACKENDS}
    jobs = {name: _job(forward, inputs) for name, forward in forwards.items()}
    ratios = {f"{name}_over_grouped": (name, "grouped") for name in BACKENDS if name != "grouped"}
    return {
        "bench": "attention",
        "shape": {"name": options.shape, **asdict(shape), "rounds": options.rounds},
        "attention_dropout": dropout,
        "auto": fitting(batch.layout),
        "saved_megabytes": {name: _saved_megabytes(forward, inputs) for name, forward in forwards.items()},
        **measure(jobs, options.rounds, options, ratios),
    }


def describe(result: dict[str, Any]) -> str:
    """A table of the result."""
    rows = [["back end", "ms (median)", "min", "max", "x grouped", "kept for backward, MB"]]
    for name, ms in result["milliseconds"].items():
        ratio = result["ratios"].get(f"{name}_over_grouped", {"median": 1.0})["median"]
        rows.append([name, *cells(ms), f"{ratio:.2f}", f"{result['saved_megabytes'][name]:.1f}"])
    head = f"{result['shape']['name']}: forward + backward of one layer; auto takes {result['auto']}"
    return f"{head}\n{table(rows)}"


def _inputs(shape: BenchShape, options: argparse.Namespace) -> tuple[TwoStreamBatch, list[Tensor]]:
    """A batch, and its queries (B, H, R, E), keys and values (B, H, S, E), S content rows."""
    run = resolve(RunConfig(data=DataConfig(task=shape.task), objective=ObjectiveConfig(preset="paper")))
    batch = make_batch(shape, run).to(options.device)
    width, heads = (MODEL_PRESETS[shape.preset][name] for name in ("d_model", "heads"))
    torch.manual_seed(1)

    def states(rows: int) -> Tensor:
        x = torch.randn(shape.samples, rows, heads, width // heads).transpose(1, 2)
        return x.to(options.device, getattr(torch, options.precision)).requires_grad_()

    layout = batch.layout
    return batch, [states(layout.rows), states(layout.content_rows), states(layout.content_rows)]


def attention_of(
    name: str, batch: TwoStreamBatch, inputs: Sequence[Tensor], dropout: float
) -> Callable[[], Tensor]:
    """Forward pass of a back end over all rows of a batch: queries, keys and values to (B, R, H, E)."""

    def kernel(
        q_BHTE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        options = {"is_causal": causal, "enable_gqa": q_BHTE.shape[1] != k_BHSE.shape[1]}
        return F.scaled_dot_product_attention(q_BHTE, k_BHSE, v_BHSE, mask, dropout, **options).transpose(
            1, 2
        )

    return lambda: RowsOfBatch.build(batch, inputs[0].dtype, name).every.attend(kernel, *inputs)


def _job(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        out = forward()
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return run


def _saved_megabytes(forward: Callable[[], Tensor], inputs: list[Tensor]) -> float:
    own = {x.untyped_storage().data_ptr() for x in inputs}
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward()
    del out
    return round(sum(sizes.values()) / 1e6, 2)
