"""The training loop: one explicit class, to be read from `fit` downwards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.config.schema import OptimConfig
from janus_ds.data.stream.loader import StepData
from janus_ds.errors import JanusError
from janus_ds.metrics.validation import VALIDATION_METRICS
from janus_ds.objective.janus_objective import ramp_factors
from janus_ds.train.loop.engine import TrainingEngine, Update
from janus_ds.train.loop.reporting import Reporter, StepResult
from janus_ds.train.loop.state import Meters, RunIdentity
from janus_ds.train.loop.validation import BestWeights, Validator, add_terms, global_counts
from janus_ds.train.safety.guards import Decision, StepGuard, Verdict
from janus_ds.train.safety.memory import MemoryGuard
from janus_ds.train.safety.signals import StopSignals
from janus_ds.train.safety.watchdog import Watchdog

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
        identity: the resolved recipe and what else goes into every checkpoint.
        vocab_size: of the tokenizer, for the work count.
        sampler: decodes samples for TensorBoard, or None; the same on all ranks, since gathering the
            weights takes all of them.
        scorer: scores outputs for the validation set, or None; the same on all ranks.
    """

    identity: RunIdentity
    run: Path
    engine: TrainingEngine
    validator: Validator
    checkpoints: CheckpointManager
    memory: MemoryGuard
    vocab_size: int
    signals: StopSignals
    watchdog: Watchdog
    sampler: Sampler | None = None
    scorer: OutputScorer | None = None


class Trainer:
    """Trains from a step to `train.max_steps`, with guards, figures and checkpoints."""

    def __init__(self, parts: TrainerParts, step: int, meters: Meters) -> None:
        self._parts = parts
        self._config = parts.identity.recipe
        self._train = self._config.train
        self._engine = parts.engine
        topology = parts.engine.topology
        self.step = step
        """Updates done, skipped ones included."""
        self.meters = meters
        """Sums over the run."""
        self._first, self._saved = step, step  # at this start; of the last checkpoint
        self._guard = StepGuard(topology, self._train, parts.signals, meters.recent_losses)
        self._best = BestWeights(self._train, meters, parts.run / "checkpoints", topology)
        self._reporter = Reporter(self._config, parts.run, parts.vocab_size, parts.engine, step, meters)

    def fit(self, data: Iterator[StepData]) -> Outcome:
        """Train to the end, or until asked to stop."""
        watchdog = self._parts.watchdog
        try:
            if not self._validate_again():
                return self._stop()
            while self.step < self._train.max_steps and not self.meters.finished:
                self._reporter.timer.restart()
                watchdog.enter(f"reading the data of step {self.step + 1}", slow=self.step == self._first)
                step_data, fault = _fetch(data)
                self._reporter.timer.data_ready()
                watchdog.enter(f"beginning step {self.step + 1}")
                if self._guard.before_step(fault) is Decision.STOP_SAVE:
                    return self._stop()
                self.train_step(step_data)
                if self.meters.unvalidated is not None:
                    return self._stop()
                self._sample()
                if self._due(self._train.save_every):
                    self._save()
            self._finish()
            return Outcome.COMPLETE
        finally:
            self._reporter.close()

    def train_step(self, data: StepData) -> Verdict:
        """One update from one global batch."""
        config, topology = self._config, self._engine.topology
        counts = global_counts(data.counts, topology)
        rate = learning_rate(config.optim, self._train.max_steps, data.step)
        factors = ramp_factors(config.objective, data.step)
        self._guard.reset_spikes_on_ramp(factors, ramp_factors(config.objective, data.step - 1))
        terms: dict[str, Tensor] = {}
        update = Update(False, 0.0, 1.0)
        for micro, batch in enumerate(data.batches):
            self._engine.seed_dropout(self._train.seed, data.step, micro)
            with self._work("in the forward pass", micro, batch):
                report = self._engine.forward(batch, counts, factors)
                add_terms(terms, report)
            with self._work("in the backward pass", micro, batch):
                loss = self._guard.loss_or_nan(report.total, last=micro == len(data.batches) - 1)
                self._engine.backward(loss)
                self._guard.after_backward(self._engine.largest_gradient)
            with self._work("in the update", micro, batch):
                update = self._engine.update(rate)
        self._parts.watchdog.enter(f"after the update of step {self.step + 1}")
        verdict = self._guard.judge(data.step, update, [batch.sample_id_B.tolist() for batch in data.batches])
        if verdict.keeps_loss_scale:
            self._engine.forgive()
        self.step += 1
        self._report(StepResult(counts, rate, update, verdict, terms))
        if verdict.decision is Decision.ABORT:
            raise self._guard.error(data.step, verdict, update)
        return verdict

    @contextmanager
    def _work(self, where: str, micro: int, batch: TwoStreamBatch) -> Iterator[None]:
        """A part of a step: the watchdog knows of it, and so does the error if memory runs out."""
        words = f"{where} of step {self.step + 1}, micro-batch {micro + 1}"
        self._parts.watchdog.enter(words, slow=self.step == self._first)
        with self._parts.memory.during(words, batch):
            yield

    def _report(self, result: StepResult) -> None:
        """One line of figures, on the steps that are logged, with those of the validation if one is due."""
        wanted = self._validates or self._due(self._train.log_every)
        values = self._reporter.finish_step(result, wanted)
        if values is None:
            return
        if self._validates:
            found = self._validate()
            if found is None:
                self.meters.unvalidated = values
                return
            values |= found
        self._reporter.write(self.step, values)

    @property
    def _validates(self) -> bool:
        return self._due(self._train.valid_every) or self.step == self._train.max_steps

    def _validate_again(self) -> bool:
        """Do the validation that a stop has interrupted, as if it had not; False if stopped again."""
        meters = self.meters
        if meters.unvalidated is None:
            return True
        found = self._validate()
        if found is None:
            return False
        self._reporter.write(self.step, meters.unvalidated | found)
        meters.unvalidated = None
        self._saved = -1
        self._sample()
        return True

    def _validate(self) -> dict[str, float] | None:
        """Figures on held-out data; None on all ranks where any of them was asked to stop meanwhile."""
        step = self.step
        words = f"validating after step {step}"
        self._parts.watchdog.enter(words, slow=True)
        with self._parts.memory.during(words):
            losses = self._parts.validator.losses(self._engine, self._asked_to_stop)
        if losses is None:
            return None
        first = ("loss", "ar", "nar", "aux")
        shown = [f"{name} {losses[name]:.3f}" for name in first if name in losses]
        shown += [f"{n} {v:.3f}" for n, v in losses.items() if n not in first and not n.endswith("_nll")]
        self._reporter.note(f"step {step:,} held out: {', '.join(shown)}")
        scores = self._score()
        if scores is None:
            return None
        self._best.judge(step, losses, scores, self._engine.full_weights)
        metric = VALIDATION_METRICS[self._train.valid_task]
        if scores:
            text = ", ".join(f"{mode} {score:.2f}" for mode, score in scores.items())
            best = self.meters
            known = f"; best {best.best_bleu:.2f}" if best.best_step else ""
            self._reporter.note(f"step {step} {metric.title}: {text}{known}")
        scored = {f"{metric.name}_{mode}": score for mode, score in scores.items()}
        return {f"valid/{name}": value for name, value in {**losses, **scored}.items()}

    def _asked_to_stop(self) -> bool:
        """Between two batches of a validation."""
        self._parts.watchdog.touch()
        return self._guard.asked_to_stop()

    def _score(self) -> dict[str, float] | None:
        """Validation scores by mode, equal on all ranks; empty where none are asked for, None if stopped."""
        scorer = self._parts.scorer
        if scorer is None:
            return {}
        self._parts.watchdog.enter(f"scoring outputs after step {self.step}", slow=True)
        weights = self._engine.full_weights()

        def stop() -> bool:
            self._parts.watchdog.touch()
            return self._parts.signals.asked()

        return self._engine.topology.broadcast_object(scorer(weights, stop) if weights is not None else None)

    def _sample(self) -> None:
        every, sampler = self._train.sample_every, self._parts.sampler
        if sampler is None or not (self._due(every) if every else self._validates):
            return
        self._parts.watchdog.enter(f"decoding samples after step {self.step}", slow=True)
        weights = self._engine.full_weights()
        if weights is not None:
            self._reporter.write_text(self.step, "samples", sampler(weights))

    def _due(self, every: int) -> bool:
        """Whether something that is done `every` so many steps is to be done now; 0: never."""
        return every > 0 and self.step % every == 0

    def _stop(self) -> Outcome:
        reason = self._parts.signals.name or "another rank"
        logger.warning("asked to stop (%s): saving at step %d", reason, self.step)
        self._finish()
        step, end = self.step, self._train.max_steps
        self._reporter.close()  # so that this is the last line
        logger.warning("not complete: step %d of %d is saved; the same command goes on", step, end)
        self._parts.signals.leave()
        return Outcome.STOPPED

    def _finish(self) -> None:
        """Write the last checkpoint, and wait for it."""
        self._save()
        self._enter_saving()
        self._parts.checkpoints.finish()

    def _save(self) -> None:
        if self.step == self._saved:
            return
        self._enter_saving()
        self._reporter.flush()
        state = self._parts.identity.state(self.step, self.meters)
        if self._parts.checkpoints.save(self.step, self._engine, state):
            self._saved = self.step

    def _enter_saving(self) -> None:
        def written() -> int:
            """Bytes of the checkpoint that is being written; they grow while that goes on."""
            files = (self._parts.run / "checkpoints").glob(".saving-*/*")
            return sum(path.stat().st_size for path in files)

        probe = written if self._engine.topology.is_main else None
        self._parts.watchdog.enter(f"saving after step {self.step}", slow=True, probe=probe)


def learning_rate(config: OptimConfig, max_steps: int, step: int) -> float:
    """The rate of update `step`, counted from 0, as a pure function: nothing is counted or kept.

    All schedules rise linearly from `warmup_init_lr` at step 0 to `lr` at `warmup_steps`. Then
    `inverse_sqrt` gives lr * sqrt(warmup / step), as the NMT runs of the paper have it, `polynomial`
    falls linearly to zero at `max_steps`, as its pretraining has it, and `constant` stays.
    """
    warmup = config.warmup_steps
    if step < warmup:
        return config.warmup_init_lr + (config.lr - config.warmup_init_lr) * step / warmup
    if config.schedule == "inverse_sqrt":
        return config.lr * math.sqrt(max(warmup, 1) / max(step, 1))
    if config.schedule == "polynomial":
        return config.lr * max(max_steps - step, 0) / max(max_steps - warmup, 1)
    return config.lr


def _fetch(data: Iterator[StepData]) -> tuple[Any, JanusError | None]:
    """The next step's data, or the fault that stands in its place."""
    try:
        return next(data), None
    except JanusError as fault:
        return None, fault
