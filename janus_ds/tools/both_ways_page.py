"""The page about both ways at once: theory in short, the figures of the JSON, what does not come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from janus_ds.io import write_atomic
from janus_ds.tools.both_ways import GREEDY, SYSTEMS
from janus_ds.tools.both_ways_choice import CHOSEN_DRAFT, CHOSEN_RESCORED
from janus_ds.tools.report_data import RunFolder, System

__all__ = ["expected_settled", "write_page"]

_TASK = "nmt"
_PICTURE = "both_ways.png"
_DRAWN = (
    "ar",
    GREEDY,
    "nar-0",
    "nar-1",
    "nar-4",
    "nar-10",
    CHOSEN_RESCORED,
    "nar-t0.9",
    CHOSEN_DRAFT,
)
_THEORY = """\
## Why nothing is lost

One encoder and one decoder hold both ways, so the drafter costs no second model. AR checks a draft d_1 ..
d_M in one pass: content rows carry the last settled token and the draft, and the query row behind each of
them gives AR's choice c_i after the tokens before it. As long as d_i = c_i, the content rows are those
that AR would have had itself, so c_{i+1} is what it would have chosen next; at the first difference c_i
is still right, and everything behind it is dropped (its keys and values, too). Each check settles the
accepted tokens and one more, and by induction the output is AR greedy's. What drafts are like only
decides how many checks are needed.

Let a be the chance that a drafted token is accepted when those before it were. If the chances are
independent, a draft of M tokens settles (1 - a^(M+1)) / (1 - a) tokens a check on average, from 1 (a = 0)
to M + 1 (a = 1).

Under sampling a token drawn from NAR's q is accepted with probability min(1, p/q), else drawn from (p -
q)+, normalised: it then has AR's distribution p whatever q is, as min(p, q) + (1 - sum min(p, q)) (p -
q)+ / sum (p - q)+ = p. A token that was chosen and not drawn has q = 1. Tests hold the distribution of
whole outputs against the exact one (chi-square).

Behind a rejected token the draft is what earlier drafts, and AR's choices behind earlier differences, have
from there on, at the same place or shifted by one: one pass a round. `--draft-width K` checks K drafts at
once, as beams of one block.
"""

_REASONS = """\
## What holds it back

- **Passes are not time.** A check computes two rows for each token of each draft, AR's step two in all,
  so a check costs more than a step, and the more the wider it is: on a CPU the fewest passes are not the
  least time.
- **Batches.** With 32 sentences AR's steps are full already; drafts compute more rows in all and pay for
  the longest block of the batch. Drafting is for single sentences, or for devices where a wider pass
  costs nothing.
- **Acceptance.** Behind a rejected token drafts are worse than at the start of a sentence: the length
  estimate and NAR's place in the sentence are off by one or more. That is why shifted tails and several
  lengths help.
"""


def expected_settled(rate: float, drafted: int) -> float:
    """Tokens that a check settles on average if each drafted one is accepted with one chance."""
    return drafted + 1.0 if rate >= 1 else (1 - rate ** (drafted + 1)) / (1 - rate)


def write_page(content: Mapping[str, Any], folder: Path) -> Path:
    """Write both_ways.md, and both_ways.png where matplotlib is installed; the Markdown's path.

    Raises:
        ResourceError: the folder cannot be written.
    """
    drawn = _draw(content, folder)
    path = folder / "both_ways.md"
    write_atomic(path, "\n".join([*_lines(content, drawn), ""]).encode())
    return path


def _lines(content: Mapping[str, Any], drawn: bool) -> Iterator[str]:
    runs: Mapping[str, Any] = content["runs"]
    yield from ("# Both ways at once", "")
    yield (
        "Made by `make results-both-ways` (launch/experiments/both_ways.py) of models of `make results-nmt`; "
        f"all figures are in both_ways.json. Command: `{' '.join(content['command'])}`. BLEU is sacreBLEU "
        "13a on test_2016_flickr. `-chosen`: of several settings the one that was fastest sentence by "
        "sentence (drafts) or best in BLEU (rescored) on validation sentences. Times are CPU time of one "
        "thread, medians of rounds in turns."
    )
    yield from ("", "## What came out", "", *_aims(runs), "")
    if drawn:
        yield from (f"![Quality against time]({_PICTURE})", "")
    for name, run in runs.items():
        yield from _run(name, run)
    yield from _bridge(runs)
    yield from ("", _REASONS, _THEORY)
    hardware, versions = content["hardware"], content["versions"]
    yield f"Hardware: {hardware['cpu']}, {hardware['cores']} cores; torch {versions['torch']}."


def _aims(runs: Mapping[str, Any]) -> Iterator[str]:
    for name, run in runs.items():
        systems, times = run["systems"], run["times"]
        faster = times["1"]["faster_than_greedy"][CHOSEN_DRAFT]
        ratio = systems[GREEDY]["passes"] / systems[CHOSEN_DRAFT]["passes"]
        equal = [part for part in run["lossless"] if part["precision"] in ("float64", "fp32")]
        told = ", ".join(f"{p['different']} of {p['sentences']} in {p['precision']}" for p in equal)
        yield f"- **{name}, draft at batch 1** (aim: 2x AR greedy): {_met(faster['median'] >= 2)}"
        yield (
            f"  {faster['median']:.2f}x ({faster['min']:.2f} - {faster['max']:.2f}) with "
            f"{_settings(systems[CHOSEN_DRAFT])}; {ratio:.2f}x fewer decoder passes. Outputs that differ "
            f"from AR greedy's: {told}."
        )
        score = {system: part["metrics"]["sacrebleu"] for system, part in systems.items()}
        for goal in ("ar", GREEDY):
            gap = score[goal] - score["nar-4"]
            closed = (score[CHOSEN_RESCORED] - score["nar-4"]) / gap if gap > 0 else float("inf")
            way = "beam 5" if goal == "ar" else "greedy"
            yield f"- **{name}, NAR 4 rescored** (aim: half of the gap to AR {way}): {_met(closed >= 0.5)}"
            yield (
                f"  {score['nar-4']:.2f} -> {score[CHOSEN_RESCORED]:.2f} with "
                f"{_settings(systems[CHOSEN_RESCORED])}, AR {way} {score[goal]:.2f}: {100 * closed:.0f} % of "
                f"the gap (five lengths without AR's judgement: {score['nar-4-5-lengths']:.2f})."
            )


def _settings(part: Mapping[str, Any]) -> str:
    """What a chosen system was decoded with, but for what its name says."""
    said = {"mode", "iterations", "rescore"}
    return ", ".join(f"{key} {value}" for key, value in sorted(part["decode"].items()) if key not in said)


def _chosen(run: Mapping[str, Any]) -> Iterator[str]:
    """What was tried on validation sentences."""
    yield from ("", "Tried on validation sentences (drafts: ms a sentence at batch 1; rescored: BLEU):", "")
    for name, part in run["chosen"].items():
        figures = [
            f"{_settings(row)}: {row.get('sacrebleu', row.get('milliseconds')):.2f}" for row in part["tried"]
        ]
        yield f"- `{name}`: {'; '.join(figures)}"


def _met(reached: bool) -> str:
    return "reached." if reached else "not reached."


def _run(name: str, run: Mapping[str, Any]) -> Iterator[str]:
    weights = ", ".join(f"{key} {value:g}" for key, value in run["kl_weights"].items() if value is not None)
    yield f"## {name}"
    yield ""
    yield (
        f"Objective {run['objective']}, KL weights {weights}; {run['sentences']} sentences, "
        f"{run['mean_tokens']:.1f} tokens on average, {run['checkpoint']}, {run['averaged']} averaged."
    )
    yield ""
    yield "| system | BLEU | passes | ms, batch 1 | AR greedy / it | ms, batch 32 | AR greedy / it |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for system, part in _ordered(run).items():
        cells = [f"{part['metrics']['sacrebleu']:.2f}", f"{part['passes']:.1f}"]
        for batch in ("1", "32"):
            times = run["times"][batch]
            if system in times["milliseconds"]:
                cells.append(f"{times['milliseconds'][system]['median']:.1f}")
                cells.append(f"{times['faster_than_greedy'][system]['median']:.2f}x")
            else:
                cells += ["", ""]
        yield f"| {' | '.join([system, *cells])} |"
    yield from (
        "",
        "Passes are those of the decoder (AR: steps of the output).",
    )
    yield from _chosen(run)
    yield from _acceptance(run)
    yield from _differences(run)


def _ordered(run: Mapping[str, Any]) -> dict[str, Any]:
    """Systems in the order in which they are named here; JSON sorts them."""
    names = (*SYSTEMS, CHOSEN_DRAFT, CHOSEN_RESCORED)
    return {name: run["systems"][name] for name in names if name in run["systems"]}


def _acceptance(run: Mapping[str, Any]) -> Iterator[str]:
    positions = range(0, 14)
    yield from (
        "",
        "Share of drafted tokens accepted, of those that AR looked at, by position in the sentence:",
        "",
    )
    yield f"| drafts | all | first draft | rounds | {' | '.join(str(p + 1) for p in positions)} |"
    yield f"| --- | --- | --- | --- |{' --- |' * len(positions)}"
    for name, part in _ordered(run).items():
        found = part.get("acceptance")
        if found is None:
            continue
        shares = [found["by_position"][p] for p in positions]
        cells = [
            "" if share is None else f".{round(100 * share):02d}" if share < 0.995 else "1"
            for share in shares
        ]
        head = f"{found['rate']:.2f} | {found['first_draft']:.1f} tokens | {found['rounds']:.1f}"
        yield f"| {name} | {head} | {' | '.join(cells)} |"
    rate = run["systems"]["draft-1-wide"]["acceptance"]["rate"]
    per_check = (run["mean_tokens"] + 1) / run["systems"]["draft-1-wide"]["acceptance"]["rounds"]
    yield ""
    yield (
        f"With one chance of {rate:.2f} and drafts of 8 tokens the formula below expects "
        f"{expected_settled(rate, 8):.1f} tokens a check; `draft-1-wide` settles {per_check:.1f}."
    )


def _differences(run: Mapping[str, Any]) -> Iterator[str]:
    yield from ("", "Outputs of `draft` that are not AR greedy's in the same precision, batches of 32:", "")
    yield "| precision | different | of them with AR's two best tokens further apart than 1e-4 | margins |"
    yield "| --- | --- | --- | --- |"
    for part in run["lossless"]:
        margins = ", ".join(f"{item['margin']:.1e}" for item in part["list"][:8])
        margins += ", ..." if len(part["list"]) > 8 else ""
        counts = f"{part['different']} of {part['sentences']} | {part['not_close']}"
        yield f"| {part['precision']} | {counts} | {margins} |"
    yield ""


def _bridge(runs: Mapping[str, Any]) -> Iterator[str]:
    """Whether the KL bridge raises acceptance: runs with and without it, side by side."""
    if len(runs) < 2:
        return
    yield from ("## Does the KL bridge raise the acceptance rate?", "")
    yield "| run | KL weights | 1 draft at a time | 3 | 8 | first draft, tokens |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, run in runs.items():
        found = {key: run["systems"][key]["acceptance"] for key in ("draft-1-wide", "draft", "draft-8-wide")}
        rates = " | ".join(f"{part['rate']:.3f}" for part in found.values())
        weights = "/".join(f"{value or 0:g}" for value in run["kl_weights"].values())
        yield f"| {name} | {weights} | {rates} | {found['draft-1-wide']['first_draft']:.2f} |"


def _draw(content: Mapping[str, Any], folder: Path) -> bool:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        return False
    from janus_ds.tools.report_style import png_of, styled
    from janus_ds.tools.report_tradeoff import draw_tradeoff

    runs = [_as_folder(name, run) for name, run in content["runs"].items()]
    with styled():
        figure = draw_tradeoff(runs, _TASK, "sacrebleu")
        if figure is None:
            return False
        write_atomic(folder / _PICTURE, png_of(figure, 110))
    return True


def _as_folder(name: str, run: Mapping[str, Any]) -> RunFolder:
    """A run as the report's pictures want it."""
    systems = {}
    for mode in (mode for mode in _DRAWN if mode in run["systems"]):
        speed = {
            "ms_per_sentence_batch_1": run["times"]["1"]["milliseconds"][mode]["median"],
            "sentences_per_second": 1000 / run["times"]["32"]["milliseconds"][mode]["median"],
        }
        scores = {"metrics": run["systems"][mode]["metrics"], "speed": speed}
        systems[mode] = System(mode, scores, None)
    return RunFolder(Path(name), name, {}, [], {_TASK: systems})
