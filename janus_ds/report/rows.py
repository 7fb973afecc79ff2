"""The rows of a report's tables: runs, means over seeds, trends, best values; names for readers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from janus_ds.config.presets import OBJECTIVE_PRESETS
from janus_ds.metrics.scores import METRIC_TITLES
from janus_ds.report.runs import RunFolder, System, iterations_of

__all__ = [
    "Row",
    "Trend",
    "best_of",
    "closeness",
    "metric_title",
    "metrics_of",
    "mode_title",
    "objective_text",
    "rows_of",
    "thinned",
    "trend_of",
    "values_of",
]

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


_FLAT_BLEU = 0.3
"""A rise over the last third that counts as none."""
_SURE_BLEU = 1.0
"""Two standard errors beyond this tell nothing."""
_FEWEST = 4


@dataclass(frozen=True)
class Trend:
    """The course of the end of a curve.

    Attributes:
        rise: what a line fitted to it gains, from its first update to its last.
        error: the standard error of that gain, from the scatter around the line.
    """

    rise: float
    error: float

    @property
    def word(self) -> str:
        """rising, falling, flat, or unclear where the scatter hides it."""
        if abs(self.rise) > max(_FLAT_BLEU, 2 * self.error):
            return "still rising" if self.rise > 0 else "falling"
        return "flat" if abs(self.rise) <= _FLAT_BLEU and 2 * self.error <= _SURE_BLEU else "unclear"

    def __str__(self) -> str:
        return f"{self.word} ({self.rise:+.1f} ± {2 * self.error:.1f})"


def trend_of(points: Sequence[tuple[int, float]]) -> Trend | None:
    """The trend of the last third of the updates, by least squares; of four points at least.

    Two single points would do for a difference, but validation BLEU of a few hundred sentences scatters by
    half a point or more; a fitted line uses all points, and its residuals say how far to believe it.

    Args:
        points: (update, value).

    Returns:
        None where fewer than four points lie in the last half: too short to say.
    """
    ordered = sorted(points)
    end = ordered[-1][0] if ordered else 0
    third = [point for point in ordered if point[0] >= end * 2 / 3]
    last = np.array(third if len(third) >= _FEWEST else ordered[-_FEWEST:], dtype=np.float64)
    if len(last) < _FEWEST or last[0, 0] < end / 2 or last[0, 0] == last[-1, 0]:
        return None
    x = (last[:, 0] - last[:, 0].mean()) / (last[-1, 0] - last[0, 0])
    y = last[:, 1] - last[:, 1].mean()
    rise = float(x @ y / (x @ x))
    scatter = float(((y - rise * x) ** 2).sum()) / (len(last) - 2)
    return Trend(rise, math.sqrt(scatter / float(x @ x)))


def thinned(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """At most `count` points: means of equally many neighbours, so that a noisy curve can be read."""
    if len(points) <= count:
        return list(points)
    parts = np.array_split(np.array(points, dtype=np.float64), count)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


_SPEED_TITLES = {
    "sentences_per_second": "sentences/s, in batches",
    "ms_per_sentence_batch_1": "ms/sentence, one by one",
}


def metric_title(name: str) -> str:
    """How a metric is written for readers; unknown ones as they are."""
    if name in METRIC_TITLES:
        return METRIC_TITLES[name][0]
    return _SPEED_TITLES.get(name, name.replace("_", " "))


def mode_title(mode: str) -> str:
    """How a mode is written for readers: AR, NAR 4; unknown ones as they are."""
    number = iterations_of(mode)
    return f"NAR {number}" if number is not None else mode.upper() if mode in ("ar", "nar") else mode


def closeness(metric: str, value: float) -> float | None:
    """A number that is larger the better the value is; None for metrics without a better side."""
    if metric.startswith("reference_"):
        return None
    if metric == "length_ratio":
        return -abs(value - 100)
    if metric.startswith(("repetition", "ms_")):
        return -value
    return value


def objective_text(preset: str, objective: Mapping[str, Any], task: str | None) -> str:
    """The preset, and how a run's weights differ from it: "paper without AUX, K".

    Args:
        preset: its name.
        objective: the fields of the recipe.
        task: of the data, pair or denoise: `released` has a bundle for each.
    """
    weights = OBJECTIVE_PRESETS.get(preset) or OBJECTIVE_PRESETS.get(f"{preset}/{task}") or {}
    changed = {
        name.removeprefix("weight_"): objective[name]
        for name, value in weights.items()
        if name.startswith("weight_") and objective.get(name, value) != value
    }
    left_out = [_term_title(term) for term, weight in changed.items() if weight == 0]
    divergences = [term for term in weights if term.startswith("weight_kl_") and weights[term]]
    if divergences and all(objective.get(term) == 0 for term in divergences):
        left_out = [*(title for title in left_out if not title.startswith("K(")), "K"]
    others = [f"{_term_title(term)} x {weight:g}" for term, weight in changed.items() if weight]
    without = f"{preset} without {', '.join(left_out)}" if left_out else preset
    return ", ".join([without, *others])


def _term_title(term: str) -> str:
    pair = term.removeprefix("kl_").upper().replace("_", ", ")
    return f"K({pair})" if term.startswith("kl_") else term if term == "length" else term.upper()
