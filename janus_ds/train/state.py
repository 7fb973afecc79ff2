"""`state.json`: what a checkpoint records of its run, and whether a new start may continue it.

Everything needed to continue: weights and the optimizer's state, whole, the step, and the meters
below. Order of data, masks, dropout and learning rate are functions of the step. How it is executed (ranks,
device, the DeepSpeed file) is noted, and may be another way at the next start, which then says so.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from janus_ds.checkpoint.manifest import STATE_FILE, read_state
from janus_ds.checkpoint.tensors import OPTIMIZER_FILE
from janus_ds.config.deepspeed import ExecutionConfig
from janus_ds.config.load import from_dict, to_dict
from janus_ds.config.schema import FIELDS, RunConfig, TrainConfig
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.text.tokenizer import Tokenizer
from janus_ds.errors import CheckpointError, ConfigError

STATE_VERSION = 2
"""1: the optimizer's state lies in DeepSpeed's files, which fit only the ranks that wrote them."""
_MOST = 2**53
"""Largest number that is taken for a count."""


@dataclass
class Meters:
    """Sums over the whole run, through all its starts."""

    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """CPU time of the first rank's process in these steps, without validations and saves."""
    skipped_steps: int = 0
    best_bleu: float = -1.0
    """Score (BLEU for translation) of the validation that train.keep_best holds for the best."""
    best_loss: float = 0.0
    """Held-out loss of the same validation."""
    best_step: int = 0
    """When that was; 0: there has been none."""
    best_scores: dict[str, float] = field(default_factory=dict)
    """Best score of each mode of train.valid_bleu, under what it is of (`measure_of`)."""
    stale_validations: int = 0
    """Validations in a row without a better figure or score."""
    measure: str = ""
    """What the best score or loss is of (`measure_of`); empty: unknown, as in older checkpoints."""
    finished: bool = False
    """train.patience has run out: the run is complete before train.max_steps."""
    unvalidated: dict[str, Any] | None = None
    """Figures of the last step, where a stop has interrupted its validation; the next start does it."""
    recent_losses: list[float] = field(default_factory=list)
    """Losses that a spike is measured against (train.spike_window), oldest first."""

    def judged_by(self, train: TrainConfig) -> Meters:
        """The same for a start with these settings, which may measure or wait otherwise than the one before.

        Figures of different measures cannot be compared: there is no best one then.
        """
        measure = measure_of(train, train.keep_best)
        now = replace(self, measure=measure or self.measure)
        if measure and self.measure not in ("", measure):
            new = Meters()
            now = replace(now, best_bleu=new.best_bleu, best_loss=new.best_loss, best_step=0)
            now = replace(now, best_scores={}, stale_validations=0)
        return replace(now, finished=patience_is_over(now, train))


def measure_of(train: TrainConfig, kind: str) -> str:
    """In words, what a figure of `kind` is of: a value of `train.keep_best`; empty for none."""
    if kind in ("none", "loss"):
        return "" if kind == "none" else f"loss of {train.valid_samples} samples"
    passes = f", {train.valid_bleu_iterations} iterations" * (kind == "nar")
    return f"{train.valid_task} by {kind}{passes}, {train.valid_bleu_samples or 'all'} samples"


_OTHER_SAMPLES = "other held-out samples"
"""What the best score or loss is of where the validation data has changed since."""


def patience_is_over(meters: Meters, train: TrainConfig) -> bool:
    """Whether so many validations in a row have brought nothing better that the run is complete."""
    return 0 < train.patience <= meters.stale_validations


@dataclass(frozen=True)
class RunIdentity:
    """What must be equal for a checkpoint to be continued."""

    recipe: RunConfig
    tokenizer_fingerprint: str
    data_fingerprint: str
    world_size: int
    tensor_size: int
    zero_stage: int
    precision: str
    accumulation: int = 1
    """Micro-batches of a step on one rank: dropout is drawn for each."""
    valid_fingerprint: str = ""
    """Of the held-out samples, which may be others at the next start."""
    device: str = ""
    engine: dict[str, Any] = field(default_factory=dict)
    """What else the DeepSpeed file says (`ExecutionConfig.further`)."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Of the packages that compute."""

    def state(self, step: int, meters: Meters) -> dict[str, Any]:
        """The contents of `state.json` after `step` updates."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        own = {"format_version": STATE_VERSION, "step": step, "meters": asdict(meters)}
        return {**own, **known, "recipe": to_dict(self.recipe)}


@dataclass(frozen=True)
class Run:
    """All that is known of a run before a model is built."""

    config: RunConfig
    execution: ExecutionConfig
    folder: Path
    tokenizer: Tokenizer
    train: BatchMaker
    valid: BatchMaker
    identity: RunIdentity


class _Form(BaseModel):
    model_config = ConfigDict(strict=True)


class _LossScale(_Form):
    """fp16's dynamic loss scale."""

    cur_scale: float = Field(gt=0)
    cur_iter: int
    last_overflow_iter: int
    cur_hysteresis: int


class _Optimizer(_Form):
    adam_steps: int = Field(ge=0, le=_MOST)
    loss_scale: _LossScale | None


class _SavedRecipe(_Form):
    """`from_dict` judges the rest."""

    model: dict[str, Any]


class _SavedState(_Form):
    """The form of `state.json`; older versions have fewer values, and no state of the optimizer."""

    step: int = Field(ge=0, le=_MOST)
    meters: Meters
    world_size: int = Field(ge=1, le=_MOST)
    tensor_size: int = Field(ge=1, le=_MOST)
    zero_stage: int = Field(ge=0, le=3)
    precision: str
    tokenizer_fingerprint: str
    data_fingerprint: str
    recipe: _SavedRecipe
    optimizer: _Optimizer
    engine: dict[str, Any] = {}
    versions: dict[str, Any] = {}


def check_form(state: Mapping[str, Any], folder: Path) -> None:
    """Refuse a state that this program cannot have written, whatever its checksum says.

    Raises:
        CheckpointError: a value is missing, of a wrong type or out of range; the version is another one.
    """
    version = state.get("format_version")
    if not isinstance(version, int) or version > STATE_VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {version}, this program knows versions up to {STATE_VERSION}",
            str(folder),
            "continue the run with the newer version of janus_ds that wrote it",
        )
    if version < STATE_VERSION:
        raise CheckpointError(
            "the checkpoint is of format 1: DeepSpeed's own files, which can run code when they are read",
            str(folder),
            "begin a new run from its weights with --init and another --output; they are safetensors",
        )
    fault = None
    try:
        _SavedState.model_validate_json(json.dumps(state))
        unknown = set(state["meters"]) - {field.name for field in fields(Meters)}
        if unknown:
            fault = f"meters: {', '.join(sorted(unknown))[:80]} not known"
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        fault = f"{'.'.join(str(part)[:40] for part in first['loc'])}: {first['msg']}"
    if fault is not None:
        raise CheckpointError(
            f"the checkpoint's state cannot be used ({fault})",
            str(folder / STATE_FILE),
            "take another checkpoint of the run",
        )


_NOT_TRAINED = """
    name model.preset data.path data.valid_path data.block_tokens data.workers data.prefetch_steps
    data.pad_multiple data.cache_dir data.cache_gb data.read_ahead data.retries
    data.stall_seconds data.on_damage data.max_damage train.log_every train.monitor train.valid_every
    train.valid_samples train.save_every train.keep_last train.keep_every train.max_failed_saves
    train.valid_bleu train.valid_bleu_samples train.valid_task train.valid_bleu_iterations train.keep_best
    train.patience train.time_limit train.stall_minutes train.sample_every train.max_bad_steps
    train.max_overflows train.spike_action train.spike_factor train.spike_window
    train.activation_checkpointing train.attention_backend train.compile
"""
"""Fields that may change between two starts of a run without changing what it learns."""
_OF_A_HOST = """
    data.path data.valid_path data.workers data.prefetch_steps data.cache_dir data.cache_gb data.read_ahead
    data.retries data.stall_seconds
"""
"""Fields that each host may have its own value of."""


def _differing(one: RunConfig, other: RunConfig) -> list[str]:
    return [key for key in FIELDS if attrgetter(key)(one) != attrgetter(key)(other)]


def changed_training(saved: RunConfig, now: RunConfig) -> list[str]:
    """Fields that differ in what is trained; empty for two starts of one run, on any number of ranks.

    Left out are how often things are logged, saved and validated, where the data lies and how long its
    blocks are (its own manifest identifies it) and how text is decoded; `train.max_steps` counts only where
    the learning rate depends on it, so that other runs can be made longer.
    """
    left_out = _NOT_TRAINED.split()
    if "polynomial" not in (saved.optim.schedule, now.optim.schedule):
        left_out.append("train.max_steps")
    changed = _differing(saved, now)
    return [key for key in changed if key not in left_out and not key.startswith("decode.")]


def check_same(first: RunIdentity, own: RunIdentity, rank: int) -> None:
    """Refuse a rank that reads other files than the first one, as on a host with a copy of its own.

    Raises:
        ConfigError: its data, recipe or DeepSpeed file says something else.
    """
    names = [field.name for field in fields(RunIdentity) if field.name != "recipe"]
    other = [name for name in names if getattr(first, name) != getattr(own, name)]
    other += [key for key in _differing(first.recipe, own.recipe) if key not in _OF_A_HOST.split()]
    if other:
        raise ConfigError(
            f"rank {rank} has other data, versions, recipe or DeepSpeed file than the first rank",
            f"{', '.join(other)} on {socket.gethostname()}",
            "give all hosts the same files and packages: copy them anew, or put them where all read them",
        )


def check_resumable(state: Mapping[str, Any], now: RunIdentity, folder: Path) -> None:
    """Refuse, before anything heavy, a checkpoint that this start cannot continue; `state` has the form.

    Raises:
        CheckpointError: it is of another tokenizer.
        ConfigError: the recipe or the data would silently change what the run means.
    """
    tokenizer = state["tokenizer_fingerprint"]
    if tokenizer != now.tokenizer_fingerprint:
        raise CheckpointError(
            "the checkpoint was trained with another tokenizer than the data has",
            f"{folder}: tokenizer {tokenizer[:12]}, data {now.tokenizer_fingerprint[:12]}",
            "give the --data that the run was started with, or another --output",
        )
    if state["data_fingerprint"] != now.data_fingerprint:
        raise ConfigError(
            "the data, or a stage of its pipeline, is not what the run was started with",
            str(folder),
            "give the same --data and stages, or begin a new run with --init and another --output",
        )
    saved, recipe = from_dict(state["recipe"], str(folder)), now.recipe
    keys = changed_training(saved, recipe)
    # Batches of tokens are cut by padded lengths.
    if recipe.data.batch == "tokens" and saved.data.pad_multiple != recipe.data.pad_multiple:
        keys.append("data.pad_multiple")
    if keys:
        changed = ", ".join(f"{key} {attrgetter(key)(saved)} -> {attrgetter(key)(recipe)}" for key in keys)
        raise ConfigError(
            f"the recipe changes what is trained ({changed})",
            str(folder),
            "restore these values, or begin a new run with another --output (and --init, if the shape of the "
            "model is the same)",
        )


def changed_execution(state: Mapping[str, Any], now: RunIdentity) -> list[str]:
    """In words, what is other than when the checkpoint was written; empty if a resume is bitwise."""
    words = {
        "world_size": "{} ranks",
        "tensor_size": "tensor-parallel size {}",
        "zero_stage": "ZeRO stage {}",
        "precision": "precision {}",
        "accumulation": "{} micro-batches a step on a rank",
        "device": "device {}",
    }
    # Earlier versions did not note all of them.
    found = [(text, state[key], getattr(now, key)) for key, text in words.items() if key in state]
    # Secrets of addresses are not in the state.
    saved, recipe = from_dict(state["recipe"]), from_dict(to_dict(now.recipe))
    found += [(f"{key} {{}}", attrgetter(key)(saved), attrgetter(key)(recipe)) for key in FIELDS]
    for name in ("engine", "versions"):
        own = getattr(now, name)
        then = state.get(name, own)
        found += [(f"{key} {{}}", then.get(key, "unset"), own.get(key, "unset")) for key in {**then, **own}]
    return [f"{text.format(before)}, not {value}" for text, before, value in found if before != value]


def read_resumable(checkpoint: Path | None, identity: RunIdentity) -> dict[str, Any]:
    """The state to continue from; step 0 for a new run.

    Raises:
        CheckpointError, ConfigError: this start cannot continue the checkpoint.
    """
    train = identity.recipe.train
    if checkpoint is None:
        return identity.state(0, Meters().judged_by(train))
    state = read_state(checkpoint)
    check_form(state, checkpoint)
    check_resumable(state, identity, checkpoint)
    if not (checkpoint / OPTIMIZER_FILE).is_file():
        raise CheckpointError(
            "the checkpoint has weights, but no state of the optimizer to continue with",
            str(checkpoint / OPTIMIZER_FILE),
            "restore the file, or begin a new run from the weights with --init and another --output",
        )
    meters = Meters(**state["meters"])
    if state.get("valid_fingerprint", identity.valid_fingerprint) != identity.valid_fingerprint:
        meters = replace(meters, measure=_OTHER_SAMPLES)
    return {**state, "meters": asdict(meters.judged_by(train))}
