"""Which parameters are sharded over a tensor-parallel group, and how shards make a whole again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["mark_sharded", "merge_shards", "shard_dims", "take_shard"]


def mark_sharded(parameter: nn.Parameter, dim: int) -> None:
    """Mark a parameter that a model sharded by hand along `dim`.

    DeepSpeed counts unmarked parameters on the group's first rank only when it takes the gradient
    norm, so a shard without this mark makes clipping wrong.
    """
    marks: Any = parameter
    marks.tensor_model_parallel = True
    marks.partition_dim = dim
    marks.partition_stride = 1


def shard_dims(model: nn.Module) -> dict[str, int | None]:
    """For each parameter name, the dimension it is sharded along, or None where it is replicated."""
    dims: dict[str, int | None] = {}
    for name, parameter in model.named_parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        dims[name] = int(getattr(parameter, "partition_dim")) if sharded else None  # noqa: B009
    return dims


def merge_shards(shards: list[Tensor], dim: int | None) -> Tensor:
    """The whole parameter from the shards of all ranks in order; `dim` as in :func:`shard_dims`."""
    return shards[0] if dim is None else torch.cat(shards, dim)


def take_shard(whole: Tensor, dim: int | None, rank: int, size: int) -> Tensor:
    """The part of a whole parameter that one rank of a tensor-parallel group holds."""
    return whole if dim is None else whole.chunk(size, dim)[rank].contiguous()
