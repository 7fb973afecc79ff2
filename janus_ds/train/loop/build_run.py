"""A pretraining run from its options to its last checkpoint: what is built, in which order.

Everything that can be refused is looked at before anything heavy: configuration, data, checkpoint.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from janus_ds.batch import SpecialTokens
from janus_ds.checkpoint.manager import CheckpointManager, SavePolicy
from janus_ds.checkpoint.tensors import find_weights, read_weights
from janus_ds.config.deepspeed import ExecutionConfig
from janus_ds.config.estimator import estimator_name, full_estimator
from janus_ds.config.initial import record_of
from janus_ds.config.schema import RunConfig
from janus_ds.config.setup import load_setup
from janus_ds.data.batch_maker import BatchMaker
from janus_ds.data.loader import RankShare, StepLoader, validation_batches
from janus_ds.data.places import open_data, open_split
from janus_ds.data.prepare_bundled import prepare_bundled_corpus
from janus_ds.data.quarantine import QuarantineList
from janus_ds.data.step_data import StepData
from janus_ds.data.tokenizer import Tokenizer
from janus_ds.errors import CheckpointError, JanusError, UsageError
from janus_ds.io import check_writable, disk_faults
from janus_ds.model.janus import JanusModel
from janus_ds.model.weights import load_weights
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.observe.run_record import write_run_record
from janus_ds.parallel.layers import ParallelLayers
from janus_ds.parallel.liveness import RollCall
from janus_ds.parallel.tensor_parallel import make_layers
from janus_ds.parallel.topology import Topology, close_topology, init_topology, raise_on_all_ranks
from janus_ds.train.loop.engine import TrainingEngine
from janus_ds.train.loop.outputs import OutputScores, SampleDecoder, text_pairs
from janus_ds.train.loop.state import Meters, RunIdentity, read_resumable, resume
from janus_ds.train.loop.step import TrainingStep, compile_step
from janus_ds.train.loop.trainer import Outcome, Trainer, TrainerParts
from janus_ds.train.loop.validation import Validator
from janus_ds.train.options import TrainOptions
from janus_ds.train.safety.memory import MemoryGuard
from janus_ds.train.safety.signals import StopSignals
from janus_ds.train.safety.watchdog import Watchdog

__all__ = ["Plan", "build_engine", "make_plan", "pretrain", "pretrain_on", "start_from"]

_SHOWN_SAMPLES = 3
_NEWS_SECONDS = 3.0
"""Time for the news of a lost rank to come after a collective has failed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """All that is known before a model is built."""

    config: RunConfig
    execution: ExecutionConfig
    run: Path
    tokenizer: Tokenizer
    train: BatchMaker
    valid: BatchMaker
    identity: RunIdentity

    @property
    def special(self) -> SpecialTokens:
        """Special symbols of the data's tokenizer."""
        return self.tokenizer.special


@dataclass(frozen=True)
class _Guardians:
    """What ends a run from outside of the loop."""

    signals: StopSignals
    watchdog: Watchdog


def pretrain(options: TrainOptions, signals: StopSignals) -> Outcome:
    """Find this process's place among the ranks, then train as :func:`pretrain_on` does.

    Raises:
        JanusError: on all ranks together; LostRankError on those that are left.
    """
    options = options.with_mode()
    topology = init_topology(options.tensor_parallel, process_group=True)
    roll_call = RollCall(topology, signals.hear)
    signals.tell(roll_call.ask_to_stop)
    orderly, alone = False, False
    try:
        outcome = pretrain_on(topology, options, signals, roll_call)
        orderly = True
        return outcome
    except JanusError as error:
        alone = error.local
        orderly = not alone
        raise
    except RuntimeError as error:
        lost = roll_call.lost(_NEWS_SECONDS)
        orderly = lost is not None
        raise lost or error from error
    finally:
        roll_call.close(orderly=orderly)
        if roll_call.complete and not alone:
            close_topology()


def pretrain_on(
    topology: Topology, options: TrainOptions, signals: StopSignals, roll_call: RollCall | None = None
) -> Outcome:
    """Train, or continue to train, the run that the options describe.

    Args:
        topology: this process's place.
        options: what the command line says.
        signals: stop requests of this process.
        roll_call: the line to the other ranks, without which no watchdog looks after several.

    Raises:
        JanusError: on all ranks together.
    """
    setup = (options.recipe, options.overrides, options.deepspeed_config, topology.data_size)
    config, execution = raise_on_all_ranks(
        topology, lambda: load_setup(*setup, tensor_size=topology.tensor_size)
    )
    signals.limit(config.train.time_limit, os.environ)
    config = _with_data(config, topology)
    run = options.output or Path("runs") / config.name
    plan = raise_on_all_ranks(topology, lambda: make_plan(config, execution, run, topology))
    raise_on_all_ranks(topology, lambda: check_writable(run) if topology.is_main else None)
    train = config.train
    policy = SavePolicy(train.keep_last, train.keep_every, train.max_failed_saves)
    checkpoints = CheckpointManager(run / "checkpoints", policy, topology)
    resumed = checkpoints.latest()
    state = raise_on_all_ranks(topology, lambda: read_resumable(resumed, plan.identity))
    meters = Meters(**state["meters"])
    ended = state["step"] >= config.train.max_steps or meters.finished
    if ended and meters.unvalidated is None:
        if topology.is_main:
            logger.info("the run in %s is complete at step %d", run, state["step"])
        return Outcome.COMPLETE
    if topology.agree(int(signals.name is not None)):
        logger.warning("asked to stop (%s) before the first step", signals.name)
        return Outcome.STOPPED
    estimator = estimator_name(config.objective)
    if estimator != "full" and topology.is_main:
        logger.warning("the losses are another estimator than the objective's own: %s", estimator)
    engine = build_engine(plan, topology)
    if resumed is not None:
        resume(engine, resumed, state, plan.identity)
    limit = 60 * config.train.stall_minutes
    with Watchdog(topology, roll_call, run / "stacks", limit) as watchdog:
        return _train(plan, engine, checkpoints, state, _Guardians(signals, watchdog))


def make_plan(config: RunConfig, execution: ExecutionConfig, run: Path, topology: Topology) -> Plan:
    """Look at the data, and say what must not change between two starts.

    Raises:
        DataError: missing or damaged data.
        ConfigError: data for another task.
    """
    place = open_data(config.data.path or "", config.data)
    valid = (
        place.split("valid")
        if config.data.valid_path is None
        else open_split(config.data.valid_path, config.data)
    )
    return Plan(
        config=config,
        execution=execution,
        run=run,
        tokenizer=place.tokenizer,
        train=BatchMaker(place.split("train"), config, place.tokenizer.special),
        valid=BatchMaker(valid, full_estimator(config), place.tokenizer.special),
        identity=RunIdentity.of(
            config, place.tokenizer.fingerprint, place.fingerprint("train"), execution, topology
        ),
    )


def build_engine(plan: Plan, topology: Topology) -> TrainingEngine:
    """Model, objective and optimizer under DeepSpeed; the weights are a function of the seed, or --init.

    Raises:
        CheckpointError: the weights to start from are missing or of another shape.
    """
    config, parallel = plan.config, make_layers(topology.tensor_size)
    # The same draw on all ranks, whatever they draw later.
    parallel.seed_rng(config.train.seed)
    model = JanusModel(config.model, plan.special, parallel, config.train.activation_checkpointing)
    model.attention_backend = config.train.attention_backend
    if config.init is not None:
        new_head = config.init_length_head == "new"
        start_from(model, config.init, plan.tokenizer, parallel, new_head)
    objective = JanusObjective(config.objective, plan.special.vocab_size, parallel)
    step = TrainingStep(model, objective, config.objective.encoder_passes)
    sharded = topology.tensor_size > 1 or plan.execution.zero_stage == 3
    compile_step(step, config.train.compile, topology.device, sharded)
    return TrainingEngine(step, config.optim, plan.execution, topology, parallel)


def _with_data(config: RunConfig, topology: Topology) -> RunConfig:
    """The run with its data directory; the bundled corpus is prepared by the first rank."""
    if config.data.path is not None:
        return config
    if config.data.task == "pair":
        raise UsageError(
            "there is no bundled data for translation",
            "--data",
            "give the directory that launch/prepare_data.py --task nmt made",
        )
    if topology.is_main:
        logger.info("no --data: using the bundled corpus")
    block = config.data.block_tokens
    path = raise_on_all_ranks(
        topology, lambda: str(prepare_bundled_corpus(block_tokens=block)) if topology.is_main else ""
    )
    return replace(config, data=replace(config.data, path=topology.broadcast_object(path)))


def _train(
    plan: Plan,
    engine: TrainingEngine,
    checkpoints: CheckpointManager,
    state: dict[str, Any],
    guardians: _Guardians,
) -> Outcome:
    topology, step = engine.topology, int(state["step"])
    execution = plan.execution
    share = RankShare(topology.data_rank, topology.data_size, execution.micro_batch, execution.accumulation)
    count = plan.config.train.valid_samples
    held_out = raise_on_all_ranks(topology, lambda: list(validation_batches(plan.valid, share, count)))
    quarantine = QuarantineList(plan.run)
    raise_on_all_ranks(topology, lambda: quarantine.add(plan.valid.source.take_damage()))
    pairs = text_pairs(held_out[0].batch, plan.valid.source, plan.tokenizer, _SHOWN_SAMPLES)
    raise_on_all_ranks(topology, lambda: _record(plan, topology, step))
    parts = TrainerParts(
        config=plan.config,
        identity=plan.identity,
        run=plan.run,
        engine=engine,
        validator=Validator(held_out, topology),
        checkpoints=checkpoints,
        vocab_size=plan.special.vocab_size,
        sampler=SampleDecoder(plan.config, plan.tokenizer, pairs, topology.device),
        scorer=raise_on_all_ranks(
            topology, lambda: OutputScores.of(plan.config, plan.tokenizer, topology.device)
        ),
        memory=MemoryGuard(plan.config, execution, topology),
        watchdog=guardians.watchdog,
    )
    trainer = Trainer(parts, guardians.signals, step, Meters(**state["meters"]))
    # Before the first step, so that a batch that no rank could make is refused on all ranks together.
    loader = raise_on_all_ranks(topology, lambda: _loader(plan, share, step, topology))
    with closing(_steps(loader, quarantine)) as data:
        return trainer.fit(data)


def _loader(plan: Plan, share: RankShare, start: int, topology: Topology) -> StepLoader:
    pin = topology.device.type == "cuda"
    return StepLoader(plan.train, share, start, plan.config.train.max_steps, pin_memory=pin)


def _steps(loader: StepLoader, quarantine: QuarantineList) -> Generator[StepData, None, None]:
    for data in loader:
        quarantine.add(data.damage, data.step)
        yield data


def _record(plan: Plan, topology: Topology, step: int) -> None:
    """Write what decoding needs beside the weights; the first rank only."""
    if not topology.is_main:
        return
    execution = {**asdict(plan.execution), "world_size": topology.world_size}
    execution |= {"tensor_size": topology.tensor_size, "device": str(topology.device)}
    with disk_faults(plan.run):
        plan.run.mkdir(parents=True, exist_ok=True)
        plan.tokenizer.save(plan.run / "tokenizer")
        fingerprint = plan.tokenizer.fingerprint
        write_run_record(plan.run, plan.config, plan.special, fingerprint, execution, step)


_LENGTH_HEAD = "length_head.weight"


def start_from(
    model: nn.Module,
    source: str,
    tokenizer: Tokenizer,
    parallel: ParallelLayers,
    new_length_head: bool = False,
) -> None:
    """Put the weights of a run folder, a checkpoint or a weights file into a model.

    A length head with another number of classes cannot be taken over (conventions count lengths
    differently): the model's own, drawn from the seed, stays.

    Args:
        model: fresh from its seed.
        source: where the weights are.
        tokenizer: the data's; must be what the weights were trained with.
        parallel: the layers the model was built from.
        new_length_head: keep the model's own even where the other one fits.

    Raises:
        CheckpointError: there are no weights, they are of another shape, or they were trained with
            another tokenizer than the data has.
    """
    _check_tokenizer(source, tokenizer)
    path = find_weights(Path(source))
    weights = read_weights(path)
    own = model.get_parameter(_LENGTH_HEAD)
    fits = _LENGTH_HEAD in weights and weights[_LENGTH_HEAD].shape == own.shape
    if new_length_head or not fits:
        why = (
            "is not wanted (init_length_head: new)" if fits else f"does not fit ({own.shape[0]} classes here)"
        )
        logger.info("the length head of %s %s: a new one", path, why)
        weights[_LENGTH_HEAD] = own.detach().clone()
    load_weights(model, weights, str(path), parallel)


def _check_tokenizer(source: str, tokenizer: Tokenizer) -> None:
    trained_with = record_of(Path(source)).get("tokenizer_fingerprint")
    if trained_with and trained_with != tokenizer.fingerprint:
        raise CheckpointError(
            "the weights to start from were trained with another tokenizer than the data has",
            f"init {source}: tokenizer {trained_with[:12]}, data {tokenizer.fingerprint[:12]}",
            f"prepare the data with --tokenizer {Path(source) / 'tokenizer'}, or give other weights",
        )
