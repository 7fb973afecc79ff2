"""What a run shows of its steps: the progress bar, `metrics.jsonl`, TensorBoard, and sums over the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from janus_ds.batch import BatchCounts
from janus_ds.config.schema import RunConfig
from janus_ds.observe.meters import StepMeter, device_peak_flops, memory_bytes, step_flops
from janus_ds.observe.writers import MetricsWriter
from janus_ds.train.loop.engine import TrainingEngine, Update
from janus_ds.train.loop.state import Meters
from janus_ds.train.loop.validation import global_terms
from janus_ds.train.safety.guards import Decision, Verdict

_SHOWN = ("loss", "ar", "nar", "aux")


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Args:
        counts: of the whole step, over all micro-batches and ranks.
        rate: the learning rate.
        update: what the engine did.
        verdict: whether it counted.
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
        config: the resolved recipe.
        run: the run folder.
        vocab_size: of the tokenizer, for the work count.
        engine: what is timed.
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
        self._writer = MetricsWriter(run, written) if engine.topology.is_main else None
        # Where standard error is a file, the bar is refreshed every ten seconds only.
        self._bar = tqdm(
            total=config.train.max_steps,
            initial=step,
            unit="step",
            disable=not engine.topology.is_main,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

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
        meters.seconds += timing.seconds
        meters.cpu_seconds += timing.cpu_seconds
        if not (wanted or skipped or verdict.spike):
            self._advance({})
            return None
        values: dict[str, Any] = {**global_terms(result.terms, self._topology), "lr": result.rate}
        values |= {"grad_norm": result.update.grad_norm, "loss_scale": result.update.loss_scale}
        values |= {name: value for name, value in asdict(timing).items() if value is not None}
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
        self._advance(values)

    def _advance(self, values: Mapping[str, object]) -> None:
        """One more step, with these figures beside the bar."""
        shown = {key: f"{values[key]:.3f}" for key in _SHOWN if isinstance(values.get(key), float)}
        speed = values.get("tokens_per_second")
        if isinstance(speed, float):
            shown["tok/s"] = f"{speed:,.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def write_text(self, step: int, tag: str, text: str) -> None:
        """Write markdown text to TensorBoard."""
        if self._writer:
            self._writer.write_text(step, tag, text)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def flush(self) -> None:
        """Bring everything to disk: a checkpoint must not know of steps whose figures a kill could take."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """End the bar and the files."""
        self._bar.close()
        if self._writer:
            self._writer.close()
