"""The layers that a model is built from, and which of its parameters a tensor-parallel group shards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


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


SEED_LIMIT = 2**63


class _BlankLinear(nn.Linear):
    """A linear layer without torch's own draw of its weights; ours alone moves the generator.

    Building it on the meta device would do as well, and import torch's compiler: a second.
    """

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


def drawn_embedding(rows: int, dim: int, std: float) -> nn.Embedding:
    """An embedding whose weights are drawn from a normal distribution, once."""
    table = nn.Embedding(rows, dim, _weight=torch.empty(rows, dim))
    nn.init.normal_(table.weight, 0.0, std)
    return table


class ParallelLayers:
    """Factory of layers and collectives of one tensor-parallel group; this class is a group of one rank.

    It needs torch alone. `tensor_parallel` has the class for larger groups, which overrides all of it.

    Attributes:
        size: ranks in the group.
        rank: this process's rank in it.
    """

    size: int = 1
    rank: int = 0

    def column_linear(self, in_features: int, out_features: int, *, std: float) -> nn.Module:
        """Linear layer whose output features are sharded: (..., in) -> (..., out / size)."""
        layer = _BlankLinear(in_features, out_features)
        nn.init.normal_(layer.weight, 0.0, std)
        nn.init.zeros_(layer.bias)
        return layer

    def row_linear(self, in_features: int, out_features: int, *, std: float) -> nn.Module:
        """Linear layer whose input features are sharded: (..., in / size) -> (..., out)."""
        return self.column_linear(in_features, out_features, std=std)

    def vocab_embedding(self, rows: int, dim: int, *, std: float) -> nn.Module:
        """Embedding whose rows are sharded; `rows` must divide by `size`. Output replicated."""
        return drawn_embedding(rows, dim, std)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Maximum over the group, in place, without gradient."""
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum over the group, in place, without gradient."""
        return x

    def gather_shards(self, x: Tensor, dim: int | None) -> Tensor:
        """The whole of a parameter from its shards, on every rank; `dim` as in :func:`shard_dims`."""
        return x

    def sharded_rng(self) -> AbstractContextManager[None]:
        """Context whose random draws differ between the ranks of the group."""
        return nullcontext()

    def seed_rng(self, seed: int) -> None:
        """Seed the default generators equally on all ranks of the group, and the sharded stream by rank."""
        torch.manual_seed(seed % SEED_LIMIT)

    def recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """`context_fn` for `torch.utils.checkpoint(use_reentrant=False)`.

        The checkpoint restores the default generators only; without this, recomputation draws other
        dropout masks for sharded activations and silently gives wrong gradients.
        """
        return nullcontext(), nullcontext()
