"""The part of `plan` on messages: what one rank sends in one step, by kind and ZeRO stage."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from janus_ds.batch import RowLayout
from janus_ds.cli.traffic import (
    BatchShape,
    Execution,
    Sent,
    agreements,
    rank_parameters,
    stream_names,
    tensor_traffic,
    wire_bytes,
    zero_traffic,
)
from janus_ds.config.deepspeed_file import solve_batch
from janus_ds.config.schema import RunConfig
from janus_ds.data.masking.span_laws import expected_share
from janus_ds.data.stream.index import Manifest
from janus_ds.errors import ConfigError, UsageError
from janus_ds.tables import bytes_text, table

__all__ = ["Projection", "add_execution_arguments", "describe_communication"]

_STAGES = range(4)


@dataclass(frozen=True)
class Projection:
    """What is projected: a run, its vocabulary and lengths, and the execution."""

    run: RunConfig
    vocab_size: int
    sample: MeanSample
    execution: Execution

    @classmethod
    def of(
        cls, parsed: argparse.Namespace, run: RunConfig, vocab_size: int, manifest: Manifest | None
    ) -> Projection:
        """From the command line.

        Raises:
            UsageError: ranks that cannot be.
        """
        ranks, tensor = parsed.ranks, parsed.tensor_parallel
        if tensor < 1 or ranks % tensor:
            raise UsageError(
                f"groups of {tensor} do not fit {ranks} ranks",
                "--tensor-parallel",
                "give a size that divides the ranks",
            )
        execution = Execution(
            precision=parsed.precision,
            data_size=ranks // tensor,
            tensor_size=tensor,
            recompute=run.train.activation_checkpointing,
        )
        return cls(run, vocab_size, mean_sample(run, manifest), execution)

    def batches(self) -> StepBatches | None:
        """What a rank works on; None where the batch cannot be shared."""
        return step_batches(self.run, self.sample, self.execution.data_size)

    def sent(self, batches: StepBatches, stage: int) -> list[Sent]:
        """All messages of a rank in a step, in one ZeRO stage."""
        run = self.run
        execution = replace(self.execution, micro_batches=batches.micro_batches, stage=stage)
        parameters = rank_parameters(run.model, self.vocab_size, execution.tensor_size)
        shapes = [batches.shape] * batches.micro_batches
        return [
            *zero_traffic(parameters, execution),
            *tensor_traffic(run.model, self.vocab_size, run.objective, shapes, execution),
            *agreements(run.objective, execution),
        ]


def add_execution_arguments(parser: argparse.ArgumentParser) -> None:
    """How the run is executed."""
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that share a model (default: 1)"
    )
    parser.add_argument(
        "--precision", default="bf16", choices=("fp32", "bf16", "fp16"), help="(default: bf16)"
    )


def describe_communication(projection: Projection) -> str:
    """Bytes of one rank in one step, by kind, in every ZeRO stage."""
    batches, execution = projection.batches(), projection.execution
    ranks = execution.data_size * execution.tensor_size
    place = f"{ranks} ranks, TP {execution.tensor_size}, {execution.precision}"
    head = f"messages of one rank in one step ({place})"
    if batches is None:
        return f"{head}: the global batch cannot be shared by {execution.data_size} data-parallel ranks"
    kinds: dict[str, list[str]] = {}
    wires = []
    for stage in _STAGES:
        if stage == 0 and execution.precision != "fp32":
            wires.append("refused")
            continue
        sents = projection.sent(batches, stage)
        for sent in sents:
            row = kinds.setdefault(f"  {sent.what} ({sent.operation}, {sent.group})", ["-"] * len(_STAGES))
            row[stage] = f"{bytes_text(sent.bytes)} in {sent.calls}"
        wires.append(bytes_text(sum(wire_bytes(sent, execution) for sent in sents)))
    rows = [("  kind", *(f"ZeRO {stage}" for stage in _STAGES), "")]
    rows += [(kind, *cells, "projected") for kind, cells in kinds.items()]
    rows.append(("  over the wire from one rank, by rings", *wires, "projected"))
    shape, sample = batches.shape, projection.sample
    return "\n".join(
        [
            head,
            f"  {batches.micro_batches} micro-batches of {shape.samples} samples, {sample.source} source and "
            f"{sample.target} target tokens ({sample.origin})",
            table(rows),
            "  A message is as large as the whole tensor. ZeRO 3 sends more in the first two steps.",
        ]
    )


@dataclass(frozen=True)
class MeanSample:
    """Tokens of a sample, bos and eos included, and where the numbers come from."""

    source: int
    target: int
    origin: str


@dataclass(frozen=True)
class StepBatches:
    """What one rank works on in one step."""

    micro_batches: int
    shape: BatchShape


def mean_sample(run: RunConfig, manifest: Manifest | None) -> MeanSample:
    """The mean of the data; without data, a full block."""
    totals = manifest.splits.get("train") if manifest else None
    if totals is None or not totals.samples:
        length = run.data.block_tokens + 2
        return MeanSample(length, length, "full blocks; give --data to know the data's mean")
    sides = 2 if run.data.task == "pair" else 1
    length = round(totals.tokens / totals.samples / sides) + 2
    return MeanSample(length, length, "the data's mean")


def step_batches(run: RunConfig, sample: MeanSample, data_size: int) -> StepBatches | None:
    """Micro-batches of a rank; None where the global batch cannot be shared by so many ranks.

    Args:
        run: resolved.
        sample: lengths.
        data_size: data-parallel ranks.
    """
    try:
        samples, accumulation = solve_batch(run, data_size)
    except ConfigError:
        return None
    layout = _layout(run, sample)
    if run.data.batch == "tokens":
        cost = layout.rows if run.train.batch_cost == "rows" else sample.target
        samples = max(1, round(run.train.batch_tokens / cost / data_size / accumulation))
    samples *= run.objective.dropout_draws
    masked, ahead = layout.msk, max(layout.arc - layout.msk, 0)
    shape = BatchShape(samples, sample.source, layout, masked * samples, ahead * samples)
    return StepBatches(accumulation, shape)


def _layout(run: RunConfig, sample: MeanSample) -> RowLayout:
    streams = stream_names(run.objective)
    target = sample.target
    ar = target - 1 if "ar" in streams else 0
    masked = round(expected_share(run.masking) * (target - 2)) if {"nar", "aux"} & set(streams) else 0
    return RowLayout(
        arc=ar,
        vis=target - masked if masked else 0,
        cmp=masked if "aux" in streams else 0,
        msk=masked,
        arq=ar if run.objective.ar_stream == "query" else 0,
        qry=masked if "aux" in streams else 0,
    )
