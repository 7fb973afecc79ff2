"""Speed, waiting, memory and utilisation of a step, from clocks and counts on the host.

Throughput counts source and target tokens with their bos and eos and without padding: rows that
JANUS adds (queries, compensation) are work, not tokens, so the figure compares with plain AR.
"""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from janus_ds.batch import BatchCounts
from janus_ds.config.schema import ModelConfig, ObjectiveConfig

_PEAK_TFLOPS = {
    # Dense tensor-core peaks of the vendors' data sheets: (16 bit, fp32 as TF32 where it exists).
    "B200": (2250.0, 1100.0),
    "H200": (989.0, 494.0),
    "H100 PCIe": (756.0, 378.0),
    "H100": (989.0, 494.0),
    "A100": (312.0, 156.0),
    "A40": (149.7, 74.8),
    "L40S": (362.0, 183.0),
    "L4": (121.0, 60.0),
    "V100": (125.0, 15.7),
}


@dataclass(frozen=True)
class StepTiming:
    """Figures of one step."""

    seconds: float
    cpu_seconds: float
    """CPU time of this process, all its threads."""
    data_wait_share: float
    """Share of the step in which the trainer waited for the loader."""
    tokens_per_second: float
    """Source and target tokens without padding, over all ranks."""
    tokens_per_second_device: float
    mfu: float | None
    """Model FLOP/s as a share of the device's peak; None where the peak is not known."""


class StepMeter:
    """Times steps: `data_ready` when the batch is there, `finish` when the update is done.

    Args:
        devices: number of ranks, by which global figures are divided.
        peak_flops: peak of one device in FLOP/s, or None.
    """

    def __init__(self, devices: int, peak_flops: float | None) -> None:
        self._devices = devices
        self._peak = peak_flops
        self.restart()

    def restart(self) -> None:
        """Begin a step now: what came before (validation, a save) is not part of it."""
        self._start = self._ready = time.perf_counter()
        self._cpu_start = time.process_time()

    def data_ready(self) -> None:
        """The step's data has arrived."""
        self._ready = time.perf_counter()

    def finish(self, counts: BatchCounts, flops: float) -> StepTiming:
        """End the step, with its global counts and FLOPs, and begin the next."""
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        tokens = (counts.source_tokens + counts.target_tokens) / seconds
        timing = StepTiming(
            seconds=seconds,
            cpu_seconds=time.process_time() - self._cpu_start,
            data_wait_share=(self._ready - self._start) / seconds,
            tokens_per_second=tokens,
            tokens_per_second_device=tokens / self._devices,
            mfu=None if self._peak is None else flops / seconds / (self._devices * self._peak),
        )
        self._start = self._ready = now
        self._cpu_start = time.process_time()
        return timing


def step_flops(model: ModelConfig, objective: ObjectiveConfig, vocab_size: int, counts: BatchCounts) -> float:
    """FLOPs of the matrix products of one update: 2 a multiply-add, backward twice the forward.

    Counts the rows that the one-pass step needs (`stream_mask.py`): content rows give keys and values, the
    last layer and the output projection compute predicted rows only.
    """
    D, F = model.d_model, model.ffn_dim
    query_stream = objective.ar_stream == "query"
    visible = counts.target_tokens - counts.masked_tokens if counts.masked_tokens else 0
    aux = counts.masked_tokens if objective.weight_aux else 0
    content = counts.ar_tokens + visible + counts.masked_tokens + aux
    predicted = counts.ar_tokens + counts.masked_tokens + aux
    rows = content + aux + (counts.ar_tokens if query_stream else 0)
    source = counts.source_tokens
    mean_source = source / max(counts.samples, 1)
    mean_target = counts.target_tokens / max(counts.samples, 1)

    def layer(count: float) -> float:
        # Query and output projections of both attentions, feed-forward, scores and mixtures.
        return count * (4 * D * D + 2 * D * F + 2 * D * (mean_source + mean_target))

    source *= objective.encoder_passes
    encoder = model.encoder_layers * source * (4 * D * D + 2 * D * F + 2 * D * mean_source)
    keys = model.decoder_layers * (content + source) * 2 * D * D
    decoder = (model.decoder_layers - 1) * layer(rows) + layer(predicted)
    return 6.0 * (encoder + keys + decoder + predicted * D * vocab_size)


def device_peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of one device at a precision, for the GPUs that are known; None elsewhere."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, (half, full) in _PEAK_TFLOPS.items():
        if known in name:
            return 1e12 * (full if dtype == torch.float32 else half)
    return None


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
