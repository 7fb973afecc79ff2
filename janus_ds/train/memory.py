"""Memory that ran out: which batch it was, what the device holds, and three ways out with their numbers."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Sequence

import psutil
import torch

from janus_ds.batch import TwoStreamBatch
from janus_ds.config.deepspeed import ExecutionConfig
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ResourceError
from janus_ds.parallel.topology import Topology

_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Of torch's CPU allocator, and of libraries that allocate by themselves on a GPU."""


class OutOfMemoryError(ResourceError):
    """One rank has no memory left. The others are told by the end of its line."""

    local = True


class MemoryGuard:
    """Turns a failed allocation into words."""

    def __init__(self, config: RunConfig, execution: ExecutionConfig, topology: Topology) -> None:
        self._config = config
        self._execution = execution
        self._topology = topology

    @contextlib.contextmanager
    def during(
        self, words: str, batch: TwoStreamBatch | None = None, *, whole: bool = False
    ) -> Iterator[None]:
        """Some work that may run out of memory.

        Args:
            words: the work, such as "in the forward pass of step 40, micro-batch 2".
            whole: it is about the whole model, and takes the same memory for any micro-batch.

        Raises:
            OutOfMemoryError: it did; on this rank alone.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            on_host = self._topology.device.type == "cpu"
            ways = remedies(self._config, self._execution, on_host)
            raise self._error(words, batch, error, ways[1:2] if whole else ways) from error

    def _error(
        self, words: str, batch: TwoStreamBatch | None, error: Exception, ways: Sequence[str]
    ) -> OutOfMemoryError:
        shapes = "" if batch is None else f"; {_shapes(batch)}"
        first = (str(error).splitlines() or ["MemoryError"])[0][:200]
        held = _held(self._topology.device)
        several = "; ".join(f"({i}) {way}" for i, way in enumerate(ways, 1))
        return OutOfMemoryError(
            f"out of memory: {first}",
            f"rank {self._topology.rank}, {words}{shapes}; {held}",
            f"{ways[0] if len(ways) == 1 else f'any of: {several}'}. The same command resumes from the last "
            "checkpoint",
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed, on the host or on a device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def remedies(config: RunConfig, execution: ExecutionConfig, on_host: bool = False) -> list[str]:
    """Three changes that need less memory, the cheapest first; those that are no new run train the same.

    Args:
        on_host: it is the host's memory that has run out, so that nothing can be moved there.
    """
    micro, accumulation, stage = execution.micro_batch, execution.accumulation, execution.zero_stage
    block, source, ranks = config.data.block_tokens, execution.source, execution.data_size
    if config.data.batch == "tokens":
        pieces = (
            f"gradient_accumulation_steps {accumulation} -> {2 * accumulation} in {source} (an update stays "
            f"at {config.train.batch_tokens} tokens)"
        )
    elif micro == 1:
        shorter = f"data.block_tokens {block} -> {max(block // 2, 1)}"
        pieces = f"a new run on shorter blocks: prepare the data with {shorter}"
    else:
        share = micro * accumulation
        smaller = max(part for part in range(1, micro // 2 + 1) if share % part == 0)
        pieces = (
            f"train_micro_batch_size_per_gpu {micro} -> {smaller} with gradient_accumulation_steps "
            f"{accumulation} -> {share // smaller} in {source} (the global batch stays at "
            f"{config.train.global_batch})"
        )
    if ranks > 1 and stage < 3:
        parts = ("Adam's moments", "gradients", "weights")[stage]
        # The packaged files of these names are fp32.
        file = f"ds_configs/zero{stage + 1}.json" if execution.precision == "fp32" else f"in {source}"
        state = (
            f"ZeRO stage {stage} -> {stage + 1} ({file}), which shares {parts} among the {ranks} "
            "data-parallel ranks"
        )
    elif not execution.offload and not on_host:
        state = "optimizer states in host memory (offload_optimizer, as in ds_configs/zero3_offload.json)"
    else:
        state = "more ranks, or --tensor-parallel 2, which halves every matrix"
    if not config.train.activation_checkpointing:
        activation = (
            "train.activation_checkpointing=true, which keeps a layer's input and recomputes the rest"
        )
    elif execution.precision == "fp32":
        activation = "bf16 (ds_configs/zero2_bf16.json), which halves activations"
    else:
        activation = f"a new run on shorter blocks than data.block_tokens {block}"
    return [pieces, state, activation]


def _shapes(batch: TwoStreamBatch) -> str:
    samples, source = batch.source_BS.shape
    rows, predicted = batch.layout.rows, batch.layout.rows - batch.layout.predicted_start
    return (
        f"micro-batch of {samples} samples: source {samples} x {source}, decoder rows {samples} x "
        f"{rows}, of which {predicted} are predicted"
    )


def _held(device: torch.device) -> str:
    """What the device, or for a CPU this process and its machine, holds."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        peak = torch.cuda.max_memory_allocated(device)
        return (
            f"{device} has {_gb(total)}, of which torch has {_gb(allocated)} allocated "
            f"(peak {_gb(peak)}) and {_gb(reserved)} reserved"
        )
    own, machine = psutil.Process().memory_info().rss, psutil.virtual_memory()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        f"this process has {_gb(own)} (peak {_gb(peak)}), the machine {_gb(machine.available)} of "
        f"{_gb(machine.total)} left"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
