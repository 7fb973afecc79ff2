"""A run from its options to its last checkpoint: what is built, and in which order.

Everything that can be refused is looked at before anything heavy: configuration, data, checkpoint.
Reading order: :func:`run` is the whole; :func:`build_run` finds data and identity, :func:`build_engine`
makes the model, and the `Trainer` does the rest.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from janus_ds.checkpoint.manager import CheckpointManager
from janus_ds.checkpoint.manifest import WEIGHTS_FILE, read_state, step_folders
from janus_ds.checkpoint.tensors import find_weights, read_weights
from janus_ds.config.deepspeed import ExecutionConfig, TrainOptions, load_setup
from janus_ds.config.fields import shown
from janus_ds.config.load import given_keys
from janus_ds.config.locations import is_remote, tokenizer_name
from janus_ds.config.presets import CONVENTIONS, init_tokenizer, record_of, with_conventions
from janus_ds.config.schema import ModelConfig, RunConfig
from janus_ds.data.prepare.corpus import prepare_bundled_corpus
from janus_ds.data.stream.index import INDEX_NAME, MANIFEST_NAME, Manifest
from janus_ds.data.stream.open_dataset import open_data, open_split
from janus_ds.data.stream.pipeline import BatchMaker, Stage, names_of
from janus_ds.data.text.tokenizer import Tokenizer
from janus_ds.errors import CheckpointError, DataError, UsageError
from janus_ds.io import (
    LOCK_FILE,
    check_writable,
    disk_faults,
    fingerprint_of,
    folder_lock,
    mapping,
    sha256_of_file,
)
from janus_ds.model.janus import JanusModel
from janus_ds.model.weights import load_weights
from janus_ds.objective.janus_objective import JanusObjective
from janus_ds.observe import installed_versions, note_end, write_run_record
from janus_ds.parallel.liveness import Liveness
from janus_ds.parallel.tensor_parallel import ParallelLayers, make_layers
from janus_ds.parallel.topology import Topology, on_first_rank, raise_on_all_ranks, wait_without_limit
from janus_ds.train.engine import TrainingEngine, TrainingStep, compile_step
from janus_ds.train.memory import MemoryGuard
from janus_ds.train.reporting import announce_end, announce_start
from janus_ds.train.signals import StopSignals
from janus_ds.train.state import (
    Meters,
    Run,
    RunIdentity,
    changed_execution,
    check_same,
    read_resumable,
)
from janus_ds.train.trainer import Outcome, Trainer
from janus_ds.train.watchdog import Watchdog

_LOCK_SECONDS = 10.0
"""Time for an earlier start in the same folder to save and leave."""
_SIGHT_SECONDS = 60.0
"""Time in which other hosts see a new file, as NFS has it by default."""

logger = logging.getLogger(__name__)


def run(
    topology: Topology, options: TrainOptions, signals: StopSignals, liveness: Liveness | None = None
) -> Outcome:
    """Train, or continue to train, the run that the options describe.

    Args:
        liveness: connections to the other ranks; without them, no watchdog looks after several ranks.

    Raises:
        JanusError: on all ranks together.
    """
    setup = (options.recipe, options.overrides, options.deepspeed_config, topology.data_size)
    config, execution = raise_on_all_ranks(
        topology, lambda: load_setup(*setup, topology.tensor_size, options.mode)
    )
    signals.limit(config.train.time_limit, os.environ)
    folder = options.output or Path("runs") / config.name
    config = _as_begun(config, options, folder, topology)
    config = _with_data(config, folder, topology)
    built = raise_on_all_ranks(
        topology, lambda: build_run(config, execution, folder, topology, options.stages)
    )
    first = topology.broadcast_object(built.identity)
    raise_on_all_ranks(topology, lambda: check_same(first, built.identity, topology.rank))
    with ExitStack() as lock:
        on_first_rank(topology, lambda: _take(folder, lock))
        raise_on_all_ranks(topology, lambda: _see(folder, topology.rank))
        return _continue(built, topology, signals, liveness)


def _as_begun(config: RunConfig, options: TrainOptions, folder: Path, topology: Topology) -> RunConfig:
    """The run with the conventions of its own checkpoint, where its recipe leaves them to `init`.

    What the run took over from `init` stays, though that may be another run by now, or gone.
    """

    def recorded() -> Any:
        with disk_faults(folder):
            checkpoints = step_folders(folder / "checkpoints")
        for checkpoint in reversed(checkpoints):
            # Which of them can be used is found out later.
            with suppress(CheckpointError):
                return read_state(checkpoint).get("recipe")
        return None

    recipe = on_first_rank(topology, recorded) if config.init is not None else None
    given = given_keys(options.recipe, options.overrides, options.mode) if recipe else set()
    names = [name for name in CONVENTIONS if f"objective.{name}" not in given]
    return with_conventions(config, recipe, names)


def _take(folder: Path, lock: ExitStack) -> None:
    """Make the run folder this start's own: two starts in one would destroy each other's checkpoints.

    Raises:
        UsageError: weights lie at its top, as of a converted model: they would be taken for the run's.
    """
    if (folder / WEIGHTS_FILE).exists():
        raise UsageError(
            "the folder holds a model already, whose weights would be taken for those of the run",
            str(folder / WEIGHTS_FILE),
            "give another --output, or move that file out of the folder",
        )
    check_writable(folder)
    with disk_faults(folder):
        lock.enter_context(folder_lock(folder, _LOCK_SECONDS))


def _see(folder: Path, rank: int) -> None:
    """Look, at a start and not at the first resume, whether the folder that is taken is this rank's too.

    Raises:
        UsageError: it is on another host, or below another working folder.
    """
    end = time.monotonic() + _SIGHT_SECONDS
    while not os.path.exists(folder / LOCK_FILE):
        if time.monotonic() > end:
            raise UsageError(
                f"rank {rank} does not see the run folder of the first rank, and could resume no checkpoint",
                f"{folder} on {socket.gethostname()}",
                "give the whole path of an --output on a file system that all hosts share",
            )
        time.sleep(1.0)


def _continue(run: Run, topology: Topology, signals: StopSignals, liveness: Liveness | None) -> Outcome:
    """Find the checkpoint to go on from, build the engine, and train."""
    folder, train = run.folder, run.config.train
    checkpoints = CheckpointManager(folder / "checkpoints", train, topology)
    resumed = checkpoints.latest()
    state = raise_on_all_ranks(topology, lambda: read_resumable(resumed, run.identity))
    meters = Meters(**state["meters"])
    ended = state["step"] >= train.max_steps or meters.finished
    if ended and meters.unvalidated is None:
        if topology.is_main:
            logger.info("the run in %s is complete at step %d", folder, state["step"])
            note_end(folder, Outcome.COMPLETE.value)
        announce_end(run, topology, state["step"], meters)
        return Outcome.COMPLETE
    if topology.agree(int(signals.name is not None)):
        logger.warning("asked to stop (%s) before the first step", signals.reason)
        return Outcome.STOPPED
    if run.execution.advice and topology.is_main:
        logger.warning(run.execution.advice)
    announce_start(run, topology, state["step"])
    with MemoryGuard(run.config, run.execution, topology).during("building the model", whole=True):
        engine = build_engine(run, topology, fresh=resumed is None)
        if resumed is not None:
            engine.restore(resumed, state["optimizer"], state["step"])
    if topology.is_main:
        checkpoints.look_for_room(engine)
        if resumed is not None:
            changes = changed_execution(state, run.identity)
            how = f"; it was written with {'; '.join(changes)}" if changes else ""
            logger.info("resuming from step %d%s", state["step"], how)
    if liveness is not None:
        wait_without_limit()
    with Watchdog(topology, liveness, folder / "stacks", 60 * train.stall_minutes) as watchdog:
        trainer = Trainer(run, engine, checkpoints, state, signals, watchdog)
        on_first_rank(topology, lambda: _record(run, topology, trainer.step))
        outcome = trainer.fit()
        how = outcome.value if outcome is Outcome.COMPLETE else f"{outcome.value}: {signals.reason}"
        on_first_rank(topology, lambda: note_end(folder, how))
        if outcome is Outcome.COMPLETE:
            announce_end(run, topology, trainer.step, trainer.meters)
        return outcome


def build_run(
    config: RunConfig,
    execution: ExecutionConfig,
    folder: Path,
    topology: Topology,
    stages: Sequence[Stage] = (),
) -> Run:
    """Look at the data, and say what must not change between two starts."""
    place = open_data(config.data.path or "", config.data)
    apart = config.data.valid_path
    if apart is not None:
        _check_apart(apart, place.tokenizer)
    valid = place.split("valid") if apart is None else (open_split(apart, config.data),)
    special, order = place.tokenizer.special, place.fingerprint("train")
    if stages:
        order = fingerprint_of(order.encode(), *(name.encode() for name in names_of(stages)))
    return Run(
        config=config,
        execution=execution,
        folder=folder,
        tokenizer=place.tokenizer,
        train=BatchMaker(place.split("train"), config, special, stages),
        valid=BatchMaker(valid, replace(config, objective=config.objective.one_draw), special, stages),
        identity=RunIdentity(
            recipe=config,
            tokenizer_fingerprint=place.tokenizer.fingerprint,
            data_fingerprint=order,
            world_size=topology.world_size,
            tensor_size=topology.tensor_size,
            zero_stage=execution.zero_stage,
            precision=execution.precision,
            accumulation=execution.accumulation,
            device=topology.device.type,
            engine=execution.further,
            versions=installed_versions(("torch", "deepspeed")),
            valid_fingerprint=fingerprint_of(
                *(sha256_of_file(split.folder / INDEX_NAME).encode() for split in valid)
            ),
        ),
    )


def _check_apart(location: str, tokenizer: Tokenizer) -> None:
    """Hold a split by itself against the tokenizer of the run, where its manifest lies beside it."""
    folder = Path(location).parent
    if is_remote(location) or not (folder / MANIFEST_NAME).is_file():
        return
    found = Manifest.load(folder).tokenizer_fingerprint
    if found != tokenizer.fingerprint:
        raise DataError(
            "the validation data was prepared with another tokenizer: equal numbers mean other tokens",
            f"data.valid_path {location}: {found[:12]}, data.path: {tokenizer.fingerprint[:12]}",
            "prepare it with the tokenizer of data.path (--tokenizer DIR), or leave data.valid_path out",
        )


def build_engine(run: Run, topology: Topology, fresh: bool = True) -> TrainingEngine:
    """Model, objective and optimizer under DeepSpeed; the weights are a function of the seed, or --init.

    Args:
        fresh: read --init; False for a run that goes on from its checkpoint, which has all weights.
    """
    config, special, parallel = run.config, run.tokenizer.special, make_layers(topology.tensor_size)
    # The same draw on all ranks, whatever they draw later.
    parallel.seed_rng(config.train.seed)
    train = config.train
    model = JanusModel(
        config.model, special, parallel, train.activation_checkpointing, train.attention_backend
    )
    if config.init is not None and fresh:
        init, new_head = config.init, config.init_length_head == "new"
        start = (run.tokenizer, parallel, new_head, config.objective.length_convention)
        raise_on_all_ranks(topology, lambda: start_from(model, init, *start))
    objective = JanusObjective(config.objective, special.vocab_size, parallel)
    step = TrainingStep(model, objective, config.objective.encoder_passes)
    compile_step(step, config.train.compile, topology.device)
    return TrainingEngine(step, config.optim, run.execution, topology, parallel)


def _with_data(config: RunConfig, folder: Path, topology: Topology) -> RunConfig:
    """The run with its data directory; the bundled corpus is prepared by the first rank.

    With the tokenizer of `init`, which a run that has begun holds itself.
    """
    if config.data.path is not None:
        return config
    if config.data.task == "pair":
        raise UsageError(
            "there is no bundled data for translation",
            "--data",
            "give the directory that `janus-ds prepare --task nmt` made",
        )
    if topology.is_main:
        logger.info("no --data: using the bundled corpus")
    block, tokenizer = config.data.block_tokens, init_tokenizer(config.init) if config.init else None
    if config.init and tokenizer is None and (folder / "tokenizer").is_dir():
        tokenizer = folder / "tokenizer"
    path = on_first_rank(topology, lambda: str(prepare_bundled_corpus(None, block, tokenizer=tokenizer)))
    return replace(config, data=replace(config.data, path=path))


def _record(run: Run, topology: Topology, step: int) -> None:
    """Write what decoding needs beside the weights."""
    execution = {**asdict(run.execution), "world_size": topology.world_size}
    execution |= {"tensor_size": topology.tensor_size, "device": str(topology.device)}
    with disk_faults(run.folder):
        run.tokenizer.save(run.folder / "tokenizer")
        special, fingerprint = run.tokenizer.special, run.tokenizer.fingerprint
        write_run_record(run.folder, run.config, special, fingerprint, execution, step)


_LENGTH_HEAD, _TABLE = "length_head.weight", "embedding.weight"
_FORM = (
    *("d_model", "encoder_layers", "decoder_layers", "ffn_dim", "heads", "activation"),
    *("max_source_positions", "max_target_positions", "layernorm_embedding", "scale_embedding"),
)
"""Fields of a model that its weights are made for, in their shapes or without a trace of it."""


def start_from(
    model: JanusModel,
    source: str,
    tokenizer: Tokenizer,
    parallel: ParallelLayers,
    new_length_head: bool = False,
    length_convention: str | None = None,
) -> None:
    """Put the weights of a run folder, a checkpoint or a weights file into a model.

    A length head with another number of classes, or that counts lengths by another convention, cannot be
    taken over: the model's own, drawn from the seed, stays. Rows of the embedding beyond the tokenizer's
    symbols are padding, of which the model may have other numbers.

    Args:
        model: fresh from its seed.
        tokenizer: the data's; must be what the weights were trained with.
        new_length_head: keep the model's own even where the other one fits.
        length_convention: of the run that starts; None: whatever the other run has.
    """
    record = record_of(Path(source))
    recipe, trained_with = mapping(record.get("recipe")), record.get("tokenizer_fingerprint")
    _check_tokenizer(source, trained_with, tokenizer)
    path = find_weights(Path(source))
    _check_model(path, mapping(recipe.get("model")), model.config)
    weights = read_weights(path)
    own = model.get_parameter(_LENGTH_HEAD)
    table, rows = weights.get(_TABLE), model.padded_vocab
    if trained_with and table is not None and table.dim() == 2 and len(table) >= model.special.vocab_size:
        missing = table.new_zeros(max(rows - len(table), 0), table.shape[1])
        weights[_TABLE] = torch.cat([table[:rows], missing])
    counted, why = mapping(recipe.get("objective")).get("length_convention"), ""
    if _LENGTH_HEAD not in weights or weights[_LENGTH_HEAD].shape != own.shape:
        why = f"does not fit ({own.shape[0]} classes here)"
    elif new_length_head:
        why = "is not wanted (init_length_head: new)"
    elif length_convention and counted not in (None, length_convention):
        why = f"does not fit (objective.length_convention {length_convention} here, {counted} there)"
    if why:
        logger.info("the length head of %s %s: a new one", path, why)
        weights[_LENGTH_HEAD] = own.detach().clone()
    load_weights(model, weights, str(path), parallel)


def _check_model(path: Path, recorded: dict[str, Any], here: ModelConfig) -> None:
    """Hold what the record beside the weights says of their model against this one."""
    others = [name for name in _FORM if recorded.get(name, getattr(here, name)) != getattr(here, name)]
    if others:
        found = ", ".join(f"{name} {shown(recorded[name])}, not {getattr(here, name)}" for name in others)
        wanted = " ".join(f"model.{name}={json.dumps(recorded[name])}" for name in others)
        raise CheckpointError(
            f"the weights to start from are of another model: {found}",
            f"init {path}",
            f"start with --set {wanted}, or give other weights",
        )


def _check_tokenizer(source: str, trained_with: Any, tokenizer: Tokenizer) -> None:
    if trained_with and trained_with != tokenizer.fingerprint:
        own = source if tokenizer_name(source) != source else Path(source) / "tokenizer"
        raise CheckpointError(
            "the weights to start from were trained with another tokenizer than the data has",
            f"init {source}: tokenizer {str(trained_with)[:12]}, data {tokenizer.fingerprint[:12]}",
            f"prepare the data with --tokenizer {own}, give other weights, or --init none for random ones",
        )
