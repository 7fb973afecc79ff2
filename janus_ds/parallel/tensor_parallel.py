"""Tensor parallelism: the layers a model is built from, and everything that knows of shards.

`make_layers(1)` gives plain `torch.nn` layers and imports nothing else;
`make_layers(n)` gives megatron-core's layers under the same parameter names. This is the only
module that imports megatron.core, and it does so on first use (5-12 s).

Rules for a model:

- `column_linear` takes a replicated input and gives the sharded output features; it sums the
  gradient of its input over the ranks itself. `row_linear` takes sharded features and gives a
  replicated output.
- A replicated activation drops out under the default generator, which is equal on all ranks of a
  tensor group; a sharded one inside `with layers.sharded_rng():`, whose stream differs by rank.
- Weights are drawn from N(0, std) on the CPU as whole matrices and then cut, biases are zero: the
  same `torch.manual_seed` on every rank gives the same model at every tensor-parallel size.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def shard_dims(model: nn.Module) -> dict[str, int | None]:
    """For each parameter name, the dimension it is sharded along, or None where it is replicated."""
    dims: dict[str, int | None] = {}
    for name, parameter in model.named_parameters():
        sharded = getattr(parameter, "tensor_model_parallel", False)
        dims[name] = int(getattr(parameter, "partition_dim")) if sharded else None  # noqa: B009
    return dims


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


_RNG_NAME = "model-parallel-rng"
_SEED_OFFSET = 2718


class _MegatronLayers(ParallelLayers):
    """Size n: megatron-core's layers, DeepSpeed's random-state tracker."""

    def __init__(self, size: int) -> None:
        core, tensor_parallel = _import_megatron()
        state = core.parallel_state
        self.size = size
        self.rank = state.get_tensor_model_parallel_rank()
        self._group = state.get_tensor_model_parallel_group()
        self._tensor_parallel = tensor_parallel
        self._column = _without_bias(tensor_parallel.ColumnParallelLinear)
        self._row = _without_bias(tensor_parallel.RowParallelLinear)
        self._config = core.ModelParallelConfig(
            tensor_model_parallel_size=size,
            use_cpu_initialization=True,
            params_dtype=torch.float32,
        )

    def column_linear(self, in_features: int, out_features: int, *, std: float) -> nn.Module:
        options = {"config": self._config, "init_method": partial(nn.init.normal_, std=std)}
        return _without_extra_state(self._column(in_features, out_features, gather_output=False, **options))

    def row_linear(self, in_features: int, out_features: int, *, std: float) -> nn.Module:
        options = {"config": self._config, "init_method": partial(nn.init.normal_, std=std), "bias": True}
        options |= {"input_is_parallel": True, "skip_bias_add": False}
        return _without_extra_state(self._row(in_features, out_features, **options))

    def vocab_embedding(self, rows: int, dim: int, *, std: float) -> nn.Module:
        table = self._tensor_parallel.VocabParallelEmbedding(
            rows, dim, init_method=partial(nn.init.normal_, std=std), config=self._config
        )
        return _without_extra_state(table)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self._group)
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, dist.ReduceOp.SUM, group=self._group)
        return x

    def gather_shards(self, x: Tensor, dim: int | None) -> Tensor:
        if dim is None:
            return x
        shards = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(shards, x.contiguous(), group=self._group)
        return torch.cat(shards, dim)

    def sharded_rng(self) -> AbstractContextManager[None]:
        fork: AbstractContextManager[None] = _rng_tracker().fork()
        return fork

    def seed_rng(self, seed: int) -> None:
        torch.manual_seed(seed % SEED_LIMIT)
        tracker = _rng_tracker()
        tracker.reset()
        tracker.add(_RNG_NAME, (seed + _SEED_OFFSET + self.rank) % SEED_LIMIT)

    def recompute_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _tracker_states(_rng_tracker().get_states())


def make_layers(tp_size: int) -> ParallelLayers:
    """The layers of a tensor-parallel group of `tp_size` ranks.

    Sizes above 1 need `init_topology(tp_size)` before.
    """
    return ParallelLayers() if tp_size == 1 else _MegatronLayers(tp_size)


def init_model_parallel(tp_size: int) -> None:
    """Make megatron's groups, and seed DeepSpeed's tracker so that no draw precedes a seed.

    Called by `init_topology` once torch.distributed runs, for sizes above 1.
    """
    import deepspeed

    core, _ = _import_megatron()
    core.parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size)
    deepspeed.checkpointing.configure(deepspeed_mpu())
    make_layers(tp_size).seed_rng(0)


def deepspeed_mpu() -> Any | None:
    """Megatron's parallel state under the names that DeepSpeed calls, or None at size 1.

    `deepspeed.initialize(mpu=...)` must get it whenever the size is above 1: without it, DeepSpeed
    averages the shards as if they were data parallel, and trains silently wrong.
    """
    state = sys.modules.get("megatron.core.parallel_state")
    if state is None or not state.model_parallel_is_initialized():
        return None
    return _DeepSpeedMpu(state)


class _DeepSpeedMpu:
    """Adds the three methods that megatron.core.parallel_state 0.16 lacks for DeepSpeed."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_model_parallel_rank(self) -> int:
        return int(self._state.get_tensor_model_parallel_rank())

    def get_model_parallel_world_size(self) -> int:
        return int(self._state.get_tensor_model_parallel_world_size())

    def get_model_parallel_group(self) -> Any:
        return self._state.get_tensor_model_parallel_group()


def _import_megatron() -> tuple[Any, Any]:
    """(megatron.core, megatron.core.tensor_parallel), without the warnings on Apex and TE."""
    # Column-parallel layers warn, once a layer, where this is not set.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*")
        import megatron.core
        from megatron.core import parallel_state, tensor_parallel  # noqa: F401
    return megatron.core, tensor_parallel


def _without_bias(linear: Any) -> Any:
    """A linear layer of megatron's that returns a tensor in place of (tensor, bias)."""

    class Layer(linear):  # type: ignore[misc]
        def forward(self, input_: Tensor) -> Tensor:
            output: Tensor = super().forward(input_)[0]
            return output

    return Layer


def _without_extra_state(layer: nn.Module) -> nn.Module:
    """Keep megatron's empty `_extra_state` out of state dicts: it breaks ds_to_universal."""

    def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.pop(f"{prefix}_extra_state", None)

    layer.register_state_dict_post_hook(drop)  # type: ignore[no-untyped-call]
    return layer


def _rng_tracker() -> Any:
    # DeepSpeed's tracker, not megatron's: one code path for CPU and GPU.
    from deepspeed.runtime.activation_checkpointing import checkpointing

    return checkpointing.get_cuda_rng_tracker()


@contextmanager
def _tracker_states(states: dict[str, Any]) -> Iterator[None]:
    tracker = _rng_tracker()
    current = tracker.get_states()
    tracker.set_states(dict(states))
    try:
        yield
    finally:
        tracker.set_states(current)
