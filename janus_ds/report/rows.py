"""The tables of a report: runs, means over seeds, best values; names for readers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from janus_ds.config.presets import OBJECTIVE_PRESETS
from janus_ds.metrics.scores import METRIC_TITLES, finite_numbers
from janus_ds.report.runs import RunFolder, iterations_of, primary_metric, sorted_modes

_FIRST = ("sacrebleu", "tokenized_bleu", "compound_bleu", "chrf")
_LAST = ("repetition", "repetition_words", "length_ratio", "sentences_per_second", "ms_per_sentence_batch_1")
_SPEED_TITLES = {
    "sentences_per_second": "sentences/s, in batches",
    "ms_per_sentence_batch_1": "ms/sentence, one by one",
}
_SEED = re.compile(r"[-_]?s(eed)?\d+$")


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
    kinds: dict[str, list[Row]] = {}
    last = {run.group: run for run in runs}
    for run in runs:
        rows.append(_row(run, task))
        kind = kinds.setdefault(run.group, [])
        if task in run.tasks:
            kind.append(rows[-1])
        if run is last[run.group] and len(kind) > 1:
            rows.append(_mean(kind))
    return rows


def _row(run: RunFolder, task: str) -> Row:
    asked, seed = run.recipe("train", "max_steps"), run.recipe("train", "seed")
    updates = "?" if run.updates is None else f"{run.updates:,}"
    if isinstance(asked, int) and run.updates is not None and run.updates < asked:
        updates += f" of {asked:,}"
    return Row(
        run.label,
        objective_text(run.objective, finite_numbers(run.recipe("objective")), run.recipe("data", "task")),
        "?" if seed is None else str(seed),
        updates,
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
    columns = [_column(rows, mode, metric) for mode in modes]
    return {
        "quality": metric_title(metric),
        "modes": [mode_title(mode) for mode in modes],
        "rows": [(row, [column[number] for column in columns]) for number, row in enumerate(rows)],
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
        columns = [_column(found, mode, metric) for metric in metrics]
        cells = [(row, [column[number] for column in columns]) for number, row in enumerate(found)]
        modes.append((mode_title(mode), cells))
    return {"metrics": [metric_title(metric) for metric in metrics], "modes": modes}


def _column(rows: Sequence[Row], mode: str, metric: str) -> list[dict[str, Any] | None]:
    """A metric of each row as text; the best run is marked, where not all are printed alike."""
    values = [row.modes.get(mode, {}).get(metric) for row in rows]
    texts = [None if value is None else _number(metric, value) for value in values]
    ranked = [
        (_goodness(metric, value), text)
        for row, value, text in zip(rows, values, texts, strict=True)
        if value is not None and not row.is_mean
    ]
    best = max(ranked)[1] if len({text for _, text in ranked}) > 1 else None
    return [
        None if text is None else {"text": text, "best": text == best and not row.is_mean}
        for row, text in zip(rows, texts, strict=True)
    ]


def _number(metric: str, value: float) -> str:
    if metric in _SPEED_TITLES:
        return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
    return f"{value:.2f}"


def _goodness(metric: str, value: float) -> float:
    """A number that is larger the better the value is."""
    if metric == "length_ratio":
        return -abs(value - 100)
    return -value if metric.startswith(("repetition", "ms_")) else value


def metric_title(name: str) -> str:
    """How a metric is written for readers; unknown ones as they are."""
    if name in METRIC_TITLES:
        return METRIC_TITLES[name][0]
    return _SPEED_TITLES.get(name, name.replace("_", " "))


def mode_title(mode: str) -> str:
    """How a mode is written for readers: AR, NAR 4; unknown ones as they are."""
    number = iterations_of(mode)
    return f"NAR {number}" if number is not None else mode.upper() if mode in ("ar", "nar") else mode


def term_title(term: str) -> str:
    """How a term of the loss is written for readers: AR, K(AR, NAR), length."""
    pair = term.removeprefix("kl_").upper().replace("_", ", ")
    return f"K({pair})" if term.startswith("kl_") else term if term == "length" else term.upper()


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
