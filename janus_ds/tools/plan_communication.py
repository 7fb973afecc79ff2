"""The part of `plan` on messages and scaling: tables of what is projected, and from which parameters."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.index import Manifest
from janus_ds.errors import UsageError
from janus_ds.observe.meters import step_flops
from janus_ds.tools.common import bytes_text, table
from janus_ds.tools.plan_batches import MeanSample, StepBatches, mean_sample, step_batches
from janus_ds.tools.scaling import Machine, StepTime, step_time, wire_bytes
from janus_ds.tools.traffic import Execution, Sent, agreements, rank_parameters, zero_traffic
from janus_ds.tools.traffic_tensor import tensor_traffic

__all__ = ["Projection", "add_machine_arguments", "describe_communication", "describe_scaling"]

_STAGES = range(4)
_MARK = "projected"
_OPTIONS = {
    "flops": ("--flops", 1e12, "TFLOP/s that one device achieves in training"),
    "latency_intra": ("--latency-intra", 1e-6, "microseconds of a message within a node (alpha)"),
    "latency_inter": ("--latency-inter", 1e-6, "microseconds of a message between nodes (alpha)"),
    "bandwidth_intra": ("--bandwidth-intra", 1e9, "GB/s from a device to its neighbour in a node (beta)"),
    "bandwidth_inter": ("--bandwidth-inter", 1e9, "GB/s from a node to the next (beta)"),
}


@dataclass(frozen=True)
class Projection:
    """What is projected: a run, its vocabulary and lengths, the execution and the machine."""

    run: RunConfig
    vocab_size: int
    sample: MeanSample
    execution: Execution
    machine: Machine

    @classmethod
    def of(
        cls, parsed: argparse.Namespace, run: RunConfig, vocab_size: int, manifest: Manifest | None
    ) -> Projection:
        """From the command line.

        Raises:
            UsageError: ranks that cannot be.
        """
        values = {name: getattr(parsed, name) * unit for name, (_, unit, _) in _OPTIONS.items()}
        if min(values.values()) <= 0 or parsed.devices < 1:
            raise UsageError(
                "a machine has speeds, latencies and devices above 0", "plan", "give numbers above 0"
            )
        ranks, tensor = parsed.ranks, parsed.tensor_parallel
        if tensor < 1 or ranks % tensor or parsed.devices % tensor:
            raise UsageError(
                f"groups of {tensor} do not fit {parsed.devices} devices a node and {ranks} ranks",
                "--tensor-parallel",
                "give a size that divides both",
            )
        execution = Execution(
            stage=parsed.zero,
            precision=parsed.precision,
            data_size=ranks // tensor,
            tensor_size=tensor,
            recompute=run.train.activation_checkpointing,
        )
        machine = Machine(devices=parsed.devices, **values)
        return cls(run, vocab_size, mean_sample(run, manifest), execution, machine)

    def on(self, ranks: int, stage: int | None = None) -> Projection:
        """The same on other ranks, or in another ZeRO stage."""
        execution = self.execution
        changed = replace(
            execution,
            data_size=ranks // execution.tensor_size,
            stage=execution.stage if stage is None else stage,
        )
        return replace(self, execution=changed)

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.execution.data_size * self.execution.tensor_size

    def batches(self, growth: int = 1) -> StepBatches | None:
        """What a rank works on; None where the batch cannot be shared."""
        return step_batches(self.run, self.sample, self.execution.data_size, growth)

    def sent(self, batches: StepBatches) -> list[Sent]:
        """All messages of a rank in a step."""
        run = self.run
        execution = replace(self.execution, micro_batches=batches.micro_batches)
        parameters = rank_parameters(run.model, self.vocab_size, execution.tensor_size)
        shapes = [batches.shape] * batches.micro_batches
        return [
            *zero_traffic(parameters, execution),
            *tensor_traffic(run.model, self.vocab_size, run.objective, shapes, execution),
            *agreements(run.objective, execution),
        ]

    def time(self, batches: StepBatches) -> StepTime:
        """Seconds of a step."""
        flops = step_flops(self.run.model, self.run.objective, self.vocab_size, batches.counts)
        return step_time(flops, self.sent(batches), self.execution, self.machine)


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Nodes, execution, and the parameters of the alpha-beta model."""
    parser.add_argument("--nodes", type=int, help="print a scaling curve up to so many nodes")
    parser.add_argument("--devices", type=int, default=8, help="of one node (default: 8)")
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, help="ranks that share a model (default: 1)"
    )
    parser.add_argument("--zero", type=int, default=2, choices=tuple(_STAGES), help="stage of the curve (2)")
    parser.add_argument(
        "--precision", default="bf16", choices=("fp32", "bf16", "fp16"), help="(default: bf16)"
    )
    for name, (option, unit, words) in _OPTIONS.items():
        default = getattr(Machine, name) / unit
        parser.add_argument(
            option, dest=name, type=float, default=default, help=f"{words} (default: {default:g})"
        )


def describe_communication(projection: Projection) -> str:
    """Bytes of one rank in one step, by kind, in every ZeRO stage."""
    batches, execution = projection.batches(), projection.execution
    place = f"{projection.ranks} ranks, TP {execution.tensor_size}, {execution.precision}"
    head = f"messages of one rank in one step ({place})"
    if batches is None:
        return f"{head}: the global batch cannot be shared by {execution.data_size} data-parallel ranks"
    kinds: dict[str, list[str]] = {}
    wires = []
    for stage in _STAGES:
        if stage == 0 and execution.precision != "fp32":
            wires.append("refused")
            continue
        sents = projection.on(projection.ranks, stage).sent(batches)
        for sent in sents:
            row = kinds.setdefault(f"  {sent.what} ({sent.operation}, {sent.group})", ["-"] * len(_STAGES))
            row[stage] = f"{bytes_text(sent.bytes)} in {sent.calls}"
        wires.append(bytes_text(sum(wire_bytes(sent, execution) for sent in sents)))
    rows = [("  kind", *(f"ZeRO {stage}" for stage in _STAGES), "")]
    rows += [(kind, *cells, _MARK) for kind, cells in kinds.items()]
    rows.append(("  over the wire from one rank, by rings", *wires, _MARK))
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


def describe_scaling(projection: Projection, nodes: int) -> str:
    """Seconds of a step and efficiency from one node to `nodes`, with the parameters they come from."""
    machine = projection.machine
    lines = [
        f"scaling, ZeRO {projection.execution.stage}, {projection.execution.precision}, "
        f"TP {projection.execution.tensor_size}: projected, not measured, from",
        f"  {machine.devices} devices a node at {machine.flops / 1e12:g} TFLOP/s achieved (--flops)",
        f"  alpha {machine.latency_intra * 1e6:g} us in a node, {machine.latency_inter * 1e6:g} us "
        "between nodes (--latency-intra, --latency-inter)",
        f"  beta {machine.bandwidth_intra / 1e9:g} GB/s in a node, {machine.bandwidth_inter / 1e9:g} GB/s "
        "between nodes (--bandwidth-intra, --bandwidth-inter)",
        "  work and messages one after the other, nothing overlapped",
    ]
    head = ("  nodes", "ranks", "samples", "work", "messages", "step", "samples/s", "efficiency", "")
    rows: list[tuple[str, ...]] = [head]
    for name, grows in (("the recipe's batch", False), ("batch grows with nodes", True)):
        base = 0.0
        rows.append((f"  {name}", *[""] * 8))
        for count in _powers(nodes):
            there = projection.on(count * machine.devices)
            batches = there.batches(count if grows else 1)
            if batches is None:
                rows.append((f"  {count}", str(there.ranks), *["cannot be shared"] + [""] * 5, _MARK))
                continue
            time = there.time(batches)
            speed = batches.counts.samples / time.total
            base = base or speed / count
            cells = [f"{batches.counts.samples}", f"{time.work:.3g} s", f"{time.messages:.3g} s"]
            cells += [f"{time.total:.3g} s", f"{speed:,.0f}", f"{speed / count / base:.0%}"]
            rows.append((f"  {count}", str(there.ranks), *cells, _MARK))
    return "\n".join([*lines, table(rows)])


def _powers(limit: int) -> list[int]:
    """1, 2, 4 and so on, and the limit itself."""
    found = [1]
    while found[-1] * 2 < limit:
        found.append(found[-1] * 2)
    return found if limit == 1 else [*found, limit]
