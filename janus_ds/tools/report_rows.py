"""The rows of a report's tables: runs, means over seeds, and which value of a column is the best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from janus_ds.tools.report_curves import trend_of
from janus_ds.tools.report_data import RunFolder, System
from janus_ds.tools.report_words import closeness, mode_title, objective_text

__all__ = ["Row", "best_of", "metrics_of", "rows_of", "values_of"]

_FIRST = ("sacrebleu", "tokenized_bleu", "compound_bleu", "chrf")
_LAST = ("repetition", "repetition_words", "length_ratio", "sentences_per_second", "ms_per_sentence_batch_1")
_HIDDEN = ("reference_repetition_words",)


@dataclass(frozen=True)
class Row:
    """A run, or the mean of runs that differ in their seed only.

    Attributes:
        label: the run, or the kind of runs.
        objective: the preset.
        seed: which, or how many.
        updates: made, and asked for where that is more.
        modes: values by mode and metric; speeds count as metrics.
        trends: the course of validation BLEU in each mode.
        is_mean: whether it is a mean.
    """

    label: str
    objective: str
    seed: str
    updates: str
    modes: dict[str, dict[str, float]]
    trends: tuple[str, ...]
    is_mean: bool = False


def rows_of(runs: Sequence[RunFolder], task: str) -> list[Row]:
    """A row for each run in the order given, means after the last run of their kind."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        groups.setdefault(run.group, []).append(run)
    rows = []
    for run in runs:
        rows.append(_row(run, task))
        kind = groups[run.group]
        scored = [other for other in kind if task in other.tasks]
        if run is kind[-1] and len(scored) > 1:
            rows.append(_mean(scored, task))
    return rows


def _row(run: RunFolder, task: str) -> Row:
    asked = run.recipe("train", "max_steps")
    updates = "?" if run.updates is None else f"{run.updates:,}"
    if isinstance(asked, int) and run.updates is not None and run.updates < asked:
        updates += f" of {asked:,}"
    return Row(
        run.label,
        objective_text(run.objective, run.recipe("objective") or {}, run.recipe("data", "task")),
        "?" if run.seed is None else str(run.seed),
        updates,
        {mode: values_of(system) for mode, system in run.tasks.get(task, {}).items()},
        tuple(_trends(run)) or ("too short to say",),
    )


def _trends(run: RunFolder) -> Iterator[str]:
    for key in dict.fromkeys(key for line in run.lines for key in line if key.startswith("valid/bleu_")):
        trend = trend_of(run.points(key))
        if trend is not None:
            yield f"{mode_title(key.removeprefix('valid/bleu_'))} {trend}"


def _mean(runs: Sequence[RunFolder], task: str) -> Row:
    rows = [_row(run, task) for run in runs]
    modes = [mode for mode in rows[0].modes if all(mode in row.modes for row in rows)]
    means = {
        mode: {
            metric: sum(row.modes[mode][metric] for row in rows) / len(rows)
            for metric in rows[0].modes[mode]
            if all(metric in row.modes[mode] for row in rows)
        }
        for mode in modes
    }
    updates = dict.fromkeys(row.updates for row in rows)
    label = f"{runs[0].group_label}: mean"
    return Row(label, rows[0].objective, f"{len(rows)} seeds", " / ".join(updates), means, (), is_mean=True)


def values_of(system: System) -> dict[str, float]:
    """Metrics and speeds of a system by name."""
    return {**{k: v for k, v in system.metrics.items() if k not in _HIDDEN}, **system.speed}


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """All metrics of the rows: BLEU first, speeds last, others between in their own order."""
    found = list(dict.fromkeys(m for row in rows for values in row.modes.values() for m in values))
    first = [name for name in _FIRST if name in found]
    last = [name for name in _LAST if name in found]
    return [*first, *(name for name in found if name not in (*first, *last)), *last]


def best_of(metric: str, values: Sequence[float]) -> float | None:
    """The best value of a column; None where there is nothing to compare, or no better side."""
    ranked = [(closeness(metric, value), value) for value in values]
    known = [(rank, value) for rank, value in ranked if rank is not None]
    return max(known)[1] if len(set(values)) > 1 and known else None
