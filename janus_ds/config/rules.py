"""What the values of a run must satisfy together; types, ranges and choices stand in `schema.py`.

Everything that can be known before data or devices are looked at is checked here, so that a run
fails in the first second and not in the first hour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from janus_ds.config.faults import FaultList
from janus_ds.config.locations import PIPE, is_remote, parse_locations
from janus_ds.config.schema import RunConfig
from janus_ds.errors import ConfigError

Where = Callable[[str], str]
"""Says where a key was given: file or override, and the key itself."""

_Refuse = Callable[[str, str, str], None]
"""Takes the keys that a rule speaks of, the one to blame first; what is wrong; what to do."""

_NO_RULES = {
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "forced_eos": None,
}
"""Values of AR's rules that mode draft can keep."""

_NAME = re.compile(r"[^/\\\x00-\x1f\x7f.][^/\\\x00-\x1f\x7f]{0,99}")


def check_name(name: str, where: Where, faults: FaultList) -> None:
    """Refuse the name of a new run that cannot be a folder's."""
    if not _NAME.fullmatch(name) or name != name.strip() or not name.isprintable():
        what = f"name is {name[:60]!r}, but it names the folder runs/NAME"
        fix = "give 1 to 100 visible characters without slashes, no dot first; --output takes any folder"
        faults.add(what, where("name"), fix, ["name"])


def check_run(run: RunConfig, where: Where, faults: FaultList) -> None:
    """Rules over several fields of a resolved run; a rule with a spoilt key says nothing."""

    def refuse(keys: str, what: str, fix: str) -> None:
        names = keys.split()
        faults.add(what, where(names[0]), fix, names)

    _model(run, refuse)
    _data(run, refuse)
    _masking(run, refuse)
    _objective(run, refuse)
    _optim(run, refuse)
    _validation(run, refuse)
    _faults(run, refuse)
    _decode(run, refuse)


def _model(run: RunConfig, refuse: _Refuse) -> None:
    model = run.model
    if model.d_model % model.heads:
        refuse(
            "model.heads model.d_model",
            f"{model.heads} heads do not divide d_model {model.d_model}",
            f"give a number of heads that divides {model.d_model}, or another model.d_model",
        )
    needed = run.data.block_tokens + 2
    for side in ["max_target_positions"] + ["max_source_positions"] * (run.data.task == "denoise"):
        rows = getattr(model, side)
        if needed > rows:
            refuse(
                f"data.block_tokens model.{side}",
                f"blocks of {run.data.block_tokens} tokens with bos and eos need {needed} positions, "
                f"but model.{side} is {rows}",
                f"prepare blocks of at most {rows - 2} tokens and set data.block_tokens to that, "
                f"or set model.{side} to at least {needed}",
            )


def _data(run: RunConfig, refuse: _Refuse) -> None:
    data = run.data
    try:
        places = [place.location for place in parse_locations(data.path)] if data.path else []
    except ConfigError as error:
        refuse("data.path", error.what, error.fix)
        return
    commands = [place for place in [*places, data.valid_path or ""] if place.startswith(PIPE)]
    if any("{}" not in command for command in commands):
        what = "a command that gives the data does not say where the name of the file goes"
        refuse("data.path", what, f"put {{}} in its place: {PIPE}cat DIR/{{}}")
    if data.batch == "tokens":
        if len(places) > 1:
            what = "batches of tokens are cut by the lengths of one source; several cannot be mixed in them"
            refuse("data.path data.batch", what, "set data.batch to samples, or give one source")
        if data.on_damage == "quarantine":
            what = "batches of tokens are cut by the lengths of all samples, so that none can be replaced"
            refuse("data.on_damage data.batch", what, "use data.on_damage stop, or data.batch samples")
        if data.shuffle_shards:
            what = (
                "data.shuffle_shards orders batches of samples; batches of tokens have an order of their own"
            )
            refuse("data.shuffle_shards data.batch", what, "leave data.shuffle_shards out")
    if run.train.valid_bleu != "none" and (len(places) > 1 or any(map(is_remote, places))):
        what = "train.valid_bleu reads the validation text of one local directory"
        fix = "copy the data to this machine, or set train.valid_bleu to none"
        refuse("train.valid_bleu data.path", what, fix)


def _masking(run: RunConfig, refuse: _Refuse) -> None:
    masking, keys = run.masking, "masking.target data.task objective.preset"
    if masking.target is None:
        return
    if masking.target.startswith("infilling") and run.data.task == "pair":
        refuse(
            keys,
            f"masking.target {masking.target!r} hides tokens from a source made of the target, "
            "but task 'pair' has a source of its own",
            "use span_union, span_overlap or uniform, or data.task denoise",
        )
    if masking.target != "uniform" and masking.target_share == 0:
        refuse(
            f"masking.target_share {keys}",
            "masking.target_share is 0, so that nothing would be masked",
            "give a share above 0 (.7 for translation, .5 for pretraining), or masking.target uniform",
        )
    if masking.target == "infilling" and (masking.source_share or 0) > (masking.target_share or 0):
        refuse(
            f"masking.source_share masking.target_share {keys}",
            f"masking.source_share {masking.source_share} is above masking.target_share "
            f"{masking.target_share}, but what the encoder does not see is part of what is masked",
            "give a source share of at most the target share",
        )


def _objective(run: RunConfig, refuse: _Refuse) -> None:
    objective = run.objective
    weights = {name: getattr(objective, f"weight_{name}") for name in ("ar", "nar", "aux")}
    keys = " ".join(["objective.preset", *(f"objective.weight_{name}" for name in weights)])
    if not any(weights.values()):
        refuse(
            f"objective.weight_ar {keys}",
            "the AR, NAR and AUX losses all have weight 0, so that no token is trained",
            "give at least one of objective.weight_ar, weight_nar and weight_aux above 0",
        )
    if objective.encoder_passes == 2 and not (weights["ar"] and (weights["nar"] or weights["aux"])):
        refuse(
            f"objective.encoder_passes {keys}",
            "objective.encoder_passes is 2, which gives AR one dropout draw of the encoder and NAR and AUX "
            "another, but this objective does not train AR beside NAR or AUX",
            "use objective.encoder_passes 1, or a preset with both (paper, released)",
        )
    for stream, weight in weights.items():
        name = f"objective.weight_kl_{stream}_{stream}"
        if getattr(objective, f"weight_kl_{stream}_{stream}") and not weight:
            refuse(
                f"{name} objective.weight_{stream}",
                f"{name} compares two dropout draws of {stream.upper()}, but objective.weight_{stream} is 0",
                f"give objective.weight_{stream} a number above 0, or leave {name} out",
            )


def _optim(run: RunConfig, refuse: _Refuse) -> None:
    optim, steps = run.optim, run.train.max_steps
    if optim.schedule == "polynomial" and optim.warmup_steps >= steps:
        refuse(
            "optim.warmup_steps train.max_steps optim.schedule",
            f"the polynomial schedule warms up for {optim.warmup_steps} steps, but the run has {steps}",
            "give fewer optim.warmup_steps or more train.max_steps",
        )
    if optim.warmup_init_lr > optim.lr:
        refuse(
            "optim.warmup_init_lr optim.lr",
            f"warm-up starts at {optim.warmup_init_lr}, above the peak learning rate {optim.lr}",
            "give optim.warmup_init_lr of at most optim.lr",
        )


def _validation(run: RunConfig, refuse: _Refuse) -> None:
    train = run.train
    if train.valid_bleu != "none" and run.data.task != "pair":
        refuse(
            "train.valid_bleu data.task",
            f"train.valid_bleu scores outputs for given sources, but the task is {run.data.task!r}",
            "leave train.valid_bleu out, or set data.task to pair",
        )
    if train.keep_best not in ("none", "loss", *train.valid_bleu.split(",")):
        refuse(
            "train.keep_best train.valid_bleu",
            f"train.keep_best is {train.keep_best!r}, but train.valid_bleu does not measure that mode",
            f"add {train.keep_best} to train.valid_bleu",
        )
    if train.patience and train.keep_best == "none":
        refuse(
            "train.patience train.keep_best",
            "train.patience counts validations without a better one, but train.keep_best names no figure",
            "set train.keep_best to loss, ar or nar, or train.patience to 0",
        )


def _faults(run: RunConfig, refuse: _Refuse) -> None:
    train, data = run.train, run.data
    every, kept = train.save_every, train.keep_every
    if kept % every:
        refuse(
            "train.keep_every train.save_every",
            f"train.keep_every is {kept}, but there are checkpoints at multiples of {every} only",
            f"give a multiple of train.save_every, such as {max(kept // every, 1) * every}, or 0",
        )
    if train.spike_action in ("skip", "stop") and train.spike_window >= train.max_steps:
        refuse(
            "train.spike_window train.spike_action train.max_steps",
            f"a spike is seen after {train.spike_window} steps (train.spike_window), but the run has "
            f"{train.max_steps}",
            "give a smaller train.spike_window or more train.max_steps, or leave train.spike_action out",
        )
    seconds = 60 * train.stall_minutes
    distant = any(is_remote(place) for place in (data.path or "", data.valid_path or ""))
    if distant and 0 < seconds <= data.stall_seconds:
        refuse(
            "train.stall_minutes data.stall_seconds",
            f"train.stall_minutes ends the run after {seconds:g} s without progress, but a transfer of data "
            f"may take {data.stall_seconds:g} s to fail (data.stall_seconds), and is then tried again",
            "give more train.stall_minutes, or fewer data.stall_seconds",
        )


def _decode(run: RunConfig, refuse: _Refuse) -> None:
    longest, rows = run.decode.max_length, run.model.max_target_positions
    if longest > rows:
        refuse(
            "decode.max_length model.max_target_positions",
            f"decode.max_length is {longest}, but the model has {rows} target positions",
            f"give at most {rows}, or 0 for as many as the model allows",
        )
    if longest and run.decode.min_length > longest:
        refuse(
            "decode.min_length decode.max_length",
            f"decode.min_length is {run.decode.min_length}, decode.max_length {longest}",
            "give a shortest length that is not above the longest",
        )
    if not re.fullmatch(r"specials|none|\d+( \d+)*", run.decode.forbid):
        refuse(
            "decode.forbid",
            f"decode.forbid is {run.decode.forbid!r}, which names no tokens",
            'give specials, none, or token ids with spaces between them, such as "3 101"',
        )
    if run.decode.iterations is None and run.decode.threshold is None:
        refuse(
            "decode.iterations decode.threshold",
            "decode.iterations is null, which is no limit, but nothing else ends mask-predict's passes",
            "give a number of iterations, or decode.threshold",
        )
    _one_by_one(run, refuse)


def _one_by_one(run: RunConfig, refuse: _Refuse) -> None:
    """What the modes draft and aux leave no choice in."""
    ruled = [key for key, value in _NO_RULES.items() if getattr(run.decode, key) != value]
    if run.decode.mode == "draft" and ruled:
        refuse(
            " ".join(f"decode.{key}" for key in (*ruled, "mode")),
            f"mode draft checks whole drafts at once and knows no {', '.join(ruled)}",
            f"use mode ar, or set decode.{ruled[0]} to {json.dumps(_NO_RULES[ruled[0]])}",
        )
    if run.decode.mode == "draft" and run.decode.beam > 1:
        refuse(
            "decode.beam decode.mode",
            f"decode.beam is {run.decode.beam}, but mode draft gives the output of greedy search",
            "leave the beam out or give 1; for a beam use mode ar",
        )
    if run.decode.mode == "aux" and run.decode.beam > 1:
        refuse(
            "decode.beam decode.mode",
            f"decode.beam is {run.decode.beam}, but mode aux has no beam",
            "leave the beam out or give 1; several lengths are tried with decode.length_beam",
        )
