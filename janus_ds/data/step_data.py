"""The batches of one step on one rank, and their way from a worker process to the trainer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from janus_ds.batch import BatchCounts, RowLayout, TwoStreamBatch
from janus_ds.data.quarantine import Damage

__all__ = ["PackedStep", "StepData"]


@dataclass(frozen=True)
class StepData:
    """One step of one data-parallel rank."""

    step: int
    batches: list[TwoStreamBatch]
    """The micro-batches, in order."""
    counts: BatchCounts
    """Sums over this rank's micro-batches; sum over ranks for the global counts."""
    sample_ids: Tensor
    """int64: all samples of this rank, micro-batch by micro-batch."""
    damage: tuple[Damage, ...] = ()
    """Damaged members that the worker met for this step and has not reported before."""

    @classmethod
    def of(cls, step: int, batches: list[TwoStreamBatch], damage: Iterable[Damage] = ()) -> StepData:
        """The step made of these micro-batches."""
        counts = sum((batch.counts for batch in batches), BatchCounts())
        ids = torch.cat([batch.sample_id_B for batch in batches])
        return cls(step, batches, counts, ids, tuple(damage))


@dataclass(frozen=True)
class _Header:
    """What is left of a batch without its tensors."""

    layout: RowLayout
    counts: BatchCounts
    draws: int
    shapes: dict[str, torch.Size]


@dataclass(frozen=True)
class PackedStep:
    """A step as one flat tensor.

    Tensors pass between processes through shared memory, one file descriptor each; a step with many
    micro-batches would run into the limit of open files. So a step is one tensor, and the trainer's
    batches are views of it.
    """

    step: int
    headers: list[_Header]
    values: Tensor
    """int64."""
    damage: tuple[Damage, ...] = ()

    @classmethod
    def pack(cls, data: StepData) -> PackedStep:
        """All tensors of the step, one after the other."""
        headers: list[_Header] = []
        parts: list[Tensor] = []
        for batch in data.batches:
            tensors = dict(batch.tensors())
            shapes = {name: value.shape for name, value in tensors.items()}
            headers.append(_Header(batch.layout, batch.counts, batch.draws, shapes))
            parts.extend(value.reshape(-1) for value in tensors.values())
        return cls(data.step, headers, torch.cat(parts), data.damage)

    def unpack(self) -> StepData:
        """The step again; its tensors share the flat tensor's memory."""
        batches, position = [], 0
        for header in self.headers:
            fields = {}
            for name, shape in header.shapes.items():
                fields[name] = self.values[position : position + shape.numel()].view(shape)
                position += shape.numel()
            batches.append(TwoStreamBatch(header.layout, header.counts, **fields, draws=header.draws))
        return StepData.of(self.step, batches, self.damage)

    def pin_memory(self) -> PackedStep:
        """The same in page-locked memory (called by the data loader on CUDA machines)."""
        return replace(self, values=self.values.pin_memory())
