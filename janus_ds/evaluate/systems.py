"""Names and decoding options of the systems that an evaluation compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from janus_ds.errors import UsageError

GREEDY = "ar-greedy"
"""AR with one beam, beside AR with the beam that was asked for."""
MODES = ("ar", GREEDY, "nar", "draft", "aux")


def check_systems(
    modes: Sequence[str],
    iterations: Sequence[int],
    thresholds: Sequence[float],
    decode: Mapping[str, Any],
) -> None:
    """Refuse what cannot be, before anything is loaded.

    Raises:
        UsageError: a mode, a number of iterations or a threshold that does not exist, or a beam where none is
            known.
    """
    for mode in modes:
        if mode not in MODES:
            raise UsageError(
                f"there is no mode {mode!r}", "--modes", f"use {', '.join(MODES)}, or several, as ar,nar"
            )
    for number in iterations:
        if number < 0:
            raise UsageError(
                f"{number} iterations cannot be made", "--iterations", "give 0 or more, such as 0,1,4,10"
            )
    for share in thresholds:
        if not 0 < share <= 1:
            raise UsageError(
                f"{share} is no probability",
                "--threshold",
                "give shares above 0 and up to 1, such as 0.9,0.99",
            )
    check_beam(modes, decode.get("beam"))


def check_beam(modes: Sequence[str], beam: int | None) -> None:
    """Refuse a beam that no mode has; beside AR it is meant for AR.

    Raises:
        UsageError: so it is.
    """
    if "ar" in modes or (beam or 1) <= 1:
        return
    if "draft" in modes:
        raise UsageError(
            f"mode draft gives the output of greedy search, but the beam is {beam}",
            "--mode draft --beam",
            "leave --beam out; for a beam use --mode ar",
        )
    if "aux" in modes:
        raise UsageError(
            f"mode aux has no beam, but the beam is {beam}",
            "--mode aux --beam",
            "leave --beam out; several lengths are tried with --length-beam",
        )


def options_by_name(
    modes: Sequence[str],
    iterations: Sequence[int],
    thresholds: Sequence[float],
    decode: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Fields of `DecodeConfig` by system: ar, ar-greedy, nar-0, nar-4-rescored, nar-t0.9, draft, aux, ...

    Each threshold is one system, whose passes have no limit. Where AR rescores, NAR systems come
    with and without. `decode` has further fields, for all.
    """
    systems: dict[str, dict[str, Any]] = {}
    plain = {name: value for name, value in decode.items() if name != "rescore"}
    for mode in modes:
        if mode == "nar":
            ways: dict[str, dict[str, Any]] = {f"nar-{n}": {"iterations": n} for n in iterations}
            ways |= {f"nar-t{share:g}": {"threshold": share} for share in thresholds}
            for name, way in ways.items():
                systems[name] = {**plain, "mode": "nar", **way}
                if decode.get("rescore") is not None:
                    systems[f"{name}-rescored"] = {**systems[name], "rescore": decode["rescore"]}
        elif mode in ("draft", "aux"):
            # A beam is meant for AR beside it.
            systems[mode] = {**{k: v for k, v in plain.items() if k != "beam"}, "mode": mode}
        elif mode == GREEDY:
            systems[mode] = {**plain, "mode": "ar", "beam": 1}
        else:
            systems[mode] = {**plain, "mode": mode}
    return systems
