"""How long a step takes on more devices, projected: work / speed + an alpha-beta model of its messages.

A message of S bytes among n ranks costs, with latency a and bandwidth b of the slowest link in between:

    all-reduce        min( 2 (n - 1) (a + S / (n b)),  2 ceil(log2 n) (a + S / b) )     ring, tree
    all-gather,
    reduce-scatter    (n - 1) (a + S / (n b))                                             ring

Ranks of a node are neighbours, tensor-parallel groups lie inside a node, and the rings of the tensor
ranks share a node's network. Nothing is overlapped with work, so the curve is what a run does at least
unless its parameters are wrong: they are guesses until measured, and printed with the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from janus_ds.tools.traffic import Execution, Sent

__all__ = ["Machine", "StepTime", "message_seconds", "step_time", "wire_bytes"]


@dataclass(frozen=True)
class Machine:
    """The parameters of the model.

    Args:
        devices: of one node.
        flops: FLOP/s that one device achieves in training, not its peak.
        latency_intra: seconds of one message between devices of a node.
        latency_inter: the same between nodes.
        bandwidth_intra: bytes a second of one device to its neighbour in the node.
        bandwidth_inter: bytes a second of one node to the next.
    """

    devices: int = 8
    flops: float = 2.0e14
    latency_intra: float = 5e-6
    latency_inter: float = 2e-5
    bandwidth_intra: float = 2.0e11
    bandwidth_inter: float = 2.5e10

    def link(self, ranks: int, rings: int) -> tuple[float, float]:
        """Latency and bandwidth of the slowest link of a ring over neighbouring ranks.

        Args:
            ranks: that the ring spans, those of other rings in between included.
            rings: that run at once over the same nodes.
        """
        if ranks <= self.devices:
            return self.latency_intra, self.bandwidth_intra
        return self.latency_inter, min(self.bandwidth_intra, self.bandwidth_inter / rings)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    work: float
    messages: float

    @property
    def total(self) -> float:
        """Both, one after the other."""
        return self.work + self.messages


def step_time(flops: float, sents: Iterable[Sent], execution: Execution, machine: Machine) -> StepTime:
    """The time of a step.

    Args:
        flops: of the whole step, on all ranks.
        sents: what one rank sends.
        execution: ranks.
        machine: parameters.
    """
    ranks = execution.data_size * execution.tensor_size
    messages = sum(message_seconds(sent, execution, machine) for sent in sents)
    return StepTime(flops / (ranks * machine.flops), messages)


def message_seconds(sent: Sent, execution: Execution, machine: Machine) -> float:
    """Seconds of all calls of one kind."""
    size, spanned, rings = _group(sent, execution)
    if size == 1 or not sent.calls:
        return 0.0
    latency, bandwidth = machine.link(spanned, rings)
    each = sent.bytes / sent.calls
    ring = (size - 1) * (latency + each / (size * bandwidth))
    if sent.operation == "all-reduce":
        tree = 2 * math.ceil(math.log2(size)) * (latency + each / bandwidth)
        return sent.calls * min(2 * ring, tree)
    return sent.calls * ring


def wire_bytes(sent: Sent, execution: Execution) -> float:
    """Bytes that leave one rank if rings are used, which send the least."""
    size, _, _ = _group(sent, execution)
    share = (size - 1) / size
    return sent.bytes * share * (2 if sent.operation == "all-reduce" else 1)


def _group(sent: Sent, execution: Execution) -> tuple[int, int, int]:
    """Ranks of the group, neighbouring ranks that it spans, and groups side by side."""
    world = execution.data_size * execution.tensor_size
    if sent.group == "tensor":
        return execution.tensor_size, execution.tensor_size, 1
    if sent.group == "data":
        return execution.data_size, world, execution.tensor_size
    return world, world, 1
