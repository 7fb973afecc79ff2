"""What the values of a run must satisfy, alone and together.

Everything that can be known before data or devices are looked at is checked here, so that a run
fails in the first second and not in the first hour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from janus_ds.config.estimator import check_estimator
from janus_ds.config.faults import FaultList, suggestion
from janus_ds.config.locations import PIPE, is_remote, parse_locations
from janus_ds.config.presets import MODEL_PRESETS
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError

__all__ = ["CHOICES", "check_run", "check_values"]

_GLGE_TASKS = ("cnndm", "gigaword", "xsum", "msnews", "squadqg", "msqg", "coqa", "personachat")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.preset": tuple(MODEL_PRESETS),
    "model.activation": ("relu", "gelu"),
    "data.task": ("denoise", "pair"),
    "data.batch": ("samples", "tokens"),
    "data.on_damage": ("stop", "quarantine"),
    "masking.target": ("span_union", "span_overlap", "uniform", "infilling", "infilling_released"),
    "masking.aux_order": ("left_to_right", "random"),
    "objective.preset": (
        "paper",
        "released",
        "ar",
        "ar_query",
        "cmlm",
        "ar_rdrop",
        "ar_query_rdrop",
        "released_finetune",
    ),
    "objective.normalise": ("per_term", "target_tokens"),
    "objective.ar_stream": ("query", "content"),
    "objective.ar_query_position": ("predicted", "previous"),
    "objective.decoder_start": ("bos", "eos_bos"),
    "objective.length_convention": ("inner", "with_specials"),
    "objective.mask_symbol": ("mask", "unk"),
    "objective.ar_loss": ("all", "masked"),
    "optim.schedule": ("inverse_sqrt", "polynomial", "constant"),
    "train.batch_cost": ("tokens", "rows"),
    "init_length_head": ("keep", "new"),
    "train.compile": ("none", "head", "model", "graphs"),
    "train.attention_backend": ("auto", "dense", "grouped", "flex"),
    "train.valid_bleu": ("none", "ar", "nar", "ar,nar"),
    "train.valid_task": ("nmt", *_GLGE_TASKS),
    "train.spike_action": ("off", "warn", "skip", "stop"),
    "train.keep_best": ("none", "loss", "ar", "nar"),
    "decode.mode": ("ar", "nar", "draft"),
    "decode.rescore": ("ar",),
    "decode.beam_stop": ("fairseq", "transformers"),
    "decode.nar_score": ("paper", "released"),
}
"""The values that a text field may take."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_POSITIVE = _words(
    "model.d_model model.encoder_layers model.decoder_layers model.ffn_dim model.heads "
    "model.max_source_positions model.max_target_positions model.vocab_multiple model.init_std "
    "data.block_tokens data.shuffle_window data.prefetch_steps data.pad_multiple "
    "data.cache_gb data.stall_seconds "
    "optim.lr optim.eps train.global_batch train.batch_tokens train.batch_groups train.max_steps "
    "train.log_every train.save_every "
    "train.keep_last train.max_failed_saves train.max_bad_steps train.max_overflows "
    "train.spike_factor decode.beam decode.length_beam decode.draft_width"
)
_NOT_NEGATIVE = _words(
    "data.workers data.shuffle_shards data.read_ahead data.retries "
    "objective.weight_ar objective.weight_nar objective.weight_aux objective.weight_length "
    "objective.weight_kl_ar_nar objective.weight_kl_ar_aux objective.weight_kl_nar_aux "
    "objective.weight_kl_ar_ar objective.weight_kl_nar_nar objective.weight_kl_aux_aux "
    "optim.weight_decay optim.warmup_steps optim.warmup_init_lr optim.clip_norm train.seed "
    "objective.ramp_start objective.ramp_kl_steps objective.ramp_nar_steps objective.ramp_aux_steps "
    "train.valid_every train.valid_samples train.sample_every train.valid_bleu_samples "
    "train.valid_bleu_iterations train.patience train.time_limit train.stall_minutes train.keep_every "
    "decode.max_length decode.iterations decode.length_penalty "
    "decode.rescore_samples decode.temperature decode.seed"
)
_SHARE = _words(
    "masking.target_share masking.source_share masking.rotate_share data.max_damage decode.rescore_weight"
)
_BELOW_ONE = _words(
    "model.dropout model.attention_dropout model.activation_dropout objective.label_smoothing "
    "optim.beta1 optim.beta2"
)

_Test = Callable[[Any], bool]
_RANGES: list[tuple[tuple[str, ...], _Test, str]] = [
    (_POSITIVE, lambda v: v > 0, "more than 0"),
    (_NOT_NEGATIVE, lambda v: v >= 0, "0 or more"),
    (_SHARE, lambda v: 0 <= v <= 1, "a share between 0 and 1"),
    (_BELOW_ONE, lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    (("objective.aux_share", "decode.threshold"), lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    (("objective.encoder_passes",), lambda v: v in (1, 2), "1 or 2"),
    (("masking.poisson",), lambda v: 0.1 <= v <= 100, "between 0.1 and 100"),
    (("train.spike_window",), lambda v: 8 <= v <= 10_000, "between 8 and 10000"),
    (("model.length_classes",), lambda v: v >= 2, "2 or more"),
]

Where = Callable[[str], str]
"""Says where a key was given: file or override, and the key itself."""


def check_values(values: Mapping[str, Any], where: Where, faults: FaultList) -> None:
    """Known names and ranges, field by field; `None` (left to the preset) is always right."""
    for key, names in CHOICES.items():
        value = values.get(key)
        if value is not None and value not in names:
            fix = suggestion(value, names, f"use one of {', '.join(names)}")
            faults.add(f"{key} has no value {value!r}", where(key), fix, [key])
    for keys, test, words in _RANGES:
        for key in keys:
            value = values.get(key)
            # `not test` also catches NaN, for which every comparison is false.
            if value is not None and not test(value):
                faults.add(f"{key} is {value}, but must be {words}", where(key), f"give {words}", [key])


def check_run(run: RunConfig, where: Where, faults: FaultList) -> None:
    """Rules over several fields of a resolved run."""
    rules = (
        _model,
        _attention,
        _data,
        _positions,
        _masking,
        _objective,
        check_estimator,
        _optim,
        _validation,
        _saving,
        _faults,
        _decode,
    )
    for rule in rules:
        rule(run, where, faults)


def _model(run: RunConfig, where: Where, faults: FaultList) -> None:
    width, heads = run.model.d_model, run.model.heads
    if width > 0 and heads > 0 and width % heads:
        faults.add(
            f"{heads} heads do not divide d_model {width}",
            where("model.heads"),
            f"give a number of heads that divides {width}, or another model.d_model",
            ["model.heads", "model.d_model"],
        )


def _attention(run: RunConfig, where: Where, faults: FaultList) -> None:
    rate = run.model.attention_dropout
    backend = run.train.attention_backend
    if backend == "flex" and rate:
        faults.add(
            f"train.attention_backend 'flex' cannot drop attention weights, and model.attention_dropout "
            f"is {rate}",
            where("train.attention_backend"),
            "use auto or grouped, or set model.attention_dropout to 0",
            ["train.attention_backend", "model.attention_dropout"],
        )


def _data(run: RunConfig, where: Where, faults: FaultList) -> None:
    data, key = run.data, "data.path"
    try:
        places = [place.location for place in parse_locations(data.path)] if data.path else []
    except ConfigError as error:
        faults.add(error.what, where(key), error.fix, [key])
        return
    commands = [place for place in [*places, data.valid_path or ""] if place.startswith(PIPE)]
    if any("{}" not in command for command in commands):
        what = "a command that gives the data does not say where the name of the file goes"
        faults.add(what, where(key), f"put {{}} in its place: {PIPE}cat DIR/{{}}", [key])
    if len(places) > 1 and data.batch == "tokens":
        what = "batches of tokens are cut by the lengths of one source; several cannot be mixed in them"
        faults.add(what, where(key), "set data.batch to samples, or give one source", [key, "data.batch"])
    if data.on_damage == "quarantine" and data.batch == "tokens":
        what = "batches of tokens are cut by the lengths of all samples, so that none can be replaced"
        fix = "use data.on_damage stop, or data.batch samples"
        faults.add(what, where("data.on_damage"), fix, ["data.on_damage", "data.batch"])
    if data.shuffle_shards and data.batch == "tokens":
        what = "data.shuffle_shards orders batches of samples; batches of tokens have an order of their own"
        fix = "leave data.shuffle_shards out"
        faults.add(what, where("data.shuffle_shards"), fix, ["data.shuffle_shards", "data.batch"])
    if data.pack_rows and run.train.compile == "graphs":
        what = "CUDA graphs need few shapes, but under data.pack_rows every batch has its own"
        fix = "use train.compile model or head, or data.pack_rows false"
        faults.add(what, where("train.compile"), fix, ["data.pack_rows", "train.compile"])
    if run.train.valid_bleu != "none" and (len(places) > 1 or any(map(is_remote, places))):
        what = "train.valid_bleu reads the validation text of one local directory"
        fix = "copy the data to this machine, or set train.valid_bleu to none"
        faults.add(what, where("train.valid_bleu"), fix, ["train.valid_bleu", key])


def _positions(run: RunConfig, where: Where, faults: FaultList) -> None:
    needed = run.data.block_tokens + 2
    sides = ["max_target_positions"] + ["max_source_positions"] * (run.data.task == "denoise")
    for side in sides:
        rows = getattr(run.model, side)
        if rows > 0 and needed > rows:
            faults.add(
                f"blocks of {run.data.block_tokens} tokens with bos and eos need {needed} positions, "
                f"but model.{side} is {rows}",
                where("data.block_tokens"),
                f"set data.block_tokens to at most {rows - 2}, or model.{side} to at least {needed}",
                ["data.block_tokens", f"model.{side}"],
            )


def _masking(run: RunConfig, where: Where, faults: FaultList) -> None:
    masking, task = run.masking, run.data.task
    keys = ["masking.target", "data.task", "objective.preset"]
    if masking.target is None:
        return
    if masking.target.startswith("infilling") and task == "pair":
        faults.add(
            f"masking.target {masking.target!r} hides tokens from a source made of the target, "
            "but task 'pair' has a source of its own",
            where("masking.target"),
            "use span_union, span_overlap or uniform, or data.task denoise",
            keys,
        )
    if masking.target != "uniform" and masking.target_share == 0:
        faults.add(
            "masking.target_share is 0, so that nothing would be masked",
            where("masking.target_share"),
            "give a share above 0 (.7 for translation, .5 for pretraining), or masking.target uniform",
            [*keys, "masking.target_share"],
        )
    if masking.target == "infilling" and (masking.source_share or 0) > (masking.target_share or 0):
        faults.add(
            f"masking.source_share {masking.source_share} is above masking.target_share "
            f"{masking.target_share}, but what the encoder does not see is part of what is masked",
            where("masking.source_share"),
            "give a source share of at most the target share",
            [*keys, "masking.source_share", "masking.target_share"],
        )


def _objective(run: RunConfig, where: Where, faults: FaultList) -> None:
    objective = run.objective
    weights = [objective.weight_ar, objective.weight_nar, objective.weight_aux]
    keys = ["objective.preset", "objective.weight_ar", "objective.weight_nar", "objective.weight_aux"]
    if all(weight == 0 for weight in weights):
        faults.add(
            "the AR, NAR and AUX losses all have weight 0, so that no token is trained",
            where("objective.weight_ar"),
            "give at least one of objective.weight_ar, weight_nar and weight_aux above 0",
            keys,
        )
    if objective.encoder_passes == 2 and not (weights[0] and (weights[1] or weights[2])):
        faults.add(
            "objective.encoder_passes is 2, which gives AR one dropout draw of the encoder and NAR and AUX "
            "another, but this objective does not train AR beside NAR or AUX",
            where("objective.encoder_passes"),
            "use objective.encoder_passes 1, or a preset with both (paper, released)",
            [*keys, "objective.encoder_passes"],
        )
    for stream, weight in zip(("ar", "nar", "aux"), weights, strict=True):
        name = f"objective.weight_kl_{stream}_{stream}"
        if getattr(objective, f"weight_kl_{stream}_{stream}") and not weight:
            faults.add(
                f"{name} compares two dropout draws of {stream.upper()}, but objective.weight_{stream} is 0",
                where(name),
                f"give objective.weight_{stream} a number above 0, or leave {name} out",
                [name, f"objective.weight_{stream}"],
            )


def _optim(run: RunConfig, where: Where, faults: FaultList) -> None:
    optim, steps = run.optim, run.train.max_steps
    if optim.schedule == "polynomial" and optim.warmup_steps >= steps:
        faults.add(
            f"the polynomial schedule warms up for {optim.warmup_steps} steps, but the run has {steps}",
            where("optim.warmup_steps"),
            "give fewer optim.warmup_steps or more train.max_steps",
            ["optim.warmup_steps", "train.max_steps", "optim.schedule"],
        )
    if optim.warmup_init_lr > optim.lr:
        faults.add(
            f"warm-up starts at {optim.warmup_init_lr}, above the peak learning rate {optim.lr}",
            where("optim.warmup_init_lr"),
            "give optim.warmup_init_lr of at most optim.lr",
            ["optim.warmup_init_lr", "optim.lr"],
        )


def _validation(run: RunConfig, where: Where, faults: FaultList) -> None:
    train = run.train
    modes = ("none", "loss", *train.valid_bleu.split(","))
    if train.valid_bleu != "none" and run.data.task != "pair":
        faults.add(
            f"train.valid_bleu scores outputs for given sources, but the task is {run.data.task!r}",
            where("train.valid_bleu"),
            "leave train.valid_bleu out, or set data.task to pair",
            ["train.valid_bleu", "data.task"],
        )
    if train.keep_best not in modes:
        faults.add(
            f"train.keep_best is {train.keep_best!r}, but train.valid_bleu does not measure that mode",
            where("train.keep_best"),
            f"add {train.keep_best} to train.valid_bleu",
            ["train.keep_best", "train.valid_bleu"],
        )
    if train.patience and train.keep_best == "none":
        faults.add(
            "train.patience counts validations without a better one, but train.keep_best names no figure",
            where("train.patience"),
            "set train.keep_best to loss, ar or nar, or train.patience to 0",
            ["train.keep_best", "train.patience"],
        )


def _saving(run: RunConfig, where: Where, faults: FaultList) -> None:
    every, kept = run.train.save_every, run.train.keep_every
    if every > 0 and kept % every:
        faults.add(
            f"train.keep_every is {kept}, but there are checkpoints at multiples of {every} only",
            where("train.keep_every"),
            f"give a multiple of train.save_every, such as {max(kept // every, 1) * every}, or 0",
            ["train.keep_every", "train.save_every"],
        )


def _faults(run: RunConfig, where: Where, faults: FaultList) -> None:
    train, data = run.train, run.data
    if train.spike_action in ("skip", "stop") and train.spike_window >= train.max_steps:
        faults.add(
            f"a spike is seen after {train.spike_window} steps (train.spike_window), but the run has "
            f"{train.max_steps}",
            where("train.spike_window"),
            "give a smaller train.spike_window or more train.max_steps, or leave train.spike_action out",
            ["train.spike_window", "train.spike_action", "train.max_steps"],
        )
    seconds = 60 * train.stall_minutes
    distant = any(is_remote(place) for place in (data.path or "", data.valid_path or ""))
    if distant and 0 < seconds <= data.stall_seconds:
        faults.add(
            f"train.stall_minutes ends the run after {seconds:g} s without progress, but a transfer of data "
            f"may take {data.stall_seconds:g} s to fail (data.stall_seconds), and is then tried again",
            where("train.stall_minutes"),
            "give more train.stall_minutes, or fewer data.stall_seconds",
            ["train.stall_minutes", "data.stall_seconds"],
        )


def _decode(run: RunConfig, where: Where, faults: FaultList) -> None:
    longest, rows = run.decode.max_length, run.model.max_target_positions
    if longest > rows > 0:
        faults.add(
            f"decode.max_length is {longest}, but the model has {rows} target positions",
            where("decode.max_length"),
            f"give at most {rows}, or 0 for as many as the model allows",
            ["decode.max_length", "model.max_target_positions"],
        )
    if run.decode.iterations is None and run.decode.threshold is None:
        faults.add(
            "decode.iterations is null, which is no limit, but nothing else ends mask-predict's passes",
            where("decode.iterations"),
            "give a number of iterations, or decode.threshold",
            ["decode.iterations", "decode.threshold"],
        )
    if run.decode.mode == "draft" and run.decode.beam > 1:
        faults.add(
            f"decode.beam is {run.decode.beam}, but mode draft gives the output of greedy search",
            where("decode.beam"),
            "leave the beam out or give 1; for a beam use mode ar",
            ["decode.beam", "decode.mode"],
        )
