"""What the values of a run must satisfy together; types, ranges and choices stand in `schema.py`.

Everything that can be known before data or devices are looked at is checked here, so that a run
fails in the first second and not in the first hour.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator

from janus_ds.config.fields import FaultList
from janus_ds.config.locations import PIPE, is_remote, parse_locations
from janus_ds.config.schema import STREAMS, DataConfig, RunConfig
from janus_ds.errors import ConfigError

Where = Callable[[str], str]
"""Says where a key was given: file or override, and the key itself."""

_Broken = Iterator[tuple[str, str, str]]
"""Of each broken rule: the keys that it speaks of, the one to blame first; what is wrong; what to do."""

_NO_RULES = {
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "forced_eos": None,
    "prefix": "",
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
    for rules in (_model, _data, _masking, _objective, _optim, _validation, _training, _decode):
        for keys, what, fix in rules(run):
            names = keys.split()
            faults.add(what, where(names[0]), fix, names)


def without_effect(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Keys that nothing reads in this run, and why."""
    data, masking, train, scored = run.data, run.masking, run.train, run.train.valid_bleu
    pair, tokens, objective = data.task == "pair", data.batch == "tokens", run.objective
    fetching = "data.cache_dir data.cache_gb data.read_ahead data.retries data.stall_seconds"
    queries = objective.ar_stream == "query" and objective.decoder_start == "bos"
    unseen, coin = pair and objective.streams == ("ar",), masking.target == "infilling_released"
    uniform = masking.target == "uniform" and not unseen
    ramps = kl, nar, aux = objective.ramp_kl_steps, objective.ramp_nar_steps, objective.ramp_aux_steps
    cases = (
        (tokens, "train.global_batch", "data.batch is tokens, and train.batch_tokens counts"),
        (not tokens, "train.batch_tokens train.batch_groups", "data.batch is samples"),
        (pair, "masking.source_share masking.rotate_share", "data.task is pair"),
        (coin, "masking.source_share", "masking.target infilling_released hides half of the spans"),
        (unseen, "masking.target masking.target_share masking.poisson", "neither NAR nor AUX is trained"),
        (uniform, "masking.target_share", "masking.target is uniform"),
        (pair and uniform, "masking.poisson", "masking.target is uniform"),
        ("aux" not in objective.streams, "masking.aux_order", "AUX is not trained"),
        ("ar" not in objective.streams, "objective.ar_stream", "AR is not trained"),
        (not queries, "objective.ar_query_position", "there are no AR query rows with decoder_start bos"),
        (kl and not objective.kl_pairs, "objective.ramp_kl_steps", "no KL term has a weight"),
        (nar and not objective.weight_nar, "objective.ramp_nar_steps", "objective.weight_nar is 0"),
        (aux and not objective.weight_aux, "objective.ramp_aux_steps", "objective.weight_aux is 0"),
        (not any(ramps), "objective.ramp_start", "no ramp has steps (objective.ramp_kl_steps and so on)"),
        (scored == "none", "train.valid_task train.valid_bleu_samples", "train.valid_bleu is none"),
        ("nar" not in scored, "train.valid_bleu_iterations", f"train.valid_bleu is {scored}"),
        (train.patience and not train.valid_every, "train.patience", "train.valid_every is 0"),
        (train.spike_action == "off", "train.spike_factor train.spike_window", "train.spike_action is off"),
        (data.on_damage == "stop", "data.max_damage", "data.on_damage is stop"),
        (not data.workers, "data.prefetch_steps", "data.workers is 0"),
        (not _is_distant(data), fetching, "all data is on this machine"),
        (not run.optim.warmup_steps, "optim.warmup_init_lr", "optim.warmup_steps is 0"),
        (run.init is None, "init_length_head", "there is no init"),
    )
    yield from ((key, why) for idle, keys, why in cases if idle for key in keys.split())


def _is_distant(data: DataConfig) -> bool:
    """Whether any of the data must be fetched."""
    return any(is_remote(place.strip()) for place in [*(data.path or "").split(","), data.valid_path or ""])


def _model(run: RunConfig) -> _Broken:
    model, block = run.model, run.data.block_tokens
    if model.d_model % model.heads:
        what = f"{model.heads} heads do not divide d_model {model.d_model}"
        fix = f"give a number of heads that divides {model.d_model}, or another model.d_model"
        yield "model.heads model.d_model", what, fix
    for side in ["max_target_positions"] + ["max_source_positions"] * (run.data.task == "denoise"):
        rows = getattr(model, side)
        if block + 2 > rows:
            what = f"blocks of {block} tokens with bos and eos need {block + 2} positions"
            fix = f"prepare blocks of at most {rows - 2} tokens and set data.block_tokens to that"
            yield (
                f"data.block_tokens model.{side}",
                f"{what}, but model.{side} is {rows}",
                f"{fix}, or set model.{side} to at least {block + 2}",
            )


def _data(run: RunConfig) -> _Broken:
    data = run.data
    try:
        places = [place.location for place in parse_locations(data.path)] if data.path else []
    except ConfigError as error:
        yield "data.path", error.what, error.fix
        return
    commands = [place for place in [*places, data.valid_path or ""] if place.startswith(PIPE)]
    if any("{}" not in command for command in commands):
        what = "a command that gives the data does not say where the name of the file goes"
        yield "data.path", what, f"put {{}} in its place: {PIPE}cat DIR/{{}}"
    if data.batch == "tokens":
        if len(places) > 1:
            what = "batches of tokens are cut by the lengths of one source; several cannot be mixed in them"
            yield "data.path data.batch", what, "set data.batch to samples, or give one source"
        if data.on_damage == "quarantine":
            what = "batches of tokens are cut by the lengths of all samples, so that none can be replaced"
            yield "data.on_damage data.batch", what, "use data.on_damage stop, or data.batch samples"
        if data.shuffle_shards:
            what = "data.shuffle_shards orders batches of samples; those of tokens have an order of their own"
            yield "data.shuffle_shards data.batch", what, "leave data.shuffle_shards out"
    if run.train.valid_bleu != "none" and (len(places) > 1 or any(map(is_remote, places))):
        what = "train.valid_bleu reads the validation text of one local directory"
        fix = "copy the data to this machine, or set train.valid_bleu to none"
        yield "train.valid_bleu data.path", what, fix


def _masking(run: RunConfig) -> _Broken:
    masking, keys = run.masking, "masking.target data.task objective.preset"
    target, share, hidden = masking.target or "uniform", masking.target_share or 0, masking.source_share or 0
    if target.startswith("infilling") and run.data.task == "pair":
        what = f"masking.target {target!r} hides tokens from a source made of the target"
        fix = "use span_union, span_overlap or uniform, or data.task denoise"
        yield keys, f"{what}, but task 'pair' has a source of its own", fix
    if target != "uniform" and share == 0:
        what = "masking.target_share is 0, so that nothing would be masked"
        fix = "give a share above 0 (.7 for translation, .5 for pretraining), or masking.target uniform"
        yield f"masking.target_share {keys}", what, fix
    if target == "infilling" and hidden > share:
        what = f"masking.source_share {hidden} is above masking.target_share {share}"
        yield (
            f"masking.source_share masking.target_share {keys}",
            f"{what}, but what the encoder does not see is part of what is masked",
            "give a source share of at most the target share",
        )


def _objective(run: RunConfig) -> _Broken:
    objective = run.objective
    weights = {name: getattr(objective, f"weight_{name}") for name in STREAMS}
    keys = " ".join(["objective.preset", *(f"objective.weight_{name}" for name in weights)])
    if not any(weights.values()):
        what = "the AR, NAR and AUX losses all have weight 0, so that no token is trained"
        fix = "give at least one of objective.weight_ar, weight_nar and weight_aux above 0"
        yield f"objective.weight_ar {keys}", what, fix
    if objective.encoder_passes == 2 and not (weights["ar"] and (weights["nar"] or weights["aux"])):
        what = "objective.encoder_passes is 2, which gives AR one dropout draw of the encoder and NAR and AUX"
        yield (
            f"objective.encoder_passes {keys}",
            f"{what} another, but this objective does not train AR beside NAR or AUX",
            "use objective.encoder_passes 1, or a preset with both (paper, released)",
        )
    for stream, weight in weights.items():
        own, name = f"objective.weight_{stream}", f"objective.weight_kl_{stream}_{stream}"
        if getattr(objective, f"weight_kl_{stream}_{stream}") and not weight:
            what = f"{name} compares two dropout draws of {stream.upper()}, but {own} is 0"
            yield f"{name} {own}", what, f"give {own} a number above 0, or leave {name} out"


def _optim(run: RunConfig) -> _Broken:
    optim, steps = run.optim, run.train.max_steps
    if optim.schedule == "polynomial" and optim.warmup_steps >= steps:
        what = f"the polynomial schedule warms up for {optim.warmup_steps} steps, but the run has {steps}"
        fix = "give fewer optim.warmup_steps or more train.max_steps"
        yield "optim.warmup_steps train.max_steps optim.schedule", what, fix
    if optim.warmup_init_lr > optim.lr:
        what = f"warm-up starts at {optim.warmup_init_lr}, above the peak learning rate {optim.lr}"
        yield "optim.warmup_init_lr optim.lr", what, "give optim.warmup_init_lr of at most optim.lr"


def _validation(run: RunConfig) -> _Broken:
    train = run.train
    if train.valid_bleu != "none" and run.data.task != "pair":
        what = f"train.valid_bleu scores outputs for given sources, but the task is {run.data.task!r}"
        fix = "leave train.valid_bleu out, or set data.task to pair"
        yield "train.valid_bleu data.task", what, fix
    if train.keep_best not in ("none", "loss", *train.valid_bleu.split(",")):
        what = f"train.keep_best is {train.keep_best!r}, but train.valid_bleu does not measure that mode"
        yield "train.keep_best train.valid_bleu", what, f"add {train.keep_best} to train.valid_bleu"
    if train.patience and train.keep_best == "none":
        what = "train.patience counts validations without a better one, but train.keep_best names no figure"
        fix = "set train.keep_best to loss, ar or nar, or train.patience to 0"
        yield "train.patience train.keep_best", what, fix


def _training(run: RunConfig) -> _Broken:
    train, data = run.train, run.data
    every, kept = train.save_every, train.keep_every
    if kept % every:
        what = f"train.keep_every is {kept}, but there are checkpoints at multiples of {every} only"
        fix = f"give a multiple of train.save_every, such as {max(kept // every, 1) * every}, or 0"
        yield "train.keep_every train.save_every", what, fix
    if train.spike_action in ("skip", "stop") and train.spike_window >= train.max_steps:
        what = f"a spike is seen after {train.spike_window} steps (train.spike_window)"
        yield (
            "train.spike_window train.spike_action train.max_steps",
            f"{what}, but the run has {train.max_steps}",
            "give a smaller train.spike_window or more train.max_steps, or leave train.spike_action out",
        )
    seconds = 60 * train.stall_minutes
    if _is_distant(data) and 0 < seconds <= data.stall_seconds:
        transfer = f"a transfer of data may take {data.stall_seconds:g} s to fail (data.stall_seconds)"
        yield (
            "train.stall_minutes data.stall_seconds",
            f"train.stall_minutes ends the run after {seconds:g} s without progress, but {transfer}, and is "
            "then tried again",
            "give more train.stall_minutes, or fewer data.stall_seconds",
        )


def _decode(run: RunConfig) -> _Broken:
    decode, rows = run.decode, run.model.max_target_positions
    longest, mode = decode.max_length, decode.mode
    if longest > rows:
        what = f"decode.max_length is {longest}, but the model has {rows} target positions"
        fix = f"give at most {rows}, or 0 for as many as the model allows"
        yield "decode.max_length model.max_target_positions", what, fix
    if longest and decode.min_length > longest:
        what = f"decode.min_length is {decode.min_length}, decode.max_length {longest}"
        fix = "give a shortest length that is not above the longest"
        yield "decode.min_length decode.max_length", what, fix
    if not re.fullmatch(r"specials|none|\d+( \d+)*", decode.forbid):
        what = f"decode.forbid is {decode.forbid!r}, which names no tokens"
        fix = 'give specials, none, or token ids with spaces between them, such as "3 101"'
        yield "decode.forbid", what, fix
    if decode.iterations is None and decode.threshold is None:
        what = "decode.iterations is null, which is no limit, but nothing else ends mask-predict's passes"
        fix = "give a number of iterations, or decode.threshold"
        yield "decode.iterations decode.threshold", what, fix
    ruled = [key for key, value in _NO_RULES.items() if getattr(decode, key) != value]
    if mode == "draft" and ruled:
        keys = " ".join(f"decode.{key}" for key in (*ruled, "mode"))
        what = f"mode draft checks whole drafts at once and knows no {', '.join(ruled)}"
        fix = f"use mode ar, or set decode.{ruled[0]} to {json.dumps(_NO_RULES[ruled[0]])}"
        yield keys, what, fix
    instead = {
        "draft": ("gives the output of greedy search", "for a beam use mode ar"),
        "aux": ("has no beam", "several lengths are tried with decode.length_beam"),
    }
    if mode in instead and decode.beam > 1:
        why, fix = instead[mode]
        what = f"decode.beam is {decode.beam}, but mode {mode} {why}"
        yield "decode.beam decode.mode", what, f"leave the beam out or give 1; {fix}"
