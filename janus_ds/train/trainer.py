"""The training loop: one explicit class, to be read from `fit` downwards."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from enum import Enum
from typing import Any

from torch import Tensor

from janus_ds.batch import TwoStreamBatch
from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.config.schema import OptimConfig
from janus_ds.data.stream.loader import QuarantineList, StepData, StepLoader, validation_batches
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.errors import JanusError
from janus_ds.metrics.glge import VALIDATION_METRICS
from janus_ds.objective.janus_objective import ramp_factors
from janus_ds.parallel.topology import Anything, on_first_rank, raise_on_all_ranks
from janus_ds.train.engine import TrainingEngine, Update
from janus_ds.train.guards import Decision, StepGuard, Verdict
from janus_ds.train.memory import MemoryGuard
from janus_ds.train.reporting import Reporter
from janus_ds.train.signals import StopSignals
from janus_ds.train.state import Meters, Run
from janus_ds.train.validation import (
    BestWeights,
    OutputDecoder,
    Validator,
    add_terms,
    global_counts,
    scored_text,
    text_pairs,
)
from janus_ds.train.watchdog import Watchdog

_SHOWN_SAMPLES = 3

logger = logging.getLogger(__name__)


class Outcome(Enum):
    """How a run ended."""

    COMPLETE = "complete"
    STOPPED = "stopped"
    """Asked to stop; saved, and to be started again."""


class Trainer:
    """Trains from a checkpoint's step to `train.max_steps`, with guards, figures and checkpoints.

    All ranks together; data and settings that cannot be are refused on all of them here.

    Args:
        state: of the checkpoint that the engine holds, or of a new run.
    """

    def __init__(
        self,
        run: Run,
        engine: TrainingEngine,
        checkpoints: CheckpointManager,
        state: Mapping[str, Any],
        signals: StopSignals,
        watchdog: Watchdog,
    ) -> None:
        self._run, self._engine, self._checkpoints = run, engine, checkpoints
        self._signals, self._watchdog = signals, watchdog
        self._config, self._train = run.config, run.config.train
        self._topology = topology = engine.topology
        self.step = int(state["step"])
        """Updates done, skipped ones included."""
        self.meters = meters = Meters(**state["meters"])
        """Sums over the run."""
        self._first = self._saved = self.step  # at this start; of the last checkpoint
        self._memory = MemoryGuard(run.config, run.execution, topology)
        micro, accumulation = run.execution.micro_batch, run.execution.accumulation
        self._share = RankShare(topology.data_rank, topology.data_size, micro, accumulation)
        self._quarantine = QuarantineList(run.folder)
        self._arriving = run.train.source.arriving
        self._validator, self._outputs = self._held_out()
        self._guard = StepGuard(topology, self._train, signals, meters.recent_losses)
        self._best = BestWeights(self._train, meters, run.folder / "checkpoints", topology)
        self._reporter = Reporter(run, engine, self.step, meters)

    def _held_out(self) -> tuple[Validator, OutputDecoder]:
        """What validations work with."""
        run, topology, source = self._run, self._topology, self._run.valid.source
        count, device = self._train.valid_samples, topology.device
        self._watchdog.enter("reading the held-out data", slow=True, probe=source.arriving)
        batches = raise_on_all_ranks(
            topology, lambda: list(validation_batches(run.valid, self._share, count))
        )
        raise_on_all_ranks(topology, lambda: self._quarantine.add(source.take_damage()))
        pairs = text_pairs(batches[0].batch, source, run.tokenizer, _SHOWN_SAMPLES)
        outputs = raise_on_all_ranks(
            topology,
            lambda: OutputDecoder(run.config, run.tokenizer, device, pairs, scored_text(run.config)),
        )
        if outputs.warning and topology.is_main:
            sys.stderr.write(f"warning: {outputs.warning}, for train.valid_bleu\n")
        return Validator(batches, topology), outputs

    def fit(self) -> Outcome:
        """Train to the end, or until asked to stop."""
        end, pin = self._train.max_steps, self._topology.device.type == "cuda"
        self._watchdog.enter("preparing the order of the data", slow=True, probe=self._arriving)
        # Before the first step, so that a batch that no rank could make is refused on all ranks together.
        loader = raise_on_all_ranks(
            self._topology,
            lambda: StepLoader(self._run.train, self._share, self.step, end, pin_memory=pin),
        )
        try:
            with closing(self._steps(loader)) as data:
                return self._fit(data)
        finally:
            self._reporter.close()

    def _steps(self, loader: StepLoader) -> Generator[StepData, None, None]:
        for data in loader:
            self._quarantine.add(data.damage, data.step)
            yield data

    def _fit(self, data: Iterator[StepData]) -> Outcome:
        if not self._validate_again():
            return self._stop()
        while self.step < self._train.max_steps and not self.meters.finished:
            self._reporter.timer.restart()
            reading, first = f"reading the data of step {self.step + 1}", self.step == self._first
            self._watchdog.enter(reading, slow=first, probe=self._arriving)
            step_data, fault = _fetch(data)
            self._reporter.timer.data_ready()
            self._watchdog.enter(f"beginning step {self.step + 1}")
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

    def train_step(self, data: StepData) -> Verdict:
        """One update from one global batch."""
        config, counts = self._config, global_counts(data.counts, self._topology)
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
        self._watchdog.enter(f"after the update of step {self.step + 1}")
        verdict = self._guard.judge(data.step, update, [batch.sample_id_B.tolist() for batch in data.batches])
        if verdict.keeps_loss_scale:
            self._engine.forgive()
        self.step += 1
        wanted = self._validates or self._due(self._train.log_every)
        self._report(self._reporter.finish_step(counts, rate, update, verdict, terms, wanted))
        if verdict.decision is Decision.ABORT:
            raise self._guard.error(data.step, verdict, update)
        return verdict

    @contextmanager
    def _work(self, where: str, micro: int, batch: TwoStreamBatch) -> Iterator[None]:
        """A part of a step: the watchdog knows of it, and so does the error if memory runs out."""
        words = f"{where} of step {self.step + 1}, micro-batch {micro + 1}"
        self._watchdog.enter(words, slow=self.step == self._first)
        with self._memory.during(words, batch):
            yield

    def _report(self, values: dict[str, Any] | None) -> None:
        """Write a step's figures, where there are any, with those of the validation if one is due."""
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
        self._watchdog.enter(words, slow=True)
        # Beside batches of tokens, validation has batches of its own, which no accumulation makes smaller.
        with self._memory.during(words, whole=self._config.data.batch == "tokens"):
            losses = self._validator.losses(self._engine, self._asked_to_stop)
        if losses is None:
            return None
        first = ("loss", "ar", "nar", "aux")
        shown = [f"{name} {losses[name]:.3f}" for name in first if name in losses]
        shown += [f"{n} {v:.3f}" for n, v in losses.items() if n not in first and not n.endswith("_nll")]
        self._reporter.note(f"step {step:,} held out: {', '.join(shown)}")
        scores = self._score()
        if scores is None:
            return None
        with self._memory.during(f"keeping the best weights after step {step}", whole=True):
            self._best.judge(step, losses, scores, self._engine.full_weights)
        metric = VALIDATION_METRICS[self._train.valid_task]
        if scores:
            text = ", ".join(f"{mode} {score:.2f}" for mode, score in scores.items())
            # The best of another figure, such as keep_best loss, has no score.
            best = self.meters.best_bleu
            known = f"; best {best:.2f}" if best >= 0 else ""
            self._reporter.note(f"step {step} {metric.title}: {text}{known}")
        scored = {f"{metric.name}_{mode}": score for mode, score in scores.items()}
        return {f"valid/{name}": value for name, value in {**losses, **scored}.items()}

    def _asked_to_stop(self) -> bool:
        """Between two batches of a validation."""
        self._watchdog.touch()
        return self._guard.asked_to_stop()

    def _score(self) -> dict[str, float] | None:
        """Validation scores by mode, equal on all ranks; empty where none are asked for, None if stopped."""
        if not self._outputs.modes:
            return {}

        def stop() -> bool:
            self._watchdog.touch()
            return self._signals.asked()

        words = f"scoring outputs after step {self.step}"
        return self._with_weights(words, lambda weights: self._outputs.score(weights, stop))

    def _sample(self) -> None:
        every = self._train.sample_every
        if not (self._due(every) if every else self._validates):
            return
        text = self._with_weights(f"decoding samples after step {self.step}", self._outputs.samples)
        self._reporter.write_text(self.step, "samples", text)

    def _with_weights(self, words: str, use: Callable[[Mapping[str, Tensor]], Anything]) -> Anything:
        """What the first rank makes of all weights, or its user fault, on all ranks."""
        with self._whole(words):
            weights = self._engine.full_weights()
            return on_first_rank(self._topology, lambda: use(weights or {}))

    @contextmanager
    def _whole(self, words: str, probe: Callable[[], object] | None = None) -> Iterator[None]:
        """Slow work on the whole model; known to the watchdog, and to the error if memory runs out."""
        self._watchdog.enter(words, slow=True, probe=probe)
        with self._memory.during(words, whole=True):
            yield

    def _due(self, every: int) -> bool:
        """Whether something that is done `every` so many steps is to be done now; 0: never."""
        return every > 0 and self.step % every == 0

    def _stop(self) -> Outcome:
        reason, step, end = self._signals.reason, self.step, self._train.max_steps
        if step:
            logger.warning("asked to stop (%s): saving at step %d", reason, step)
        self._finish()
        self._reporter.close()  # so that this is the last line
        if step:
            logger.warning("not complete: step %d of %d is saved; the same command goes on", step, end)
        else:
            logger.warning("asked to stop (%s) before the first step", reason)
        return Outcome.STOPPED

    def _finish(self) -> None:
        """Write the last checkpoint, and wait for it."""
        self._save()
        with self._saving():
            self._checkpoints.finish()
        self._signals.leave()

    def _save(self) -> None:
        if self.step == self._saved:
            return
        with self._saving():
            self._reporter.flush()
            state = self._run.identity.state(self.step, self.meters)
            if self._checkpoints.save(self.step, self._engine, state):
                self._saved = self.step

    def _saving(self) -> AbstractContextManager[None]:
        def written() -> int:
            """Bytes of the checkpoint that is being written; they grow while that goes on."""
            files = (self._run.folder / "checkpoints").glob(".saving-*/*")
            return sum(path.stat().st_size for path in files)

        probe = written if self._topology.is_main else None
        return self._whole(f"saving after step {self.step}", probe)


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
