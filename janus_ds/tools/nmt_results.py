"""The report of a translation experiment: JSON with all figures, Markdown with the tables, pictures.

Made of what is there: runs that are not finished are named as such, and more sittings extend the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janus_ds.checkpoint.manifest import read_state, step_of
from janus_ds.errors import MissingDependencyError
from janus_ds.io import disk_faults, write_atomic
from janus_ds.metrics.files import TextLines, read_lines
from janus_ds.metrics.translation import compare_translations
from janus_ds.observe.run_record import read_run_record
from janus_ds.observe.writers import read_metrics
from janus_ds.tools.report_curves import trend_of
from janus_ds.tools.report_data import RunFolder, read_runs
from janus_ds.tools.report_figures import draw_curve_pictures, draw_task_pictures
from janus_ds.tools.report_style import Picture

__all__ = ["FINISHED", "Experiment", "write_results"]

FINISHED = "finished.json"
"""Stands in the folder of a run that has been trained and evaluated."""

_SYSTEMS = ("ar", "nar-0", "nar-1", "nar-4", "nar-10")
_COMPARISONS = (
    ("janus-s1", "ar", "ar-s1", "ar", "JANUS-AR against AR"),
    ("janus-s1", "nar-10", "cmlm-s1", "nar-10", "JANUS-NAR against CMLM, 10 iterations"),
    ("janus-s1", "ar", "joint-s1", "ar", "JANUS-AR against joint training without KL and AUX"),
    ("janus-s1", "nar-10", "joint-s1", "nar-10", "JANUS-NAR against joint training, 10 iterations"),
    ("arquery-s1", "ar", "ar-s1", "ar", "AR by query rows alone against AR"),
    ("janus-s1", "ar", "arquery-s1", "ar", "JANUS-AR against AR by query rows alone"),
    ("fewrows-s1", "ar", "janus-s1", "ar", "JANUS-AR with both cheaper estimators against JANUS-AR"),
    ("fewrows-s1", "nar-10", "janus-s1", "nar-10", "JANUS-NAR, both cheaper estimators, against JANUS-NAR"),
    ("released-s1", "ar", "ar-s1", "ar", "JANUS-AR, released weights, against AR"),
    ("released-s1", "nar-10", "cmlm-s1", "nar-10", "JANUS-NAR, released weights, against CMLM"),
)
_NAME = "nmt_multi30k"
_PICTURES = "figures"
_DPI = (100, 80, 60)
_MOST_BYTES = 80_000
_CURVE = "valid/bleu_"


@dataclass(frozen=True)
class Experiment:
    """Where the runs lie and where the report goes."""

    folder: Path
    """One folder a run, and data/."""
    runs: Sequence[str]
    """The runs that make the experiment, in the order of the table."""
    direction: str
    results: Path
    """nmt_multi30k.json and .md are written here, and figures/nmt_multi30k_*.png."""


def write_results(experiment: Experiment) -> Path:
    """Collect, write JSON, Markdown and PNGs, and return the Markdown's path; other directions stay.

    Raises:
        ResourceError: the folder cannot be written.
    """
    path = experiment.results / f"{_NAME}.json"
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {}
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8"))
    found = _collect(experiment)
    content[experiment.direction] = {**found, **_pictures(experiment, list(found["runs"]))}
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())
    text = "\n".join(_markdown(content))
    write_atomic(path.with_suffix(".md"), text.encode())
    return path.with_suffix(".md")


def _pictures(experiment: Experiment, finished: Sequence[str]) -> dict[str, Any]:
    """Draw the finished runs; what the page says of the pictures, or why there are none."""
    if not finished:
        return {"pictures": []}
    runs = read_runs([experiment.folder / name for name in finished], "test")
    try:
        drawn = _small_pictures(runs)
    except MissingDependencyError as error:
        return {"pictures": [], "no_pictures": f"{error.what}: {error.fix}"}
    return {"pictures": [_save(experiment, picture) for picture in drawn if picture.png is not None]}


def _small_pictures(runs: Sequence[RunFolder]) -> list[Picture]:
    """The report's pictures, each in the finest resolution that keeps the repository small."""
    found: list[Picture] = []
    for dpi in _DPI:
        drawn = [*draw_task_pictures(runs, "nmt", dpi), *draw_curve_pictures(runs, dpi)]
        pairs = zip(found or drawn, drawn, strict=True)
        found = [finer if len(finer.png or b"") < _MOST_BYTES else coarser for finer, coarser in pairs]
        if all(len(picture.png or b"") < _MOST_BYTES for picture in found):
            break
    return found


def _save(experiment: Experiment, picture: Picture) -> dict[str, str]:
    stem = picture.name.removeprefix("nmt_")
    path = experiment.results / _PICTURES / f"{_NAME}_{experiment.direction}_{stem}.png"
    with disk_faults(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, picture.png or b"")
    return {"file": f"{_PICTURES}/{path.name}", "title": picture.title, "caption": picture.caption}


def _collect(experiment: Experiment) -> dict[str, Any]:
    others = sorted(p.parent.name for p in experiment.folder.glob(f"*/{FINISHED}"))
    names = [*experiment.runs, *(name for name in others if name not in experiment.runs)]
    runs = {name: _collect_run(experiment.folder / name) for name in names}
    finished = {name: run for name, run in runs.items() if run is not None}
    return {
        "runs": finished,
        "not_finished": [name for name, run in runs.items() if run is None],
        "significance": list(_significance(experiment, finished)),
    }


def _collect_run(folder: Path) -> dict[str, Any] | None:
    scores = folder / "eval" / "test" / "scores.json"
    record = read_run_record(folder)
    if not (folder / FINISHED).is_file() or not scores.is_file() or record is None:
        return None
    lines = read_metrics(folder / "metrics.jsonl")
    checkpoints = sorted(p for p in folder.glob("checkpoints/step-*") if step_of(p) is not None)
    state = read_state(checkpoints[-1])
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    recipe = record["recipe"]
    return {
        "systems": json.loads(scores.read_text(encoding="utf-8"))["systems"],
        "updates": state["step"],
        "training_seconds": round(state["meters"]["seconds"]),
        "wall_seconds": round(sum(attempt["seconds"] for attempt in attempts)),
        "attempts": attempts,
        "tokens": state["meters"]["tokens"],
        "curve": [
            {key: value for key, value in line.items() if key == "step" or key.startswith(_CURVE)}
            for line in lines
            if any(key.startswith(_CURVE) for key in line)
        ],
        "seed": recipe["train"]["seed"],
        "objective": recipe["objective"],
        "masking": recipe["masking"],
        "command": _from_clone(record["command"]),
        "git_commit": record["git_commit"],
        "hardware": record["hardware"],
        "versions": record["versions"],
    }


def _from_clone(command: Sequence[str]) -> list[str]:
    """A command with paths below the repository: where this clone and the run's own clone lie is left out."""
    clones = [Path(__file__).resolve().parents[2]]
    program = Path(command[0]) if command else Path()
    if program.is_absolute():
        # The run's program lies at launch/NAME.py of its clone.
        clones.append(program.parents[1])
    found = list(command)
    for clone in clones:
        found = [argument.replace(f"{clone}/", "") for argument in found]
    return found


def _significance(experiment: Experiment, finished: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, system, other, other_system, what in _COMPARISONS:
        if name not in finished or other not in finished:
            continue
        found = [
            experiment.folder / run / "eval" / "test" / f"{way}.txt"
            for run, way in ((name, system), (other, other_system))
        ]
        if not all(path.is_file() for path in found):
            continue
        ours, theirs = (TextLines(path.parent.parent.parent.name, read_lines(path).lines) for path in found)
        references = read_lines(experiment.folder / name / "eval" / "test" / "references.txt")
        yield {"what": what, **compare_translations(ours, references, theirs)}


def _markdown(content: dict[str, Any]) -> Iterator[str]:
    yield "# Multi30k: every objective at equal updates"
    yield ""
    yield (
        "Made by `make results-nmt` (launch/experiments/nmt_multi30k.py) of the runs that are finished; "
        "sacreBLEU 13a on lower-cased test_2016_flickr, AR with the recipe's beam, NAR after 0, 1, 4 and 10 "
        "iterations, mean of the last checkpoints. The JSON beside this file has all figures, commands and "
        "versions; nmt_multi30k_discussion.md compares them with the paper's."
    )
    for direction in sorted(content):
        yield from _direction(direction, content[direction])


def _direction(direction: str, found: dict[str, Any]) -> Iterator[str]:
    source, target = direction.split("-")
    yield from ("", f"## {source.title()}-{target.title()}", "")
    if not found["runs"]:
        yield "No run is finished."
        return
    yield "| run | updates | AR | NAR 0 | 1 | 4 | 10 | repeated %, NAR 1 / 4 / 10 | training min | curve |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, run in found["runs"].items():
        yield _line(name, run, f"{run['training_seconds'] / 60:.0f}", _flatness(run))
    for variant, mean in _means(found["runs"]):
        yield _line(variant, mean, "", "")
    yield from (
        "",
        "Curve: gain of a line fitted to validation BLEU over the last third of the updates (four points at "
        "least), ± two standard errors.",
    )
    if found["not_finished"]:
        yield from ("", f"Not finished: {', '.join(found['not_finished'])}.")
    yield from _speed(found["runs"])
    yield from _significance_table(found["significance"])
    yield from _picture_lines(found)
    yield from _circumstances(next(iter(found["runs"].values())))


def _line(name: str, run: dict[str, Any], minutes: str, curve: str) -> str:
    cells = [_score(run, system, "sacrebleu") for system in _SYSTEMS]
    repeated = " / ".join(_score(run, system, "repetition") or "-" for system in _SYSTEMS[2:])
    if not repeated.strip("-/ "):
        repeated = ""
    return f"| {' | '.join([name, str(run['updates']), *cells, repeated, minutes, curve])} |"


def _means(runs: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mean of the seeds of a variant, where there are two or more of equally many updates."""
    kinds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for name, run in runs.items():
        kinds.setdefault((name.rpartition("-s")[0], run["updates"]), []).append(run)
    for (variant, updates), members in kinds.items():
        if len(members) > 1:
            modes = [mode for mode in members[0]["systems"] if all(mode in m["systems"] for m in members)]
            systems = {mode: {"metrics": _mean_metrics(members, mode)} for mode in modes}
            yield f"**{variant}, mean of {len(members)} seeds**", {"updates": updates, "systems": systems}


def _mean_metrics(members: Sequence[dict[str, Any]], mode: str) -> dict[str, float]:
    found = [member["systems"][mode]["metrics"] for member in members]
    shared = [metric for metric in found[0] if all(metric in metrics for metrics in found)]
    return {metric: sum(metrics[metric] for metrics in found) / len(found) for metric in shared}


def _picture_lines(found: dict[str, Any]) -> Iterator[str]:
    for picture in found.get("pictures", []):
        yield from ("", f"### {picture['title']}", "", f"![{picture['title']}]({picture['file']})")
        yield from ("", picture["caption"])
    if found.get("no_pictures"):
        yield from ("", f"No pictures: {found['no_pictures']}.")


def _score(run: dict[str, Any], system: str, metric: str) -> str:
    value = run["systems"].get(system, {}).get("metrics", {}).get(metric)
    return "" if value is None else f"{value:.2f}"


def _flatness(run: dict[str, Any]) -> str:
    """Whether validation BLEU still rose over the last third of the run."""
    words = []
    for mode in ("ar", "nar"):
        points = [(p["step"], p[_CURVE + mode]) for p in run["curve"] if p.get(_CURVE + mode) is not None]
        trend = trend_of(points)
        if trend is not None:
            words.append(f"{mode} {trend}")
    return ", ".join(words) or "too short to say"


def _speed(runs: dict[str, Any]) -> Iterator[str]:
    title = "Speed, sentences/s in batches (ms/sentence at batch 1), at whatever else the machine did then:"
    yield from ("", title, "")
    yield f"| run | {' | '.join(_SYSTEMS)} |"
    yield f"| --- |{' --- |' * len(_SYSTEMS)}"
    for name, run in runs.items():
        cells = []
        for system in _SYSTEMS:
            speed = run["systems"].get(system, {}).get("speed")
            latency = (speed or {}).get("ms_per_sentence_batch_1")
            cell = f"{speed['sentences_per_second']:.0f}" if speed else ""
            cells.append(f"{cell} ({latency:.0f})" if latency else cell)
        yield f"| {name} | {' | '.join(cells)} |"


def _significance_table(comparisons: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not comparisons:
        return
    yield from ("", "Paired bootstrap (sacreBLEU):", "", "| comparison | BLEU | against | p |")
    yield "| --- | --- | --- | --- |"
    for item in comparisons:
        part = item["sacrebleu"]
        yield f"| {item['what']} | {part['score']:.2f} | {part['baseline']:.2f} | {part['p_sacrebleu']:.4f} |"


def _circumstances(run: dict[str, Any]) -> Iterator[str]:
    hardware, versions, masking = run["hardware"], run["versions"], run["masking"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    yield from ("", "### Circumstances", "")
    yield (
        f"Masking of all runs: {masking['target']}, share {masking['target_share']}. "
        f"Hardware: {hardware['machine']}, {hardware['cpus']} CPUs, {gpus}; torch {versions['torch']}, "
        f"deepspeed {versions['deepspeed']}, commit {run['git_commit']}."
    )
