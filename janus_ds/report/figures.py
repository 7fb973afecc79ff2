"""The pictures of a report: BLEU and speed against iterations, BLEU against updates, quality against time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from janus_ds.report.panels import draw_losses, draw_tradeoff
from janus_ds.report.rows import metric_title, mode_title
from janus_ds.report.runs import RunFolder, System, iterations_of, primary_metric
from janus_ds.report.style import INK, Picture, looks_of, new_figure, png_of, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patheffects import AbstractPathEffect

__all__ = ["draw_curve_pictures", "draw_task_pictures"]

_QUALITY, _SPEED = "#0072B2", "#D55E00"
_CURVE = "valid/bleu_"
_WIDE = 6.0
_CLOSE = 0.2
"""Lines nearer than this share of their height are named together."""


def draw_task_pictures(runs: Sequence[RunFolder], task: str, dpi: int) -> list[Picture]:
    """Pictures of the scores of one task: quality against iterations, and against time.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    scored = [run for run in runs if task in run.tasks]
    metric = primary_metric([system for run in scored for system in run.tasks[task].values()])
    title = metric_title(metric)
    return [
        _picture(
            lambda: _draw_iterations(scored, task, metric),
            (f"{task}_iterations", f"{title} and speed against NAR iterations (Figure 4)"),
            f"Left scale, circles: {title}. Right scale, squares: sentences/s in batches. Horizontal "
            "lines: AR decoding. All panels have the same scales.",
            "No run has scores of NAR decoding.",
            dpi,
        ),
        _picture(
            lambda: draw_tradeoff(scored, task, metric),
            (f"{task}_time", f"{title} against time, all modes of all runs"),
            "Up and to the left is better; the time axis is logarithmic. The grey steps are the best that "
            "can be had in at most this time. Numbers: NAR iterations, over the best run of each.",
            "No run has measured speeds.",
            dpi,
        ),
    ]


def draw_curve_pictures(runs: Sequence[RunFolder], dpi: int) -> list[Picture]:
    """Pictures of training: validation BLEU against updates, loss terms against epochs.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return [
        _picture(
            lambda: _draw_bleu(runs),
            ("validation_bleu", "Validation BLEU against updates (Figure 5)"),
            "Greedy AR and NAR with few iterations, on as many validation sentences as the recipe says: not "
            "to be compared with test scores, and with the scatter of few sentences.",
            "No run measured BLEU while it trained (train.valid_bleu).",
            dpi,
        ),
        _picture(
            lambda: draw_losses(runs),
            ("losses", "Loss terms against epochs (Figure 6)"),
            "Only terms that a run trains, before their weights; label smoothing included. Rows share one "
            "scale over all runs.",
            "No run has a metrics.jsonl with loss terms.",
            dpi,
        ),
    ]


def _picture(
    draw: Callable[[], Figure | None], names: tuple[str, str], caption: str, nothing: str, dpi: int
) -> Picture:
    with styled():
        figure = draw()
        png = png_of(figure, dpi) if figure is not None else None
    return Picture(*names, caption if png else nothing, png)


def _nar_points(systems: Mapping[str, System], metric: str) -> list[tuple[int, System]]:
    numbered = [(iterations_of(mode), system) for mode, system in systems.items() if metric in system.metrics]
    return sorted(((n, system) for n, system in numbered if n is not None), key=lambda pair: pair[0])


def _draw_iterations(runs: Sequence[RunFolder], task: str, metric: str) -> Figure | None:
    """One panel a run, two scales each."""
    shown = [run for run in runs if _nar_points(run.tasks[task], metric)]
    if not shown:
        return None
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(max(3.1 * columns, 4.8), 2.4 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False)
    ar = {run.label: _value(run.tasks[task].get("ar"), metric) for run in runs}
    plain = max((ar[run.label] or 0.0 for run in runs if run.objective == "ar"), default=0.0)
    points = [point for run in shown for point in _nar_points(run.tasks[task], metric)]
    top = max([system.metrics[metric] for _, system in points] + [value or 0 for value in ar.values()])
    fastest = max([system.speed.get("sentences_per_second", 0.0) for _, system in points])
    ticks = sorted({number for number, _ in points})
    for place, axes in enumerate(grid.flat):
        if place >= len(shown):
            axes.set_axis_off()
            continue
        run = shown[place]
        found = _nar_points(run.tasks[task], metric)
        axes.set_title(run.label)
        right = _speed_line(axes, found, fastest)
        _ar_lines(axes, ar[run.label], plain, ticks)
        _quality_line(axes, [(n, s.metrics[metric]) for n, s in found], top)
        axes.set_xticks(ticks)
        axes.margins(x=0.09)
        axes.set_xlabel("NAR iterations")
        if place % columns == 0:
            axes.set_ylabel(metric_title(metric), color=_QUALITY)
        if right is not None and (place % columns == columns - 1 or place == len(shown) - 1):
            right.set_ylabel("sentences/s, in batches", color=_SPEED)
    _iterations_legend(figure, metric, any(value is not None for value in ar.values()))
    return figure


def _value(system: System | None, metric: str) -> float | None:
    return system.metrics.get(metric) if system is not None else None


def _halo() -> list[AbstractPathEffect]:
    """White around letters, so that they can be read on lines."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.2, foreground="white")]


def _quality_line(axes: Axes, points: Sequence[tuple[int, float]], top: float) -> None:
    axes.plot(*zip(*points, strict=True), color=_QUALITY, marker="o", zorder=4)
    axes.set_ylim(0, top * 1.18)
    axes.tick_params(axis="y", labelcolor=_QUALITY)
    for number, value in points:
        axes.annotate(
            f"{value:.1f}", (number, value), (0, -6), textcoords="offset points", ha="center", va="top",
            fontsize=7.5, color=_QUALITY, zorder=6, path_effects=_halo(),
        )  # fmt: skip


def _ar_lines(axes: Axes, own: float | None, plain: float, ticks: Sequence[int]) -> None:
    """Lines named in the widest gap between iterations, where no point stands."""
    gaps = [(after - before, (before + after) / 2) for before, after in pairwise(ticks)]
    middle = max(gaps)[1] if gaps else ticks[0]
    lines = [(own, "-", f"own AR {own:.1f}")] if own is not None else []
    lines += [(plain, ":", f"plain AR {plain:.1f}")] if plain and plain != own else []
    lines.sort(reverse=True)
    for value, style, _ in lines:
        axes.axhline(value, color=INK, linestyle=style, linewidth=1.1, zorder=2)
    if len(lines) > 1 and lines[0][0] - lines[1][0] < _CLOSE * lines[0][0]:
        lines = [(lines[0][0], "", f"{lines[0][2]}, {lines[1][2]}")]
    for value, _, name in lines:
        axes.annotate(
            name, (middle, value), (0, 3), textcoords="offset points", ha="center", va="bottom",
            fontsize=7.5, color=INK, zorder=6, path_effects=_halo(),
        )  # fmt: skip


def _speed_line(axes: Axes, found: Sequence[tuple[int, System]], fastest: float) -> Axes | None:
    points = [(n, s.speed["sentences_per_second"]) for n, s in found if "sentences_per_second" in s.speed]
    if not points:
        return None
    right = axes.twinx()
    right.plot(
        *zip(*points, strict=True), color=_SPEED, marker="s", linestyle="--", linewidth=1.0, markersize=4
    )
    right.set_ylim(0, fastest * 1.18)
    right.spines["right"].set_visible(True)
    right.tick_params(axis="y", labelcolor=_SPEED)
    right.grid(visible=False)
    # Quality lies above speed.
    axes.set_zorder(right.get_zorder() + 1)
    axes.patch.set_visible(False)
    return right


def _iterations_legend(figure: Figure, metric: str, has_ar: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_QUALITY, marker="o", label=f"{metric_title(metric)} (left)"),
        Line2D([], [], color=_SPEED, marker="s", linestyle="--", label="sentences/s (right)"),
    ]
    if has_ar:
        handles += [
            Line2D([], [], color=INK, label="AR of the same run"),
            Line2D([], [], color=INK, linestyle=":", label="best plain AR run"),
        ]
    narrow = figure.get_figwidth() < _WIDE
    figure.legend(handles=handles, loc="outside upper left", ncols=2 if narrow else 4)


def _draw_bleu(runs: Sequence[RunFolder]) -> Figure | None:
    """One panel a mode, one line a run."""
    modes = sorted({key for run in runs for line in run.lines for key in line if key.startswith(_CURVE)})
    modes = [key for key in modes if any(run.points(key) for run in runs)]
    if not modes:
        return None
    looks = looks_of(runs)
    figure = new_figure(max(3.9 * len(modes), 5.2), 3.4)
    panels = figure.subplots(1, len(modes), squeeze=False, sharey=True, sharex=True)[0]
    for axes, key in zip(panels, modes, strict=True):
        steps = {run.recipe("train", "valid_bleu_iterations") for run in runs if run.points(key)} - {None}
        mode = key.removeprefix(_CURVE)
        few = f", {'/'.join(map(str, sorted(steps)))} iterations" if mode == "nar" and steps else ""
        axes.set_title(f"{mode_title(mode)}{few}")
        for run in runs:
            points = run.points(key)
            if points:
                look = looks[run.label]
                axes.plot(
                    *zip(*points, strict=True), **look.marks(), linestyle=look.line, label=run.label,
                    markevery=max(1, len(points) // 12),
                )  # fmt: skip
        axes.set_xlabel("updates")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panels[0].set_ylabel("BLEU, validation")
    panels[0].set_ylim(bottom=0)
    panels[0].set_xlim(left=0)
    # Not get_legend_handles_labels: it leaves out names that begin with an underscore.
    named = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(named.values(), named, loc="outside right upper")
    return figure
