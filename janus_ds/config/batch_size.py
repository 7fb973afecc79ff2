"""`global batch = micro-batch x accumulation x data-parallel ranks`, solved for what is not given."""

from __future__ import annotations

from typing import Any

from janus_ds.config.deepspeed_keys import BATCH_KEYS
from janus_ds.config.faults import FaultList
from janus_ds.config.schema import RunConfig

__all__ = ["AUTO_TARGET_TOKENS", "TOKEN_VALIDATION_SAMPLES", "solve_batch"]

TOKEN_VALIDATION_SAMPLES = 64
"""Samples of a validation batch where training batches are counted in tokens."""

AUTO_TARGET_TOKENS = 32_768
"""What "auto" allows a micro-batch to hold: 64 samples of 512 target tokens."""


def solve_batch(
    config: dict[str, Any],
    run: RunConfig,
    data_size: int,
    source: str,
    faults: FaultList,
) -> tuple[int, int] | None:
    """Micro-batch and accumulation of one rank, or None with a fault that shows the numbers.

    "auto" and absent mean the same. Without a micro-batch and accumulation, the micro-batch is the
    largest part of the rank's share with at most `AUTO_TARGET_TOKENS` target tokens.
    """
    given = {key: _read(config, key, source, faults) for key in BATCH_KEYS}
    if -1 in given.values():
        return None
    if run.data.batch == "tokens":
        return _token_batch(given, run, data_size, source, faults)
    total, micro, accumulation = (given[key] for key in BATCH_KEYS)
    batch = run.train.global_batch
    if batch <= 0:
        return None
    if total is not None and total != batch:
        faults.add(
            f"train_batch_size is {total}, but the recipe's train.global_batch is {batch}",
            f"{source}: train_batch_size",
            'write "auto", or make the two equal; the global batch belongs to the recipe',
            ["train.global_batch"],
        )
        return None
    if batch % data_size:
        faults.add(
            f"a global batch of {batch} samples cannot be shared by {data_size} data-parallel ranks",
            f"{source} with train.global_batch = {batch}",
            f"use a number of ranks that divides {batch}, or a global batch that {data_size} divides",
            ["train.global_batch"],
        )
        return None
    share = batch // data_size
    if micro is None and accumulation is None:
        micro = _largest_part(share, AUTO_TARGET_TOKENS // (run.data.block_tokens + 2))
    if micro is None:
        micro = share // (accumulation or 1)
    if accumulation is None:
        accumulation = share // micro
    if micro * accumulation != share:
        _contradiction(given, batch, data_size, source, faults)
        return None
    return micro, accumulation


def _token_batch(
    given: dict[str, int | None], run: RunConfig, data_size: int, source: str, faults: FaultList
) -> tuple[int, int] | None:
    """Accumulation where the number of samples varies; the micro-batch is that of validation."""
    total, micro, accumulation = (given[key] for key in BATCH_KEYS)
    for key, value in ((BATCH_KEYS[0], total), (BATCH_KEYS[1], micro)):
        if value is not None:
            faults.add(
                f"{key} is {value} samples, but data.batch is tokens: updates hold train.batch_tokens",
                f"{source}: {key}",
                'write "auto"; gradient_accumulation_steps may be given',
                ["data.batch"],
            )
            return None
    return TOKEN_VALIDATION_SAMPLES, accumulation or max(1, run.train.batch_groups // data_size)


def _read(config: dict[str, Any], key: str, source: str, faults: FaultList) -> int | None:
    value = config.get(key, "auto")
    if value == "auto" or value is None:
        return None
    if type(value) is int and value > 0:
        return value
    faults.add(f"{key} is {value!r}", f"{source}: {key}", 'write a whole number above 0, or "auto"')
    return -1


def _largest_part(share: int, cap: int) -> int:
    return max(part for part in range(1, share + 1) if share % part == 0 and part <= max(cap, 1))


def _contradiction(
    given: dict[str, int | None],
    batch: int,
    data_size: int,
    source: str,
    faults: FaultList,
) -> None:
    share = batch // data_size
    micro, steps = given["train_micro_batch_size_per_gpu"], given["gradient_accumulation_steps"]
    words = f"micro-batch {micro or '?'} x accumulation {steps or '?'} x {data_size} data-parallel ranks"
    faults.add(
        f"the batch sizes contradict each other: {words} cannot be the global batch {batch}",
        f"{source}: train_micro_batch_size_per_gpu, gradient_accumulation_steps",
        f'each rank has {share} samples a step: let micro-batch x accumulation be {share}, or write "auto"',
        ["train.global_batch"],
    )
