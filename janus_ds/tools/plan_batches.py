"""The micro-batches that a recipe makes on so many ranks, without its data: every sample of mean length."""

from __future__ import annotations

from dataclasses import dataclass, replace

from janus_ds.batch import BatchCounts, RowLayout
from janus_ds.config.deepspeed_file import solve_batch
from janus_ds.config.schema import RunConfig
from janus_ds.data.stream.index import Manifest
from janus_ds.errors import ConfigError
from janus_ds.tools.traffic import stream_names
from janus_ds.tools.traffic_tensor import BatchShape

__all__ = ["MeanSample", "StepBatches", "mean_sample", "step_batches"]

_DEFAULT_SHARE = 0.5


@dataclass(frozen=True)
class MeanSample:
    """Tokens of a sample, bos and eos included, and where the numbers come from."""

    source: int
    target: int
    origin: str


@dataclass(frozen=True)
class StepBatches:
    """What one rank works on in one step."""

    micro_batches: int
    shape: BatchShape
    counts: BatchCounts
    """Of the whole step, over all ranks."""


def mean_sample(run: RunConfig, manifest: Manifest | None) -> MeanSample:
    """The mean of the data; without data, a full block."""
    totals = manifest.splits.get("train") if manifest else None
    if totals is None or not totals.samples:
        length = run.data.block_tokens + 2
        return MeanSample(length, length, "full blocks; give --data to know the data's mean")
    sides = 2 if run.data.task == "pair" else 1
    length = round(totals.tokens / totals.samples / sides) + 2
    return MeanSample(length, length, "the data's mean")


def step_batches(run: RunConfig, sample: MeanSample, data_size: int, growth: int = 1) -> StepBatches | None:
    """Micro-batches of a rank; None where the global batch cannot be shared by so many ranks.

    Args:
        run: resolved.
        sample: lengths.
        data_size: data-parallel ranks.
        growth: how many times the recipe's batch.
    """
    train = replace(
        run.train,
        global_batch=run.train.global_batch * growth,
        batch_groups=run.train.batch_groups * growth,
        batch_tokens=run.train.batch_tokens * growth,
    )
    try:
        samples, accumulation = solve_batch(replace(run, train=train), data_size)
    except ConfigError:
        return None
    layout = _layout(run, sample)
    if run.data.batch == "tokens":
        cost = layout.rows if train.batch_cost == "rows" else sample.target
        samples = max(1, round(train.batch_tokens / cost / data_size / accumulation))
    samples *= run.objective.dropout_draws
    masked, ahead = layout.msk, max(layout.arc - layout.msk, 0)
    shape = BatchShape(samples, sample.source, layout, masked * samples, ahead * samples)
    whole = samples * accumulation * data_size
    counts = BatchCounts(
        whole, whole * sample.source, whole * sample.target, whole * layout.arc, whole * layout.msk
    )
    return StepBatches(accumulation, shape, counts)


def _layout(run: RunConfig, sample: MeanSample) -> RowLayout:
    streams = stream_names(run.objective)
    target = sample.target
    ar = target - 1 if "ar" in streams else 0
    share = run.masking.target_share or _DEFAULT_SHARE
    masked = round(share * (target - 2)) if {"nar", "aux"} & set(streams) else 0
    return RowLayout(
        arc=ar,
        vis=target - masked if masked else 0,
        cmp=masked if "aux" in streams else 0,
        msk=masked,
        arq=ar if run.objective.ar_stream == "query" else 0,
        qry=masked if "aux" in streams else 0,
    )
