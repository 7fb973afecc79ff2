"""The training loop: one explicit class, one reading order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ds.batch import BatchCounts, TwoStreamBatch
from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.config.schema import RunConfig
from janus_ds.data.step_data import StepData
from janus_ds.errors import JanusError
from janus_ds.metrics.validation import VALIDATION_METRICS
from janus_ds.objective.ramps import ramp_factors
from janus_ds.observe.meters import StepMeter, device_peak_flops, memory_bytes, step_flops
from janus_ds.observe.writers import MetricsWriter
from janus_ds.train.loop.engine import TrainingEngine, Update
from janus_ds.train.loop.reporting import Progress
from janus_ds.train.loop.schedule import learning_rate
from janus_ds.train.loop.state import Meters, RunIdentity
from janus_ds.train.loop.validation import BestWeights, Validator, add_terms, global_counts, global_terms
from janus_ds.train.safety.guards import Decision, Guards, LossWatch, SkipCause, Verdict
from janus_ds.train.safety.memory import MemoryGuard
from janus_ds.train.safety.signals import StopSignals
from janus_ds.train.safety.watchdog import Watchdog

__all__ = ["Outcome", "OutputScorer", "Sampler", "Trainer", "TrainerParts"]

OutputScorer = Callable[[Mapping[str, Tensor], Callable[[], bool]], dict[str, float] | None]
"""Scores validation outputs by mode from the weights, or None where it was told to stop; on rank 0."""

Sampler = Callable[[Mapping[str, Tensor]], str]
"""Makes markdown with decoded samples from the weights; called on rank 0."""

logger = logging.getLogger(__name__)


class Outcome(Enum):
    """How a run ended."""

    COMPLETE = "complete"
    STOPPED = "stopped"
    """Asked to stop; saved, and to be started again."""


@dataclass(frozen=True)
class TrainerParts:
    """What a trainer works with.

    Args:
        config: the resolved recipe.
        identity: goes into every checkpoint.
        run: the run folder.
        vocab_size: of the tokenizer, for the work count.
        sampler: decodes samples for TensorBoard, or None; the same on all ranks, since gathering the
            weights takes all of them.
        scorer: scores outputs for the validation set, or None; the same on all ranks.
        watchdog: is told what goes on.
    """

    config: RunConfig
    identity: RunIdentity
    run: Path
    engine: TrainingEngine
    validator: Validator
    checkpoints: CheckpointManager
    memory: MemoryGuard
    vocab_size: int
    sampler: Sampler | None = None
    scorer: OutputScorer | None = None
    watchdog: Watchdog | None = None


class Trainer:
    """Trains from a step to `train.max_steps`, with guards, figures and checkpoints.

    Args:
        parts: what it works with.
        signals: stop requests of this process.
        step: updates already done.
        meters: sums of the run up to there.
    """

    def __init__(self, parts: TrainerParts, signals: StopSignals, step: int, meters: Meters) -> None:
        self._parts = parts
        self._train = parts.config.train
        self._topology = parts.engine.topology
        self._engine = parts.engine
        watch = LossWatch(self._train, meters.recent_losses)
        self._guards = Guards(parts.engine.topology, self._train, signals, watch)
        self._signals = signals
        self._watchdog = parts.watchdog or Watchdog(parts.engine.topology, None, parts.run / "stacks", 0.0)
        self._first_step = step
        self._meters = meters
        root = parts.run / "checkpoints"
        self._best = BestWeights(self._train, meters, root, parts.engine.topology)
        self._step = self._saved_at = step
        # The line of a step whose validation was interrupted is still to be written.
        written = step if meters.unvalidated is None else step - 1
        peak = device_peak_flops(parts.engine.topology.device, parts.engine.dtype)
        self._meter = StepMeter(parts.engine.topology.world_size, peak)
        self._writer = MetricsWriter(parts.run, written) if parts.engine.topology.is_main else None
        self._progress = Progress(step, self._train.max_steps, parts.engine.topology.is_main)

    def fit(self, data: Iterator[StepData]) -> Outcome:
        """Train to the end, or until asked to stop.

        Raises:
            TrainingError: too many steps in a row were not finite.
            DataError: damaged data, on all ranks.
            ResourceError: the last checkpoint, or several in a row, could not be written; on all ranks.
        """
        try:
            if not self._validate_again():
                return self._stop()
            while self._step < self._train.max_steps and not self._meters.finished:
                self._meter.restart()
                self._watchdog.enter(f"reading the data of step {self._step + 1}", slow=self._is_first)
                step_data, fault = _fetch(data)
                self._meter.data_ready()
                self._watchdog.enter(f"beginning step {self._step + 1}")
                if self._guards.before_step(fault) is Decision.STOP_SAVE:
                    return self._stop()
                self.train_step(step_data)
                if self._meters.unvalidated is not None:
                    return self._stop()
                self._sample()
                if self._due(self._train.save_every):
                    self._save()
            self._finish()
            return Outcome.COMPLETE
        finally:
            self._progress.close()
            if self._writer:
                self._writer.close()

    def train_step(self, data: StepData) -> Verdict:
        """One update from one global batch."""
        counts = global_counts(data.counts, self._topology)
        rate = learning_rate(self._parts.config.optim, self._train.max_steps, data.step)
        factors = ramp_factors(self._parts.config.objective, data.step)
        self._guards.weigh(factors, ramp_factors(self._parts.config.objective, data.step - 1))
        terms: dict[str, Tensor] = {}
        update = Update(False, 0.0, 1.0)
        for micro, batch in enumerate(data.batches):
            self._engine.seed_dropout(self._train.seed, data.step, micro)
            with self._work("in the forward pass", micro, batch):
                report = self._engine.forward(batch, counts, factors)
                add_terms(terms, report)
            with self._work("in the backward pass", micro, batch):
                loss = self._guards.veto(report.total, last=micro == len(data.batches) - 1)
                self._engine.backward(loss)
                self._guards.after_backward(self._engine.largest_gradient)
            with self._work("in the update", micro, batch):
                update = self._engine.update(rate)
        self._watchdog.enter(f"after the update of step {self._step + 1}")
        ids = [batch.sample_id_B.tolist() for batch in data.batches]
        verdict = self._guards.judge(data.step, update, ids)
        if verdict.cause in (SkipCause.LOSS, SkipCause.SPIKE):
            self._engine.forgive()
        self._step += 1
        self._account(counts, verdict)
        self._report(counts, rate, update, verdict, terms)
        if verdict.decision is Decision.ABORT:
            raise self._guards.error(data.step, verdict, update)
        return verdict

    @contextmanager
    def _work(self, where: str, micro: int, batch: TwoStreamBatch) -> Iterator[None]:
        """A part of a step: the watchdog knows of it, and so does the error if memory runs out."""
        words = f"{where} of step {self._step + 1}, micro-batch {micro + 1}"
        self._watchdog.enter(words, slow=self._is_first)
        with self._parts.memory.during(words, batch):
            yield

    @property
    def _is_first(self) -> bool:
        """Whether this start has made no step yet: things are imported, compiled and fetched."""
        return self._step == self._first_step

    def _account(self, counts: BatchCounts, verdict: Verdict) -> None:
        draws = self._parts.config.objective.dropout_draws
        self._meters.samples += counts.samples // draws
        self._meters.tokens += (counts.source_tokens + counts.target_tokens) // draws
        self._meters.skipped_steps += verdict.decision is not Decision.PROCEED

    def _report(
        self, counts: BatchCounts, rate: float, update: Update, verdict: Verdict, terms: dict[str, Tensor]
    ) -> None:
        """One line of figures, on the steps that are logged; skipped steps always are."""
        config = self._parts.config
        timing = self._meter.finish(
            counts, step_flops(config.model, config.objective, self._parts.vocab_size, counts)
        )
        self._meters.seconds += timing.seconds
        self._meters.cpu_seconds += timing.cpu_seconds
        skipped = verdict.decision is not Decision.PROCEED
        if not (skipped or verdict.spike or self._validates or self._due(self._train.log_every)):
            self._progress.advance({})
            return
        values: dict[str, Any] = {**global_terms(terms, self._topology), "lr": rate}
        values |= {"grad_norm": update.grad_norm, "loss_scale": update.loss_scale}
        values |= {name: value for name, value in asdict(timing).items() if value is not None}
        values["memory_bytes"] = memory_bytes(self._topology.device)
        values |= {"samples_total": self._meters.samples, "tokens_total": self._meters.tokens}
        values["cpu_seconds_total"] = self._meters.cpu_seconds
        values["skipped_steps"] = self._meters.skipped_steps
        if verdict.spike:
            values["spike"] = True
        if skipped:
            values |= {"skipped": True, "reason": verdict.reason, "bad_samples": verdict.sample_ids}
        if self._validates:
            found = self._validate()
            if found is None:
                self._meters.unvalidated = values
                return
            values |= found
        self._write(values)

    def _write(self, values: dict[str, Any]) -> None:
        if self._writer:
            self._writer.write(self._step, values)
        self._progress.advance(values)

    def _validate_again(self) -> bool:
        """Do the validation that a stop has interrupted, as if it had not; False if stopped again."""
        if self._meters.unvalidated is None:
            return True
        found = self._validate()
        if found is None:
            return False
        self._write(self._meters.unvalidated | found)
        self._meters.unvalidated = None
        self._saved_at = -1
        self._sample()
        return True

    def _validate(self) -> dict[str, float] | None:
        """Figures on held-out data; None on all ranks where any of them was asked to stop meanwhile."""
        words = f"validating after step {self._step}"
        self._watchdog.enter(words, slow=True)
        with self._parts.memory.during(words):
            losses = self._parts.validator.losses(self._engine, self._asked_to_stop)
        if losses is None:
            return None
        shown = ", ".join(
            f"{name} {value:.3f}" for name, value in losses.items() if not name.endswith("_nll")
        )
        self._progress.note(f"step {self._step} held out: {shown}")
        scores = self._score()
        if scores is None:
            return None
        self._best.judge(self._step, losses, scores, self._engine.full_weights)
        metric = VALIDATION_METRICS[self._train.valid_task]
        if scores:
            shown = ", ".join(f"{mode} {score:.2f}" for mode, score in scores.items())
            best = self._meters.best_bleu
            self._progress.note(f"step {self._step} {metric.title}: {shown}; best {best:.2f}")
        scored = {f"{metric.name}_{mode}": score for mode, score in scores.items()}
        return {f"valid/{name}": value for name, value in {**losses, **scored}.items()}

    def _asked_to_stop(self) -> bool:
        """Between two batches of a validation."""
        self._watchdog.touch()
        return self._guards.asked_to_stop()

    def _score(self) -> dict[str, float] | None:
        """Validation scores by mode, equal on all ranks; empty where none are asked for, None if stopped."""
        if self._parts.scorer is None:
            return {}
        self._watchdog.enter(f"scoring outputs after step {self._step}", slow=True)
        weights = self._engine.full_weights()

        def stop() -> bool:
            self._watchdog.touch()
            return self._signals.asked()

        return self._topology.broadcast_object(
            self._parts.scorer(weights, stop) if weights is not None else None
        )

    @property
    def _validates(self) -> bool:
        return self._due(self._train.valid_every) or self._step == self._train.max_steps

    def _sample(self) -> None:
        due = self._due(self._train.sample_every) if self._train.sample_every else self._validates
        if self._parts.sampler is None or not due:
            return
        self._watchdog.enter(f"decoding samples after step {self._step}", slow=True)
        weights = self._engine.full_weights()
        if self._writer and weights is not None:
            self._writer.write_text(self._step, "samples", self._parts.sampler(weights))

    def _stop(self) -> Outcome:
        logger.warning(
            "asked to stop (%s): saving at step %d", self._signals.name or "another rank", self._step
        )
        self._finish()
        self._signals.leave()
        return Outcome.STOPPED

    def _finish(self) -> None:
        """Write the last checkpoint, and wait for it."""
        self._save()
        self._enter_saving()
        self._parts.checkpoints.finish()

    def _enter_saving(self) -> None:
        root = self._parts.run / "checkpoints"
        probe = (lambda: _bytes_of_saves(root)) if self._topology.is_main else None
        self._watchdog.enter(f"saving after step {self._step}", slow=True, probe=probe)

    def _save(self) -> None:
        if self._step == self._saved_at:
            return
        self._enter_saving()
        if self._writer:
            # The checkpoint must not know of steps whose figures a kill could still take.
            self._writer.flush()
        state = self._parts.identity.state(self._step, self._meters)
        if self._parts.checkpoints.save(self._step, self._engine, state):
            self._saved_at = self._step

    def _due(self, every: int) -> bool:
        return every > 0 and self._step % every == 0


def _bytes_of_saves(root: Path) -> int:
    """Bytes of the checkpoint that is being written; they grow while that goes on."""
    return sum(path.stat().st_size for path in root.glob(".saving-*/*"))


def _fetch(data: Iterator[StepData]) -> tuple[Any, JanusError | None]:
    """The next step's data, or the fault that stands in its place."""
    try:
        return next(data), None
    except JanusError as fault:
        return None, fault
