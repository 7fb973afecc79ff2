"""The optimizer's state inside DeepSpeed, seen as whole tensors under the parameters' names.

ZeRO keeps the fp32 weights and Adam's moments in flat buffers, partitioned over the data-parallel ranks
in a way that depends on their number, the stage and the padding. Here each rank maps every piece of its
buffers to a parameter and an offset; from that whole tensors are gathered, and any whole tensor can be
put back on any other ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from janus_ds.checkpoint.tensors import MOMENTS, ReadTensor
from janus_ds.parallel.tensor_parallel import ParallelLayers, shard_dims, take_shard
from janus_ds.parallel.topology import Topology

_BUCKET = 1 << 25
"""Gather bucket size: 2^25 fp32 elements (128 MB)."""
PINNED_BYTES = 8 << 30
"""A snapshot of at most so many bytes goes into page-locked memory, which torch keeps for the next one."""
_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Piece:
    """The part of a parameter whose state this rank keeps.

    Args:
        owner: the buffer that the optimizer updates; its moments are found under it.
        place: where in the buffer the piece begins.
        start: where in the flattened parameter it begins.
        numel: how many numbers it has.
    """

    owner: Tensor
    place: int
    start: int
    numel: int

    def within(self, buffer: Tensor) -> Tensor:
        """The piece as a view of the owner, or of a moment laid out like it."""
        return buffer.view(-1).narrow(0, self.place, self.numel)


class MasterState:
    """fp32 weights, moments and counters of a DeepSpeed engine in any ZeRO stage.

    Args:
        engine: the DeepSpeed engine, around torch's AdamW.
        model: the part of its module whose parameters are saved.
    """

    def __init__(
        self, engine: Any, model: nn.Module, stage: int, topology: Topology, parallel: ParallelLayers
    ) -> None:
        self._zero: Any = engine.optimizer
        self._adam: torch.optim.Optimizer = engine.optimizer.optimizer if stage else engine.optimizer
        self._stage = stage
        self._topology = topology
        self._parallel = parallel
        self._dims = shard_dims(model)
        self._parameters = dict(model.named_parameters())
        self._pieces = self._find_pieces()

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tensor-parallel shards merged."""
        return sum(
            self._shape(p).numel() * (1 if self._dims[name] is None else self._parallel.size)
            for name, p in self._parameters.items()
        )

    @property
    def counters(self) -> dict[str, Any]:
        """Updates that Adam has made, and the state of fp16's dynamic loss scale."""
        states = (self._adam.state.get(owner) for owner in self._owners)
        steps = [float(state["step"]) for state in states if state]
        scaler = getattr(self._zero, "loss_scaler", None)
        dynamic = getattr(scaler, "dynamic", False)
        scale = {key: getattr(scaler, key) for key in _SCALE_FIELDS} if dynamic else None
        return {"adam_steps": int(max(steps, default=0.0)), "loss_scale": scale}

    def weights(self) -> dict[str, Tensor] | None:
        """All weights in fp32 on the host of rank 0, None elsewhere; all ranks together."""
        return self._gathered(None)

    def moments(self) -> dict[str, Tensor] | None:
        """All moments as `MOMENT.NAME` on the host of rank 0, None elsewhere; all ranks together."""
        whole: dict[str, Tensor] = {}
        for moment in MOMENTS:
            found = self._gathered(moment)
            whole |= {f"{moment}.{name}": tensor for name, tensor in (found or {}).items()}
        return whole if self._topology.is_main else None

    def restore(self, read: ReadTensor, counters: dict[str, Any]) -> None:
        """Put a saved state in the place of the present one; all ranks together."""
        if self._stage == 3:
            self._zero.checkpoint_event_prologue()
        self._reset_moments(counters["adam_steps"])
        for name in self._parameters:
            for moment in (None, *MOMENTS) if counters["adam_steps"] else (None,):
                self._put(name, moment, read)
        self._copy_to_model()
        scaler, scale = getattr(self._zero, "loss_scaler", None), counters["loss_scale"]
        if scale is not None and getattr(scaler, "dynamic", False):
            for key in _SCALE_FIELDS:
                setattr(scaler, key, scale[key])

    def _gathered(self, moment: str | None) -> dict[str, Tensor] | None:
        whole: dict[str, Tensor] = {}
        copies = (1 + len(MOMENTS)) * 4 * self.parameters
        pinned = self._topology.device.type == "cuda" and copies <= PINNED_BYTES
        for names in self._buckets():
            parts = self._joined(names, moment)
            if self._topology.data_rank:
                continue
            for name, part in zip(names, parts, strict=True):
                merged = self._parallel.gather_shards(part, self._dims[name])
                if self._topology.is_main:
                    whole[name] = torch.empty(merged.shape, dtype=torch.float32, pin_memory=pinned)
                    whole[name].copy_(merged.detach(), non_blocking=pinned)
        if pinned:
            torch.cuda.current_stream().synchronize()
        return whole if self._topology.is_main else None

    def _joined(self, names: list[str], moment: str | None) -> Iterable[Tensor]:
        """This rank's tensor-parallel shards of some parameters, whole.

        Joined on the first data-parallel rank; elsewhere undefined.
        """
        parameters = [self._parameters[name] for name in names]
        if moment is None and self._stage < 3 and parameters[0].dtype == torch.float32:
            return [parameter.detach() for parameter in parameters]
        sizes = [self._shape(parameter).numel() for parameter in parameters]
        buffer = torch.zeros(sum(sizes), dtype=torch.float32, device=self._topology.device)
        for name, part in zip(names, buffer.split(sizes), strict=True):
            for piece in self._pieces[name]:
                source = self._source(piece, moment)
                if source is not None:
                    part.narrow(0, piece.start, piece.numel).copy_(source)
        if self._stage:
            # Every number lies on one rank; the sum of its bits and zeros keeps it to the last bit.
            self._topology.sum_to_first_of_data(buffer.view(torch.int32))
        return [
            part.view(self._shape(parameter))
            for part, parameter in zip(buffer.split(sizes), parameters, strict=True)
        ]

    def _source(self, piece: _Piece, moment: str | None) -> Tensor | None:
        """Where a piece's numbers lie; None for the moments of an Adam that has not made a step."""
        if moment is None:
            return piece.within(piece.owner.detach())
        state = self._adam.state.get(piece.owner)
        return piece.within(state[moment]) if state else None

    def _put(self, name: str, moment: str | None, read: ReadTensor) -> None:
        pieces = self._pieces[name]
        if not pieces:
            return
        shard = take_shard(read(name, moment), self._dims[name], self._parallel.rank, self._parallel.size)
        for piece in pieces:
            target = self._source(piece, moment)
            if target is not None:
                target.copy_(shard.reshape(-1).narrow(0, piece.start, piece.numel))

    def _reset_moments(self, steps: int) -> None:
        """Moments of zeros for an Adam that has made `steps` steps; none at all if that is no step."""
        self._adam.state.clear()
        for owner in self._owners if steps else ():
            # The step lies where AdamW looks for it: on the device if it is fused.
            device = owner.device if self._adam.defaults.get("fused") else "cpu"
            self._adam.state[owner] = {
                "step": torch.tensor(float(steps), dtype=torch.float32, device=device),
                **{moment: torch.zeros_like(owner) for moment in MOMENTS},
            }

    def _copy_to_model(self) -> None:
        """Bring the restored fp32 weights into the weights that the model computes with."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            groups = zip(
                self._zero.fp16_partitioned_groups_flat,
                self._zero.fp32_partitioned_groups_flat,
                self._zero.fp16_partitioned_groups,
                strict=True,
            )
            for flat, master, partitions in groups:
                flat.data.copy_(master.data)
                restored = self._zero.unflatten(flat, partitions)
                for partition, values in zip(partitions, restored, strict=True):
                    partition.data = values.data
            self._zero.checkpoint_event_epilogue()

    @property
    def _owners(self) -> list[Tensor]:
        if self._stage == 0:
            return list(self._parameters.values())
        if self._stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._flat_masters)

    @property
    def _flat_masters(self) -> list[Tensor]:
        # With fp32 accumulation of bf16 gradients, stage 1 is a class of its own in DeepSpeed.
        flat: list[Tensor] = getattr(self._zero, "single_partition_of_fp32_groups", None) or (
            self._zero.fp32_groups_flat_partition
        )
        return flat

    def _find_pieces(self) -> dict[str, list[_Piece]]:
        if self._stage == 0:
            return {name: [_Piece(p, 0, 0, p.numel())] for name, p in self._parameters.items()}
        found: dict[int, list[_Piece]] = {}
        for parameter, piece in self._partitioned() if self._stage == 3 else self._flattened():
            found.setdefault(id(parameter), []).append(piece)
        return {name: found.get(id(parameter), []) for name, parameter in self._parameters.items()}

    def _flattened(self) -> Iterator[tuple[Tensor, _Piece]]:
        """Stages 1 and 2: a group's parameters lie one after the other, ranks own equal parts of all."""
        groups = getattr(self._zero, "round_robin_bit16_groups", None) or self._zero.bf16_groups
        offsets = getattr(self._zero, "round_robin_bit16_offsets", None) or map(_starts, groups)
        for group, starts, owner in zip(groups, offsets, self._flat_masters, strict=True):
            low = owner.numel() * self._topology.data_rank
            for parameter, offset in zip(group, starts, strict=True):
                first = max(offset, low)
                last = min(offset + parameter.numel(), low + owner.numel())
                if first < last:
                    yield parameter, _Piece(owner, first - low, first - offset, last - first)

    def _partitioned(self) -> Iterator[tuple[Tensor, _Piece]]:
        """Stage 3: ranks own equal parts of each parameter, the last one padded."""
        for group in self._zero.fp16_groups:
            for parameter in group:
                number, place, share = self._zero.grad_position[self._zero.get_param_id(parameter)]
                start = share * self._topology.data_rank
                numel = min(share, parameter.ds_numel - start)
                if numel > 0:
                    owner = self._zero.fp32_partitioned_groups_flat[number]
                    yield parameter, _Piece(owner, place, start, numel)

    def _buckets(self) -> Iterator[list[str]]:
        """Names in order, so many at a time that their numbers fit into one buffer."""
        names: list[str] = []
        total = 0
        for name, parameter in self._parameters.items():
            numel = self._shape(parameter).numel()
            if names and total + numel > _BUCKET:
                yield names
                names, total = [], 0
            names.append(name)
            total += numel
        yield names

    def _shape(self, parameter: Any) -> torch.Size:
        """The shape of this rank's tensor-parallel shard, which ZeRO-3 takes from the parameter."""
        return torch.Size(parameter.ds_shape if self._stage == 3 else parameter.shape)


def _starts(group: Iterable[Tensor]) -> list[int]:
    """Where each tensor begins if they lie one after the other."""
    return [0, *itertools.accumulate(tensor.numel() for tensor in group)][:-1]
