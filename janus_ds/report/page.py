"""One self-contained HTML page about runs: tables, pictures, samples, and how all of it was made.

Tables hold the runs, means over seeds, and mark the best values.

The page is `templates/page.html.j2`; this module gathers what stands on it. jinja2 escapes every text.
"""

from __future__ import annotations

import base64
import re
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from janus_ds import __version__
from janus_ds.config.presets import OBJECTIVE_PRESETS
from janus_ds.errors import UsageError, shown
from janus_ds.io import disk_faults, make_folder, mapping, write_atomic
from janus_ds.metrics.scores import finite_numbers
from janus_ds.report.figures import Picture, draw_curve_pictures, draw_task_pictures, require_matplotlib
from janus_ds.report.runs import (
    SPEED_TITLES,
    RunFolder,
    lines_beside,
    listing,
    metric_title,
    mode_title,
    primary_metric,
    read_runs,
    sorted_modes,
    term_title,
)

PAGE = "index.html"
_WORDS = re.compile(r"(\s*)(\w+|[^\w\s])")
_FIRST = ("sacrebleu", "tokenized_bleu", "compound_bleu", "chrf")
_LAST = ("repetition", "repetition_words", "length_ratio", *SPEED_TITLES)
_SEED = re.compile(r"[-_]?s(eed)?\d+$")
_MOST_COMPARED = 2000
"""Words of a text; the time to compare grows with their square."""


def write_report(
    folders: Sequence[Path], output: Path, split: str, samples: int, command: Sequence[str]
) -> list[Path]:
    """Write index.html and the PNGs; returns their paths, the page first.

    Raises:
        UsageError: no run, a folder that is none, a negative number of samples.
        MissingDependencyError: matplotlib is not installed.
        ResourceError: the output cannot be written.
    """
    if samples < 0:
        raise UsageError(f"{samples} samples cannot be shown", "--samples", "give 0 or more")
    in_the_way = [path for path in (output, *output.parents) if path.is_file()]
    if in_the_way:
        raise UsageError(
            "a file is where the report's folder should be", str(in_the_way[0]), "name another --output"
        )
    require_matplotlib()
    runs = read_runs(folders, split)
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    by_task = {task: draw_task_pictures(runs, task) for task in tasks}
    curves = draw_curve_pictures(runs)
    told = {"subtitle": _subtitle(runs, split), "command": shlex.join(command)}
    page = render(_content(runs, by_task, curves, samples) | told)
    make_folder(output)
    _remove_pictures(output)
    written = [output / PAGE]
    write_atomic(written[0], f"{page}\n".encode())
    for picture in [*(p for found in by_task.values() for p in found), *curves]:
        if picture.png is not None:
            written.append(output / f"{picture.name}.png")
            write_atomic(written[-1], picture.png)
    return written


def _remove_pictures(output: Path) -> None:
    """Remove those of an earlier report: its page has them inside, and this one may have others."""
    page = output / PAGE
    with disk_faults(output):
        earlier = page.read_bytes() if page.is_file() else b""
        for path in output.glob("*.png"):
            if b'base64,%s"' % base64.b64encode(path.read_bytes()) in earlier:
                path.unlink()


def render(content: dict[str, Any], template: str = "page.html.j2") -> str:
    """A template of `janus_ds/report/templates` with its content, every text escaped and :func:`shown`."""
    # A tenth of a second, which other commands need not pay.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("janus_ds.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: shown(value) if type(value) is str else value,
    )
    return environment.get_template(template).render(content)


def _content(
    runs: Sequence[RunFolder], by_task: dict[str, list[Picture]], curves: Sequence[Picture], samples: int
) -> dict[str, Any]:
    notes = [(run.label, note) for run in runs for note in dict.fromkeys(run.notes)]
    tasks = [
        {
            "name": task,
            "run_table": run_table(runs, task),
            "mode_table": mode_table(runs, task),
            "pictures": pictures,
            "samples": sample_cards(runs, task, samples) if samples else None,
        }
        for task, pictures in by_task.items()
    ]
    return {
        "title": f"Runs {', '.join(run.label for run in runs)}",
        "notes": notes,
        "tasks": tasks,
        "no_scores": run_table(runs, "nmt"),
        "curves": curves,
        "now": _now(),
        "version": __version__,
        "making": [_making(run) for run in runs],
        "signatures": list(dict.fromkeys(line for task in by_task for line in _signatures(runs, task))),
    }


def _subtitle(runs: Sequence[RunFolder], split: str) -> str:
    counts = {
        f"{task} {split}, n = {system.scores.get('n', '?')}"
        for run in runs
        for task, systems in run.tasks.items()
        for system in systems.values()
    }
    told = "; ".join(sorted(counts)) or f"no scores of split {split}"
    return f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}; {told}; made {_now()}"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())


def _making(run: RunFolder) -> dict[str, Any]:
    starts = [mapping(start) for start in listing(run.record.get("attempts"))]
    words = [[str(word) for word in listing(start.get("command"))] for start in starts]
    return {
        "label": run.label,
        "circumstances": _circumstances(run),
        "starts": len(starts),
        "first": str(starts[0].get("time", "?")) if starts else "",
        "commands": list(dict.fromkeys(map(shlex.join, words))),
    }


def _circumstances(run: RunFolder) -> str:
    """Folder, machine, versions, commit, and which weights were scored in which precision on what, as far as
    told: speeds are of that device."""
    parts = [str(run.folder)]
    hardware, versions = run.record.get("hardware"), run.record.get("versions")
    if isinstance(hardware, dict):
        gpus = ", ".join(map(str, listing(hardware.get("gpus")))) or "no GPU"
        parts.append(f"{hardware.get('machine', '?')}, {hardware.get('cpus', '?')} CPUs, {gpus}")
    if isinstance(versions, dict):
        parts += [f"{name} {versions[name]}" for name in ("torch", "deepspeed") if versions.get(name)]
    if run.record.get("git_commit"):
        parts.append(f"commit {str(run.record['git_commit'])[:12]}")
    weights = {
        f"scored: {system.scores['checkpoint']}, "
        f"mean of {run.averaged or system.scores.get('average', 1)} checkpoint(s)"
        + "".join(f", {told}" for key in ("precision", "device") if (told := system.scores.get(key)))
        for system in run.systems
        if system.scores.get("checkpoint")
    }
    return "; ".join([*parts, *sorted(weights)])


def _signatures(runs: Sequence[RunFolder], task: str) -> Iterator[str]:
    """How each metric was computed, and what the scores' makers warn of."""
    for run in runs:
        for system in run.tasks.get(task, {}).values():
            for name, text in mapping(system.scores.get("signatures")).items():
                yield f"{metric_title(name)}: {text}"
            for text in listing(system.scores.get("warnings")):
                yield f"warning, {run.label}: {text}"


@dataclass(frozen=True)
class Row:
    """A run, or the mean of runs that differ in their seed only.

    Attributes:
        label: the run, or the kind of runs.
        seed: which, or how many.
        updates: made, and asked for where that is more.
        modes: values by mode and metric; speeds count as metrics.
    """

    label: str
    objective: str
    seed: str
    updates: str
    modes: dict[str, dict[str, float]]
    is_mean: bool = False


def rows_of(runs: Sequence[RunFolder], task: str) -> list[Row]:
    """A row for each run in the order given, means after the last run of their kind."""
    rows: list[Row] = []
    last = {run.group: run for run in runs}
    for run in runs:
        rows.append(_row(run, task))
        kind = [_row(other, task) for other in runs if other.group == run.group and task in other.tasks]
        # Two runs of one seed, such as one in another precision, are none.
        if run is last[run.group] and 1 < len(kind) == len({row.seed for row in kind}):
            rows.append(_mean(kind))
    return rows


def _row(run: RunFolder, task: str) -> Row:
    asked, seed, made = run.recipe("train", "max_steps"), run.recipe("train", "seed"), run.updates
    more = f" of {asked:,}" if isinstance(asked, int) and made is not None and made < asked else ""
    return Row(
        run.label,
        objective_text(run.objective, finite_numbers(run.recipe("objective")), run.recipe("data", "task")),
        "?" if seed is None else str(seed),
        "?" if made is None else f"{made:,}{more}",
        {
            mode: {k: v for k, v in system.metrics.items() if not k.startswith("reference_")} | system.speed
            for mode, system in run.tasks.get(task, {}).items()
        },
    )


def _mean(rows: Sequence[Row]) -> Row:
    means = {
        mode: {
            metric: sum(row.modes[mode][metric] for row in rows) / len(rows)
            for metric in values
            if all(metric in row.modes[mode] for row in rows)
        }
        for mode, values in rows[0].modes.items()
        if all(mode in row.modes for row in rows)
    }
    updates = " / ".join(dict.fromkeys(row.updates for row in rows))
    label = _SEED.sub("", rows[0].label) or rows[0].label
    return Row(f"{label}: mean", rows[0].objective, f"{len(rows)} seeds", updates, means, is_mean=True)


def run_table(runs: Sequence[RunFolder], task: str) -> dict[str, Any]:
    """One row a run: objective, updates, and the quality of every mode (the paper's Tables 1 and 6)."""
    rows = rows_of(runs, task)
    modes = sorted_modes([run.tasks.get(task, {}) for run in runs])
    metric = primary_metric([system for run in runs for system in run.tasks.get(task, {}).values()])
    return {
        "quality": metric_title(metric),
        "modes": [mode_title(mode) for mode in modes],
        "rows": _cells(rows, [(mode, metric) for mode in modes]),
    }


def mode_table(runs: Sequence[RunFolder], task: str) -> dict[str, Any]:
    """All metrics and speeds, runs under the mode that they are compared in (Table 3 among them)."""
    rows = rows_of(runs, task)
    names = dict.fromkeys(m for row in rows for values in row.modes.values() for m in values)
    others = [name for name in names if name not in (*_FIRST, *_LAST)]
    metrics = [m for m in _FIRST if m in names] + others + [m for m in _LAST if m in names]
    modes = []
    for mode in sorted_modes([run.tasks.get(task, {}) for run in runs]):
        found = [row for row in rows if mode in row.modes]
        modes.append((mode_title(mode), _cells(found, [(mode, metric) for metric in metrics])))
    return {"metrics": [metric_title(metric) for metric in metrics], "modes": modes}


def _cells(rows: Sequence[Row], keys: Sequence[tuple[str, str]]) -> list[tuple[Row, list[Any]]]:
    """For each row, its cell of each (mode, metric)."""
    columns = [_column(rows, *key) for key in keys]
    return [(row, [column[number] for column in columns]) for number, row in enumerate(rows)]


def _column(rows: Sequence[Row], mode: str, metric: str) -> list[dict[str, Any] | None]:
    """A metric of each row as text; the best run is marked, where not all are printed alike."""

    def text_of(value: float) -> str:
        decimals = 2 if metric not in SPEED_TITLES else 1 if value < 10 else 0
        return f"{value:,.{decimals}f}"

    def goodness(value: float) -> float:
        if metric == "length_ratio":
            return -abs(value - 100)
        return -value if metric.startswith(("repetition", "ms_")) else value

    found = [(row.is_mean, row.modes.get(mode, {}).get(metric)) for row in rows]
    runs = [value for is_mean, value in found if value is not None and not is_mean]
    best = text_of(max(runs, key=goodness)) if len(set(map(text_of, runs))) > 1 else None
    return [
        None if value is None else {"text": (text := text_of(value)), "best": text == best and not is_mean}
        for is_mean, value in found
    ]


def objective_text(preset: str, objective: Mapping[str, Any], task: str | None) -> str:
    """The preset, and how a run's weights differ from it: "paper without AUX, K"; `released` has a bundle for
    each task of data."""
    weights = OBJECTIVE_PRESETS.get(preset) or OBJECTIVE_PRESETS.get(f"{preset}/{task}") or {}
    changed = {
        name.removeprefix("weight_"): objective[name]
        for name, value in weights.items()
        if name.startswith("weight_") and objective.get(name, value) != value
    }
    left_out = [term_title(term) for term, weight in changed.items() if weight == 0]
    divergences = [term for term in weights if term.startswith("weight_kl_") and weights[term]]
    if divergences and all(objective.get(term) == 0 for term in divergences):
        left_out = [*(title for title in left_out if not title.startswith("K(")), "K"]
    others = [f"{term_title(term)} x {weight:g}" for term, weight in changed.items() if weight]
    without = f"{preset} without {', '.join(left_out)}" if left_out else preset
    return ", ".join([without, *others])


def sample_cards(runs: Sequence[RunFolder], task: str, count: int) -> dict[str, Any]:
    """`count` test sentences, taken at equal distances, with every run's output in every mode, of runs whose
    outputs lie beside their scores, with references.txt and sources.txt."""
    files = {
        (run.label, mode): path
        for run in runs
        for mode in sorted_modes([run.tasks.get(task, {})])
        if (path := run.tasks[task][mode].hypotheses) is not None
    }
    references = next(filter(None, (lines_beside(path, "references.txt") for path in files.values())), [])
    # Outputs of another test set, or of another order of it, are not compared.
    comparable = {
        system: path
        for system, path in files.items()
        if (own := lines_beside(path, "references.txt"))[: len(references)] == references[: len(own)]
    }
    sources = next(filter(None, (lines_beside(path, "sources.txt") for path in comparable.values())), [])
    outputs = {
        system: lines for system, path in comparable.items() if (lines := lines_beside(path, path.name))
    }
    if not references or not outputs:
        return {"sentences": [], "has_sources": False}
    length = min([len(references), *(len(lines) for lines in outputs.values())])
    number = min(count, length)
    places = [(2 * i + 1) * length // (2 * number) for i in range(number)]
    return {
        "has_sources": bool(sources),
        "sentences": [
            {
                "number": place + 1,
                "source": sources[place] if place < len(sources) else None,
                "reference": references[place],
                "runs": _alike(place, references[place], outputs),
            }
            for place in places
        ],
    }


def _alike(
    place: int, reference: str, outputs: dict[tuple[str, str], list[str]]
) -> list[tuple[str, list[tuple[str, list[dict[str, str]]]]]]:
    """By run, its outputs of one sentence; modes with equal outputs share a line."""
    found: dict[str, dict[str, list[str]]] = {}
    for (run, mode), lines in outputs.items():
        found.setdefault(run, {}).setdefault(lines[place], []).append(mode_title(mode))
    return [
        (run, [(", ".join(modes), marked(reference, text)) for text, modes in texts.items()])
        for run, texts in found.items()
    ]


def marked(reference: str, text: str) -> list[dict[str, str]]:
    """A text in parts that say where it differs from the reference, word by word; empty for no text.

    A part is "same", "other" (words that the reference does not have there) or "missing" (words of the
    reference). Punctuation counts as words; what is compared is the longest common sequence of `difflib`.
    Texts of more than 2,000 words are not compared.
    """
    words = _WORDS.findall(text.strip())
    expected = [word for _, word in _WORDS.findall(reference.strip())]
    if max(len(words), len(expected)) > _MOST_COMPARED:
        return [{"kind": "same", "text": text}]
    matcher = SequenceMatcher(None, expected, [word for _, word in words], autojunk=False)
    parts = []
    for what, first, last, begin, end in matcher.get_opcodes() if words else ():
        found = "".join(space + word for space, word in words[begin:end])
        if what == "delete":
            parts.append({"kind": "missing", "text": " ".join(expected[first:last])})
        elif what == "equal":
            parts.append({"kind": "same", "text": found})
        else:
            bare = found.lstrip()
            parts.append({"kind": "other", "text": bare, "space": found[: len(found) - len(bare)]})
    return parts
