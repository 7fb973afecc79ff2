"""What the ranks of a job really send: every collective, at the one place through which all of them go.

torch.distributed, DeepSpeed and megatron-core all end in methods of torch's ProcessGroup; those are
wrapped here, so that no caller and no kind of collective is missed. A message has the size of the
whole tensor: of what is summed, of what a reduce-scatter takes, of what an all-gather gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import ProcessGroup

from janus_ds.data.stream.loader import StepData
from janus_ds.train.guards import StepGuard
from janus_ds.train.trainer import Trainer

_NAMES = {
    "allreduce": "all-reduce",
    "allreduce_coalesced": "all-reduce",
    "all_gather_single": "all-gather",
    "_allgather_base": "all-gather",
    "allgather": "all-gather",
    "allgather_into_tensor_coalesced": "all-gather",
    "all_gather_single_coalesced": "all-gather",
    "reduce_scatter_single": "reduce-scatter",
    "_reduce_scatter_base": "reduce-scatter",
    "reduce_scatter": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter",
    "reduce_scatter_single_coalesced": "reduce-scatter",
    "reduce": "reduce",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "alltoall": "all-to-all",
    "alltoall_base": "all-to-all",
    "all_to_all_single": "all-to-all",
    "barrier": "barrier",
    "send": "send",
    "recv": "recv",
}


@dataclass(frozen=True, order=True)
class Message:
    """One collective."""

    operation: str
    ranks: tuple[int, ...]
    bytes: int


@dataclass
class StepSent:
    """What one step sent, and the batches that it sent it for."""

    step: int
    batches: list[Any] = field(default_factory=list)
    messages: Counter[Message] = field(default_factory=Counter)


@contextmanager
def counted_steps() -> Iterator[list[StepSent]]:
    """Notes what this rank sends in each step, from the agreement before it to the end of its report."""
    steps: list[StepSent] = []
    sink: list[Counter[Message]] = []
    before, train_step = StepGuard.before_step, Trainer.train_step

    def before_step(self: StepGuard, *arguments: Any) -> Any:
        steps.append(StepSent(-1))
        sink.append(steps[-1].messages)
        try:
            return before(self, *arguments)
        finally:
            sink.pop()

    def counting(self: Trainer, data: StepData) -> Any:
        steps[-1].step, steps[-1].batches = data.step, list(data.batches)
        sink.append(steps[-1].messages)
        try:
            return train_step(self, data)
        finally:
            sink.pop()

    StepGuard.before_step, Trainer.train_step = before_step, counting  # type: ignore[method-assign]
    try:
        with _collectives(sink):
            yield steps
    finally:
        StepGuard.before_step, Trainer.train_step = before, train_step  # type: ignore[method-assign]


@contextmanager
def _collectives(sink: list[Counter[Message]]) -> Iterator[None]:
    originals = {name: getattr(ProcessGroup, name) for name in _NAMES if hasattr(ProcessGroup, name)}

    def wrapped(name: str) -> Any:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            if sink:
                ranks = tuple(dist.get_process_group_ranks(self))
                sink[-1][Message(_NAMES[name], ranks, _size(_NAMES[name], arguments))] += 1
            return originals[name](self, *arguments, **options)

        return call

    for name in originals:
        setattr(ProcessGroup, name, wrapped(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)


def _size(operation: str, arguments: tuple[Any, ...]) -> int:
    """Bytes of the whole: torch's methods take (output, input, ...) or (tensors, ...)."""
    tensors = list(_tensors(arguments[1 if operation == "reduce-scatter" else 0])) if arguments else []
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
