"""What a run shows of its steps: the progress bar, `metrics.jsonl`, TensorBoard, and sums over the run.

Throughput counts source and target tokens with their bos and eos and without padding: rows that
JANUS adds (queries, compensation) are work, not tokens, so the figure compares with plain AR.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janus_ds.batch import BatchCounts
from janus_ds.config.schema import ModelConfig, ObjectiveConfig, RunConfig
from janus_ds.observe.progress import Progress, duration
from janus_ds.observe.writers import MetricsWriter
from janus_ds.train.loop.engine import TrainingEngine, Update
from janus_ds.train.loop.state import Meters
from janus_ds.train.loop.validation import global_terms
from janus_ds.train.safety.guards import Decision, Verdict

_SHOWN = ("loss", "ar", "nar", "aux")
_SECONDS = 10.0
"""Between two lines where standard error is no terminal."""


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        counts: of the whole step, over all micro-batches and ranks.
        terms: this rank's parts of the losses, by name.
    """

    counts: BatchCounts
    rate: float
    update: Update
    verdict: Verdict
    terms: Mapping[str, Tensor]


class Reporter:
    """Times steps, adds them up, and writes their figures; only the first rank writes.

    Args:
        vocab_size: of the tokenizer, for the work count.
        step: updates done at this start.
        meters: sums over the run; updated here.
    """

    def __init__(
        self, config: RunConfig, run: Path, vocab_size: int, engine: TrainingEngine, step: int, meters: Meters
    ) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._topology = engine.topology
        self._meters = meters
        peak = device_peak_flops(engine.topology.device, engine.dtype)
        self.timer = StepMeter(engine.topology.world_size, peak)
        # The line of a step whose validation was interrupted is still to be written.
        written = step if meters.unvalidated is None else step - 1
        monitor, main = config.train.monitor, engine.topology.is_main
        self._writer = MetricsWriter(run, written, monitor) if main else None
        self._bar = ProgressBar(step, config.train.max_steps, engine.topology.is_main)

    def finish_step(self, result: StepResult, wanted: bool) -> dict[str, Any] | None:
        """Add a step to the sums of the run; its figures if they are wanted or tell of a fault, else None.

        All ranks together where it gives figures: loss terms are summed over them.
        """
        config, meters, verdict, counts = self._config, self._meters, result.verdict, result.counts
        skipped = verdict.decision is not Decision.PROCEED
        draws = config.objective.dropout_draws
        meters.samples += counts.samples // draws
        meters.tokens += (counts.source_tokens + counts.target_tokens) // draws
        meters.skipped_steps += skipped
        timing = self.timer.finish(
            counts, step_flops(config.model, config.objective, self._vocab_size, counts)
        )
        meters.seconds += timing["seconds"]
        meters.cpu_seconds += timing["cpu_seconds"]
        if not (wanted or skipped or verdict.spike):
            self._bar.advance({})
            return None
        values: dict[str, Any] = {**global_terms(result.terms, self._topology), "lr": result.rate}
        values |= {"grad_norm": result.update.grad_norm, "loss_scale": result.update.loss_scale}
        values |= timing
        values["memory_bytes"] = memory_bytes(self._topology.device)
        values |= {"samples_total": meters.samples, "tokens_total": meters.tokens}
        values |= {"cpu_seconds_total": meters.cpu_seconds, "skipped_steps": meters.skipped_steps}
        if verdict.spike:
            values["spike"] = True
        if skipped:
            values |= {"skipped": True, "reason": verdict.reason, "bad_samples": verdict.sample_ids}
        return values

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the figures of a step, and move the bar on."""
        if self._writer:
            self._writer.write(step, values)
        self._bar.advance(values)

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Write markdown text to TensorBoard."""
        if self._writer:
            self._writer.write_text(step, tag, text)

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._bar.note(text)

    def flush(self) -> None:
        """Bring everything to disk: a checkpoint must not know of steps whose figures a kill could take."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """End the bar and the files."""
        self._bar.close()
        if self._writer:
            self._writer.close()


class ProgressBar:
    """Steps, losses, tokens/s and the time left, on standard error.

    Args:
        step: completed steps at the start.
    """

    def __init__(self, step: int, max_steps: int, visible: bool) -> None:
        self._line = Progress(_SECONDS) if visible else None
        self._first, self._step, self._steps = step, step, max_steps
        self._figures = ""

    def advance(self, values: Mapping[str, object]) -> None:
        """One more step with these figures."""
        self._step += 1
        if self._line is None:
            return
        shown = [f"{key} {values[key]:.3f}" for key in _SHOWN if isinstance(values.get(key), float)]
        speed = values.get("tokens_per_second")
        if isinstance(speed, float):
            shown.append(f"{speed:,.0f} tokens/s")
        self._figures = "".join(f"{text}, " for text in shown) or self._figures
        left = self._line.seconds / (self._step - self._first) * (self._steps - self._step)
        text = f"step {self._step:,} of {self._steps:,}: {self._figures}{duration(left)} left"
        self._line.show(text, now=self._step == self._steps)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._line is not None:
            self._line.note(text)

    def close(self) -> None:
        """End the bar."""
        if self._line is not None:
            self._line.end()


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

    def finish(self, counts: BatchCounts, flops: float) -> dict[str, float]:
        """End the step, with its global counts and FLOPs, and begin the next.

        Returns:
            seconds; cpu_seconds, of this process and all its threads; data_wait_share, in which the trainer
            waited for the loader; tokens_per_second, source and target without padding, of all ranks and of
            each; mfu, model FLOP/s as a share of the device's peak, where that is known.
        """
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        tokens = (counts.source_tokens + counts.target_tokens) / seconds
        timing = {
            "seconds": seconds,
            "cpu_seconds": time.process_time() - self._cpu_start,
            "data_wait_share": (self._ready - self._start) / seconds,
            "tokens_per_second": tokens,
            "tokens_per_second_device": tokens / self._devices,
        }
        if self._peak is not None:
            timing["mfu"] = flops / seconds / (self._devices * self._peak)
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
    aux = counts.masked_tokens if "aux" in objective.streams else 0
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
