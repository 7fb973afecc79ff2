"""The ways of decoding: what a model must have learnt for each, and which options it uses.

The one table of them, read by commands, evaluations, validation and the generator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from janus_ds.config.load import from_dict, to_dict
from janus_ds.config.schema import DecodeConfig, ObjectiveConfig, RunConfig
from janus_ds.errors import ConfigError, UsageError

_LOSSES = {"ar": ("ar",), "nar": ("nar", "length"), "aux": ("aux", "length")}
"""What each way of predicting is trained by: fields `objective.weight_*`."""
_SAMPLES = ("temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Mode:
    """One way of decoding.

    Attributes:
        needs: the ways of predicting that it is made of.
        options: those of `janus-ds decode` that it has an effect on, beside what all have: fields of
            `DecodeConfig`, nbest and target.
        size: the field that says how many outputs it finds; empty: it finds one.
    """

    needs: tuple[str, ...]
    options: frozenset[str]
    size: str = ""


def _mode(needs: str, size: str, *options: str) -> Mode:
    more = (size, "nbest") if size else ()
    return Mode(tuple(needs.split()), frozenset((*options, *more)), size)


_RULES = (
    "early_stopping",
    "min_length",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "prefix",
    "forced_eos",
)
_AR = ("length_penalty", "forced_bos", "beam_stop")
_NAR = ("iterations", "nar_score", "threshold", "rescore", "target")
RESCORED = "nar with --rescore ar"
GREEDY = "ar-greedy"
"""In evaluations AR with one beam, beside AR with the beam that was asked for."""
MODES: Mapping[str, Mode] = {
    "ar": _mode("ar", "beam", *_RULES, *_AR, "forbid", *_SAMPLES),
    "nar": _mode("nar", "length_beam", *_NAR),
    "draft": _mode("ar nar", "", *_AR, "forbid", *_SAMPLES),
    "aux": _mode("aux", "length_beam", "aux_order", "nar_score", "target", *_SAMPLES),
    RESCORED: _mode("ar nar", "length_beam", *_NAR, *_AR),
}
"""All ways; each name but the last is a value of `decode.mode`."""
NAMES = tuple(name for name in MODES if name != RESCORED)


def way_of(decode: DecodeConfig) -> Mode:
    """The way that these settings mean."""
    return MODES[_name_of(decode)]


def _name_of(decode: DecodeConfig) -> str:
    return RESCORED if decode.mode == "nar" and decode.rescore else decode.mode


def trained_modes(objective: ObjectiveConfig, among: Sequence[str] = ("ar", "nar")) -> tuple[str, ...]:
    """Those of some modes that a model trained with these weights can decode in.

    AR needs its own loss: AUX rows never predict eos. They train NAR as well, since they are predictions from
    MASK rows; NAR and AUX also need a trained length head.
    """
    weights = {term: getattr(objective, f"weight_{term}") for terms in _LOSSES.values() for term in terms}
    weights["nar"] = weights["nar"] or weights["aux"]
    learnt = {way for way, terms in _LOSSES.items() if all(weights[term] for term in terms)}
    return tuple(name for name in among if learnt.issuperset(MODES[name].needs))


def check_mode(config: RunConfig) -> None:
    """Refuse a mode of decoding that a run was not trained for.

    Raises:
        ConfigError: so it is.
    """
    mode, objective, needs = config.decode.mode, config.objective, way_of(config.decode).needs
    missing = [name for name in needs if not trained_modes(objective, (name,))]
    if missing:
        terms = [f"weight_{term}" for name in missing for term in _LOSSES[name]]
        untrained = ", ".join(f"objective.{term} is {getattr(objective, term)}" for term in terms)
        option = "mode 'draft'" if mode == "draft" else "--rescore ar"
        what = f"both ways, as {option} needs" if len(needs) > 1 else f"in mode {mode!r}"
        trained = " or ".join(trained_modes(objective))
        raise ConfigError(
            f"the model was not trained to decode {what} ({untrained})",
            "decode.mode" if mode in missing or mode == "draft" else "decode.rescore",
            f"use mode {trained}" if trained else "use a checkpoint of another run",
        )
    if mode == "aux" and config.decode.aux_order == "certain" and config.masking.aux_order != "random":
        raise ConfigError(
            f"AUX was trained {config.masking.aux_order}, not for any order",
            "decode.aux_order",
            "leave it out, or use a model that was trained with masking.aux_order: random",
        )


def check_used(decode: DecodeConfig, given: Mapping[str, Any]) -> None:
    """Refuse, by name, a decoding option that is given and has no effect.

    Args:
        decode: all options, with the given ones.
        given: fields of `DecodeConfig`; a default is as if not given, and so is a beam of 1.

    Raises:
        ConfigError: the mode does not use it, or it is for samples and none are drawn.
    """
    way = _name_of(decode)
    for name, value in given.items():
        users = [other for other, found in MODES.items() if name in found.options]
        if value in (getattr(DecodeConfig, name, value), 1 if name == "beam" else None):
            continue
        if users and way not in users:
            fix = f"leave it out, or decode in mode {' or '.join(users)}"
            raise ConfigError(f"mode {way} does not use {name}", f"decode.{name}", fix)
        if name in ("top_k", "top_p") and not decode.temperature:
            what = f"{name} has no effect without temperature"
            raise ConfigError(what, f"decode.{name}", "add temperature")


def refuse_unused(given: Collection[str], modes: Sequence[str]) -> None:
    """Refuse, by name, an option of the command line that is given and that none of the modes uses.

    Args:
        given: options that have a value; names that are none of a mode's do not matter.

    Raises:
        UsageError: there is one.
    """
    doing = {*modes, *[RESCORED] * ("nar" in modes and "rescore" in given)}
    for name in dict.fromkeys(name for mode in MODES.values() for name in sorted(mode.options)):
        users = [way for way, mode in MODES.items() if name in mode.options]
        if name in given and doing.isdisjoint(users):
            option = f"--{name.replace('_', '-')}"
            others = " or ".join(way for way in users if way != RESCORED or "nar" not in users)
            what = f"mode {','.join(modes)} does not use {option}"
            raise UsageError(what, option, f"leave it out, or decode in mode {others}")


def with_decode(config: RunConfig, decode: Mapping[str, Any]) -> RunConfig:
    """The same run with other decoding options.

    Modes draft and aux know no beam, and samples are drawn one by one: a beam (of AUX, lengths) that only the
    run's recipe names is not taken over. Nor is its number of iterations by a threshold that is asked for.
    """
    values = to_dict(config)
    values["decode"] |= decode
    mode, sampled = values["decode"]["mode"], values["decode"]["temperature"]
    if (decode.get("mode") in ("draft", "aux") or (mode == "ar" and sampled)) and "beam" not in decode:
        values["decode"]["beam"] = 1
    if mode == "aux" and sampled and "length_beam" not in decode:
        values["decode"]["length_beam"] = 1
    if decode.get("threshold") is not None and "iterations" not in decode:
        values["decode"]["iterations"] = None
    return from_dict(values, "decoding options")
