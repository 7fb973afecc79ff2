"""What is said when memory runs out: the batch, what is held, and changes with their numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from janus_ds.config.deepspeed import ExecutionConfig
from janus_ds.config.load import load_run_config
from janus_ds.parallel.topology import Topology
from janus_ds.train.memory import MemoryGuard, OutOfMemoryError, is_out_of_memory, remedies
from janus_ds.train.trainer import Trainer
from janus_ds.train.watchdog import Watchdog
from tests.support.two_stream import Sample, make_batch

RUN = load_run_config(None, ["train.global_batch=64", "data.block_tokens=126"])
TWO = ExecutionConfig({}, 2, "fp32", 8, 4, 2, False, "ds_configs/zero2.json")
GUARD = MemoryGuard(RUN, TWO, Topology(torch.device("cpu"), rank=1, world_size=2))


def test_failed_allocations_are_known_from_other_faults() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(ValueError, match="another fault"), GUARD.during("in the forward pass of step 7"):
        raise ValueError("another fault")
    with pytest.raises(RuntimeError, match="shapes"), GUARD.during("in the forward pass of step 7"):
        raise RuntimeError("shapes cannot be multiplied")


def test_a_real_failed_allocation_names_batch_and_ways_out() -> None:
    batch = make_batch([Sample([0, 5, 6, 2], [0, 7, 8, 9, 2], [1, 3]), Sample([0, 5, 2], [0, 7, 2], [1])])
    with (
        pytest.raises(OutOfMemoryError) as caught,
        GUARD.during("in the forward pass of step 7, micro-batch 2", batch),
    ):
        torch.empty(1 << 45)
    error = caught.value
    assert error.exit_code == 7
    assert error.local
    assert "can't allocate memory: you tried to allocate 140737488355328 bytes" in error.what
    samples, width = batch.source_BS.shape
    assert error.where.startswith("rank 1, in the forward pass of step 7, micro-batch 2; micro-batch of ")
    assert (
        f"source {samples} x {width}, decoder rows {samples} x {batch.layout.rows}, of which " in error.where
    )
    assert "; this process has " in error.where
    assert " GB left" in error.where
    assert error.fix.startswith(
        "any of: (1) train_micro_batch_size_per_gpu 8 -> 4 with gradient_accumulation_steps 4 -> 8 in "
        "ds_configs/zero2.json (the global batch stays at 64); (2) ZeRO stage 2 -> 3 "
        "(ds_configs/zero3.json), which shares weights among the 2 data-parallel ranks; "
        "(3) train.activation_checkpointing=true"
    )
    assert error.fix.endswith("The same command resumes from the last checkpoint")


def test_what_is_about_the_whole_model_names_no_micro_batch(tmp_path: Path) -> None:
    """Scores of a validation, on the first rank alone: hours after the start, and not in a step."""
    trainer: Any = Trainer.__new__(Trainer)
    trainer.step = 500
    trainer._memory, trainer._watchdog = GUARD, Watchdog(Topology(torch.device("cpu")), None, tmp_path, 0.0)
    trainer._outputs = SimpleNamespace(modes=("ar",))
    trainer._engine = SimpleNamespace(full_weights=lambda: torch.empty(1 << 45))
    with pytest.raises(OutOfMemoryError) as caught:
        trainer._score()
    assert caught.value.where.startswith("rank 1, scoring outputs after step 500; this process has ")
    assert caught.value.fix == (
        "ZeRO stage 2 -> 3 (ds_configs/zero3.json), which shares weights among the 2 data-parallel ranks. "
        "The same command resumes from the last checkpoint"
    )


@pytest.mark.parametrize(("batch", "smaller"), [("tokens", False), ("samples", True)])
def test_a_validation_is_told_no_way_out_that_leaves_its_batches_as_they_are(
    tmp_path: Path, batch: str, smaller: bool
) -> None:
    trainer: Any = Trainer.__new__(Trainer)
    trainer.step, trainer._config = 500, replace(RUN, data=replace(RUN.data, batch=batch))
    trainer._memory = MemoryGuard(trainer._config, TWO, Topology(torch.device("cpu")))
    trainer._watchdog = Watchdog(Topology(torch.device("cpu")), None, tmp_path, 0.0)
    trainer._engine, trainer._validator = None, SimpleNamespace(losses=lambda *_: torch.empty(1 << 45))
    with pytest.raises(OutOfMemoryError) as caught:
        trainer._validate()
    assert "validating after step 500" in caught.value.where
    assert ("gradient_accumulation_steps" in caught.value.fix) == smaller


def test_ways_out_follow_what_is_used_already() -> None:
    checkpointed = replace(RUN, train=replace(RUN.train, activation_checkpointing=True))
    tokens = replace(RUN, data=replace(RUN.data, batch="tokens"))
    # A divisor of the rank's share, not half.
    assert (
        "9 -> 3 with gradient_accumulation_steps 1 -> 3"
        in remedies(RUN, replace(TWO, micro_batch=9, accumulation=1))[0]
    )
    shorter = remedies(RUN, replace(TWO, micro_batch=1))[0]
    assert shorter == "a new run on shorter blocks: prepare the data with data.block_tokens 126 -> 63"
    assert "gradient_accumulation_steps 4 -> 8" in remedies(tokens, TWO)[0]
    assert "stays at 4096 tokens" in remedies(tokens, TWO)[0]
    assert "ZeRO stage 1 -> 2" in remedies(RUN, replace(TWO, zero_stage=1))[1]
    assert "2 -> 3 (in ds_configs/zero2.json)" in remedies(RUN, replace(TWO, precision="bf16"))[1]
    assert "offload_optimizer" in remedies(RUN, replace(TWO, zero_stage=3))[1]
    assert "offload_optimizer" in remedies(RUN, replace(TWO, data_size=1))[1]
    assert "more ranks" in remedies(RUN, replace(TWO, data_size=1), on_host=True)[1]
    assert "--tensor-parallel 2" in remedies(RUN, replace(TWO, zero_stage=3, offload=True))[1]
    assert "bf16" in remedies(checkpointed, TWO)[2]
    assert "a new run on shorter blocks" in remedies(checkpointed, replace(TWO, precision="bf16"))[2]
