"""What a run shows: banner, progress bar, `metrics.jsonl`, TensorBoard, sums over the run, summary.

Throughput counts source and target tokens with their bos and eos and without padding: rows that
JANUS adds (queries, compensation) are work, not tokens, so the figure compares with plain AR.
"""

from __future__ import annotations

import math
import re
import resource
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from janus_ds import __version__
from janus_ds.batch import BatchCounts
from janus_ds.config.locations import public_location
from janus_ds.config.modes import trained_modes
from janus_ds.config.schema import ModelConfig, ObjectiveConfig
from janus_ds.model.weights import parameter_shapes
from janus_ds.observe import MetricsWriter
from janus_ds.parallel.topology import Topology, raise_on_all_ranks
from janus_ds.progress import Progress, duration
from janus_ds.train.engine import TrainingEngine, Update
from janus_ds.train.guards import Decision, Verdict
from janus_ds.train.state import Meters, Run
from janus_ds.train.validation import global_terms

_SHOWN = ("loss", "ar", "nar", "aux")
_SECONDS = 10.0
"""Between two lines where standard error is no terminal."""


class Reporter:
    """Times steps, adds them up, and writes their figures; only the first rank writes.

    Args:
        step: updates done at this start.
        meters: sums over the run; updated here.
    """

    def __init__(self, run: Run, engine: TrainingEngine, step: int, meters: Meters) -> None:
        self._config = config = run.config
        self._vocab_size = run.tokenizer.special.vocab_size
        self._topology = engine.topology
        self._meters = meters
        peak = device_peak_flops(engine.topology.device, engine.dtype)
        self.timer = StepMeter(engine.topology.world_size, peak)
        # The line of a step whose validation was interrupted is still to be written.
        written = step if meters.unvalidated is None else step - 1
        monitor, main = config.train.monitor, engine.topology.is_main
        self._writer = raise_on_all_ranks(
            engine.topology, lambda: MetricsWriter(run.folder, written, monitor) if main else None
        )
        self._bar = ProgressBar(written, config.train.max_steps, main)

    def finish_step(
        self,
        counts: BatchCounts,
        rate: float,
        update: Update,
        verdict: Verdict,
        terms: Mapping[str, Tensor],
        wanted: bool,
    ) -> dict[str, Any] | None:
        """Add a step to the sums of the run; its figures if they are wanted or tell of a fault, else None.

        All ranks together where it gives figures: loss terms are summed over them.

        Args:
            counts: of the whole step, over all micro-batches and ranks.
            terms: this rank's parts of the losses, by name.
        """
        config, meters = self._config, self._meters
        skipped = verdict.decision is not Decision.PROCEED
        draws = config.objective.dropout_draws
        meters.samples += counts.samples // draws
        meters.tokens += (counts.source_tokens + counts.target_tokens) // draws
        meters.skipped_steps += skipped
        flops = step_flops(config.model, config.objective, self._vocab_size, counts)
        timing = self.timer.finish(counts, flops, draws)
        meters.seconds += timing["seconds"]
        meters.cpu_seconds += timing["cpu_seconds"]
        if not (wanted or skipped or verdict.spike):
            self._bar.advance({})
            return None
        values: dict[str, Any] = {**global_terms(terms, self._topology), "lr": rate}
        values |= {"grad_norm": update.grad_norm, "loss_scale": update.loss_scale}
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
    """Steps, the time left, and losses and tokens/s with their step where that is an earlier one, on standard
    error.

    Args:
        step: completed steps at the start.
    """

    def __init__(self, step: int, max_steps: int, visible: bool) -> None:
        self._line = Progress(_SECONDS) if visible else None
        self._first, self._step, self._steps = step, step, max_steps
        self._figures, self._at = "", step

    def advance(self, values: Mapping[str, object]) -> None:
        """One more step with these figures."""
        self._step += 1
        if self._line is None:
            return
        shown = [f"{key} {values[key]:.3f}" for key in _SHOWN if isinstance(values.get(key), float)]
        speed = values.get("tokens_per_second")
        if isinstance(speed, float):
            shown.append(f"{speed:,.0f} tokens/s")
        if shown:
            self._figures, self._at = ", ".join(shown), self._step
        left = self._line.seconds / (self._step - self._first) * (self._steps - self._step)
        text = f"step {self._step:,} of {self._steps:,}, {duration(left)} left"
        if self._figures:
            at = "" if self._at == self._step else f"; step {self._at:,}"
            text += f"{at}: {self._figures}"
        self._line.show(text, now=self._step == self._steps)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._line is not None:
            self._line.note(text)

    def close(self) -> None:
        """End the bar."""
        if self._line is not None:
            self._line.end()


def announce_start(run: Run, topology: Topology, step: int) -> None:
    """Say what is trained, from what, with what and how; the first rank only."""
    if not topology.is_main:
        return
    model, data, train, execution = run.config.model, run.config.data, run.config.train, run.execution
    vocabulary = run.tokenizer.special.vocab_size
    parameters = sum(math.prod(shape) for shape in parameter_shapes(model, vocabulary).values())
    size, held_out = run.train.source.samples, run.valid.source.samples
    by_tokens = data.batch == "tokens"
    spread = (
        f"{execution.accumulation} accumulation x {execution.data_size} data-parallel"
        if by_tokens
        else f"{execution.micro_batch} micro x {execution.accumulation} accumulation "
        f"x {execution.data_size} data-parallel"
    )
    batch = f"{train.batch_tokens:,} tokens" if by_tokens else f"{train.global_batch:,} samples"
    epochs = "" if by_tokens else f" ({_epochs(run, train.max_steps * train.global_batch)})"
    threads = f", threads {torch.get_num_threads()}" if topology.device.type == "cpu" else ""
    place = public_location(data.path or "")
    both = f" = {topology.data_size} data-parallel x {topology.tensor_size} tensor-parallel"
    weights = f"from {run.config.init}" if run.config.init else f"new, from seed {train.seed}"
    if step:
        weights = f"from the run's own checkpoint of step {step:,}"
    rows = [
        (
            "model",
            f"{parameters / 1e6:.1f} M parameters: {model.encoder_layers}+{model.decoder_layers} layers, "
            f"width {model.d_model}, vocabulary {vocabulary:,}",
        ),
        ("weights", weights),
        *(("note", note) for note in execution.notes),
        ("data", f"{place}: {size:,} samples to train on, {held_out:,} held out"),
        ("steps", f"{train.max_steps:,}{epochs}" + (f", going on from {step:,}" if step else "")),
        ("batch", f"{batch} = {spread}"),
        (
            "ranks",
            f"{topology.world_size}{both * (topology.tensor_size > 1)} on {topology.device.type}{threads}",
        ),
        ("engine", f"{execution.precision}, ZeRO {execution.zero_stage}" + ", offload" * execution.offload),
        ("folder", f"{run.folder}"),
    ]
    _say(f"janus_ds {__version__}: {run.config.name}", rows)


def announce_end(run: Run, topology: Topology, step: int, meters: Meters) -> None:
    """Say what a complete run did, where it lies, and what can be done next; the first rank only."""
    if not topology.is_main:
        return
    folder = shlex.quote(str(run.folder))
    trained = f"{meters.samples:,} samples ({_epochs(run, meters.samples)}), {meters.tokens:,} tokens"
    rows = [("trained", f"{trained} in {duration(meters.seconds)} of steps")]
    if meters.skipped_steps:
        rows.append(("skipped", f"{meters.skipped_steps:,} steps; their reasons: metrics.jsonl"))
    if meters.best_step:
        rows.append(("best", f"step {meters.best_step:,}, in {run.folder / 'checkpoints' / 'best'}"))
    commands = [f"janus-ds report {folder}"]
    if modes := trained_modes(run.config.objective):
        commands.insert(0, f"janus-ds decode --checkpoint {folder} --mode {','.join(modes)} --heldout 3")
    rows += [("folder", str(run.folder)), ("next", commands[0]), *(("", text) for text in commands[1:])]
    _say(f"complete after step {step:,}", rows)


def _epochs(run: Run, samples: int) -> str:
    """How often so many samples go through the data; of a mixture, through each source."""
    parts = run.train.source.parts
    weight = sum(part.weight for part in parts)
    counts = [samples * part.weight / weight / max(1, part.samples) for part in parts]
    if len(parts) == 1:
        return f"{counts[0]:.1f} epochs"
    return ", ".join(f"{n:.1f} epochs of {part.name}" for n, part in zip(counts, parts, strict=True))


def _say(title: str, rows: Sequence[tuple[str, str]]) -> None:
    if sys.stderr is not None:
        sys.stderr.write("\n".join([title, *(f"  {name:<9}{text}" for name, text in rows)]) + "\n")
        sys.stderr.flush()


_PEAK_TFLOPS = {
    # Dense tensor-core peaks in 16 bit, of the vendors' data sheets.
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A40": 149.7,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
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

    def finish(self, counts: BatchCounts, flops: float, draws: int = 1) -> dict[str, float]:
        """End the step, with its global counts and FLOPs, and begin the next.

        Args:
            draws: times that each sample was computed; its tokens count once.

        Returns:
            seconds; cpu_seconds, of this process and all its threads; data_wait_share, in which the trainer
            waited for the loader; tokens_per_second, source and target without padding, of all ranks and of
            each; mfu, model FLOP/s as a share of the device's peak, where that is known.
        """
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        tokens = (counts.source_tokens + counts.target_tokens) // draws / seconds
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
    """Peak FLOP/s of one device in 16 bit, for the GPUs that are known; None elsewhere.

    None in fp32 as well: data sheets give the peak of TF32, which products in fp32 do not use here.
    """
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    name = torch.cuda.get_device_name(device)
    found = (peak for known, peak in _PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name))
    return next((1e12 * peak for peak in found), None)


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
