"""The pictures of a report: scores and speed against NAR iterations (Figure 4 of the paper), scores against
time, validation scores against updates (Figure 5), loss terms against epochs (Figure 6).

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Colour and marker stand for a kind of
run; seeds of a kind differ in line style.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from janus_ds.errors import MissingDependencyError
from janus_ds.metrics.glge import VALIDATION_METRICS
from janus_ds.report.runs import (
    RunFolder,
    System,
    iterations_of,
    metric_title,
    mode_title,
    primary_metric,
    sorted_modes,
    term_title,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8B6914")
INK = "#333333"
_MARKERS = "os^DvPX*"
_LINES = ("-", "--", ":", "-.")
_MODE_MARKERS = "D^PXv*h<>p"
_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    # A run folder may be called what it likes.
    "text.parse_math": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.4,
}
_SCORE = re.compile(r"valid/([a-z0-9]+)_(.+)")
_COLUMNS = 3
_DPI = 150
_TRAINING_POINTS = 120
_TERMS = ("ar", "nar", "aux", "kl_ar_nar", "kl_ar_aux", "kl_nar_aux", "length")
_CLOCKS = {
    "ms_per_sentence_batch_1": ("One by one (batch 1)", lambda value: value),
    "sentences_per_second": ("In batches", lambda value: 1000 / value),
}
"""Speeds that systems may have: their title, and what makes them milliseconds a sentence."""


@dataclass(frozen=True)
class Picture:
    """A picture of the report, or why there is none.

    Attributes:
        name: stem of its file.
        caption: how to read it; where there is no picture, why.
        png: the image; None if there was nothing to draw.
    """

    name: str
    title: str
    caption: str
    png: bytes | None

    @property
    def base64(self) -> str:
        """The image as it stands in a page."""
        return base64.b64encode(self.png or b"").decode("ascii")


def draw_task_pictures(runs: Sequence[RunFolder], task: str) -> list[Picture]:
    """Pictures of the scores of one task: quality against iterations, and against time."""
    scored = [run for run in runs if task in run.tasks]
    metric = primary_metric([system for run in scored for system in run.tasks[task].values()])
    title = metric_title(metric)
    return [
        _picture(
            lambda: _draw_iterations(scored, task, metric),
            (f"{task}_iterations", f"{title} and speed against NAR iterations (Figure 4)"),
            f"Left scale, circles: {title}. Right scale, squares: sentences/s in batches. Horizontal "
            "line: AR decoding of the same run. All panels have the same scales.",
            "No run has scores of NAR decoding.",
        ),
        _picture(
            lambda: _draw_tradeoff(scored, task, metric),
            (f"{task}_time", f"{title} against time, all modes of all runs"),
            "Up and to the left is better; the time axis is logarithmic. The grey steps are the best that "
            "can be had in at most this time. Numbers: NAR iterations.",
            "No run has measured speeds.",
        ),
    ]


def draw_curve_pictures(runs: Sequence[RunFolder]) -> list[Picture]:
    """Pictures of training: validation scores against updates, loss terms against epochs."""
    metrics, scores = _validation_panels(runs)
    terms = [(term_title(term), term, f"valid/{term}") for term in _TERMS]
    return [
        _picture(
            lambda: _draw_curves(runs, scores, epochs=False),
            ("validation_bleu", f"Validation {metrics} against updates (Figure 5)"),
            "Greedy AR and NAR with few iterations, on as many validation sentences as the recipe says: not "
            "to be compared with test scores, and with the scatter of few sentences.",
            f"No run measured {metrics} while it trained (train.valid_bleu).",
        ),
        _picture(
            lambda: _draw_curves(runs, terms, epochs=True),
            ("losses", "Loss terms against epochs (Figure 6)"),
            "Only terms that a run trains, before their weights, in nats; label smoothing included. Thin: "
            "training. Markers: held-out data. Updates where the size of a run's data is not known.",
            "No run has a metrics.jsonl with loss terms.",
        ),
    ]


def _validation_panels(runs: Sequence[RunFolder]) -> tuple[str, list[tuple[str, str, str]]]:
    """The metrics that were measured in training, and (title, "", key) of each with each mode."""
    titles = {metric.name: metric.title for metric in VALIDATION_METRICS.values()}
    keys = {key for run in runs for line in run.lines for key in line}
    parts = {key: found for key in sorted(keys) if (found := _SCORE.fullmatch(key)) and found[1] in titles}
    metrics = sorted({titles[found[1]] for found in parts.values()})
    panels = []
    for key, found in parts.items():
        mode = mode_title(found[2])
        panels.append((mode if len(metrics) == 1 else f"{titles[found[1]]}, {mode}", "", key))
    return ", ".join(metrics) or "BLEU", panels


def looks_of(runs: Sequence[RunFolder]) -> dict[str, dict[str, Any]]:
    """For each run's label, what `Axes.plot` draws it with: colour, marker and line style."""
    kinds: dict[str, list[str]] = {}
    for run in runs:
        kinds.setdefault(run.group, []).append(run.label)
    found = {}
    for number, labels in enumerate(kinds.values()):
        # The markers move on after a round of colours, so that no look comes twice in 64 kinds.
        marker = _MARKERS[(number + number // len(COLOURS)) % len(_MARKERS)]
        for seed, label in enumerate(labels):
            line = _LINES[seed % len(_LINES)]
            found[label] = {"color": COLOURS[number % len(COLOURS)], "marker": marker, "linestyle": line}
    return found


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(ms, quality) of the points that no faster point equals, from fast to slow."""
    best: list[tuple[float, float]] = []
    for ms, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or quality > best[-1][1]:
            best.append((ms, quality))
    return best


def require_matplotlib() -> None:
    """See that pictures can be drawn, before anything is read.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        what, fix = "pictures need matplotlib, which is not installed", 'pip install "janus_ds[plots]"'
        raise MissingDependencyError(what, "the report", f"{fix}, or pip install matplotlib") from None


@contextmanager
def styled() -> Iterator[None]:
    """Inside, figures are made in the report's style; the caller's settings stay as they are."""
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, whose parts arrange themselves. No window system is asked."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def png_of(figure: Figure, dpi: int) -> bytes:
    """The figure as PNG; the same figure gives the same bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png", metadata={"Software": None})
    return drawn.getvalue()


def _picture(
    draw: Callable[[], Figure | None], names: tuple[str, str], caption: str, nothing: str
) -> Picture:
    with styled():
        figure = draw()
        png = png_of(figure, _DPI) if figure is not None else None
    return Picture(*names, caption if png else nothing, png)


def _panels(count: int, **sharing: Any) -> tuple[Figure, list[Axes]]:
    """A figure of panels in rows of three."""
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = new_figure(max(3.3 * columns, 5.0), 2.6 * rows + 0.5)
    grid = list(figure.subplots(rows, columns, squeeze=False, **sharing).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _draw_iterations(runs: Sequence[RunFolder], task: str, metric: str) -> Figure | None:
    """One panel a run, two scales each."""
    shown = {run.label: found for run in runs if (found := _nar_points(run.tasks[task], metric))}
    if not shown:
        return None
    figure, panels = _panels(len(shown), sharey=True)
    speeds = {
        label: [(n, s.speed["sentences_per_second"]) for n, s in found if "sentences_per_second" in s.speed]
        for label, found in shown.items()
    }
    fastest = max((speed for points in speeds.values() for _, speed in points), default=0.0)
    for axes, (label, found) in zip(panels, shown.items(), strict=True):
        axes.set_title(label)
        axes.set_xlabel("NAR iterations")
        axes.set_ylabel(metric_title(metric), color=COLOURS[0])
        points = [(number, system.metrics[metric]) for number, system in found]
        axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o")
        axes.set_xticks([number for number, _ in found])
        ar = next(run for run in runs if run.label == label).tasks[task].get("ar")
        if ar is not None and metric in ar.metrics:
            axes.axhline(ar.metrics[metric], color=INK, linestyle=":", linewidth=1.1)
        if speeds[label]:
            right = axes.twinx()
            right.plot(*zip(*speeds[label], strict=True), color=COLOURS[1], marker="s", linestyle="--")
            right.set_ylim(0, 1.1 * fastest)
            right.set_ylabel("sentences/s, in batches", color=COLOURS[1])
            right.grid(visible=False)
    # Last, since the panels share the scale of all their lines.
    panels[0].set_ylim(bottom=0)
    return figure


def _nar_points(systems: dict[str, System], metric: str) -> list[tuple[int, System]]:
    numbered = [(iterations_of(mode), system) for mode, system in systems.items() if metric in system.metrics]
    return sorted(((n, system) for n, system in numbered if n is not None), key=lambda pair: pair[0])


def _draw_tradeoff(runs: Sequence[RunFolder], task: str, metric: str) -> Figure | None:
    """A panel for single sentences and one for batches; None where no time was measured."""
    clocks = [clock for clock in _CLOCKS if any(_timed(run, task, metric, clock) for run in runs)]
    if not clocks:
        return None
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    modes = sorted_modes([run.tasks[task] for run in runs])
    others = [mode for mode in modes if mode != "ar" and iterations_of(mode) is None]
    markers = {mode: _MODE_MARKERS[i % len(_MODE_MARKERS)] for i, mode in enumerate(others)} | {"ar": "s"}
    looks = looks_of(runs)
    figure, panels = _panels(len(clocks), sharey=True)
    for axes, clock in zip(panels, clocks, strict=True):
        axes.set_title(_CLOCKS[clock][0])
        axes.set_xscale("log")
        every = [point for run in runs for point in _timed(run, task, metric, clock)]
        edge = frontier([(ms, quality) for _, ms, quality in every])
        edge.append((max(ms for _, ms, _ in every), edge[-1][1]))
        axes.step(*zip(*edge, strict=True), where="post", color="#d0d0d0", linewidth=4, zorder=1)
        for run in runs:
            look = looks[run.label]
            found = _timed(run, task, metric, clock)
            chain = [(ms, quality) for mode, ms, quality in found if iterations_of(mode) is not None]
            if chain:
                axes.plot(*zip(*chain, strict=True), color=look["color"], linestyle=look["linestyle"])
            for mode, ms, quality in found:
                axes.plot([ms], [quality], color=look["color"], marker=markers.get(mode, "o"))
                if mode not in markers:
                    axes.annotate(str(iterations_of(mode)), (ms, quality), (3, 4), textcoords="offset points")
        axes.set_xlabel("ms/sentence")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel(metric_title(metric))
    handles = [
        Line2D([], [], color=look["color"], linestyle=look["linestyle"], label=label)
        for label, look in looks.items()
    ]
    shapes = {mode_title(mode) if mode in markers else "NAR": markers.get(mode, "o") for mode in modes}
    handles += [
        Line2D([], [], color=INK, linestyle="", marker=shape, label=name) for name, shape in shapes.items()
    ]
    figure.legend(handles=handles, loc="outside right upper")
    return figure


def _timed(run: RunFolder, task: str, metric: str, clock: str) -> list[tuple[str, float, float]]:
    """(mode, ms, quality) of what was timed, in the order of modes."""
    systems = run.tasks[task]
    return [
        (mode, _CLOCKS[clock][1](systems[mode].speed[clock]), systems[mode].metrics[metric])
        for mode in sorted_modes([systems])
        if clock in systems[mode].speed and metric in systems[mode].metrics
    ]


def _draw_curves(
    runs: Sequence[RunFolder], panels: Sequence[tuple[str, str, str]], epochs: bool
) -> Figure | None:
    """A panel for each (title, key in training, key of held-out data), a line for each run."""
    looks, scales = looks_of(runs), [run.epochs() if epochs else None for run in runs]
    known = None not in scales

    def lines(training: str, held_out: str) -> Iterator[tuple[RunFolder, list[tuple[float, float]], Any]]:
        for run, scale in zip(runs, scales, strict=True):
            if not _trains(run, training):
                continue
            look = looks[run.label]
            for key, style in ((training, {**look, "marker": "", "linewidth": 0.7}), (held_out, look)):
                points: list[tuple[float, float]] = [*run.points(key)]
                if known and scale is not None:
                    points = [(scale[step], value) for step, value in run.points(key) if step in scale]
                if points:
                    yield run, thinned(points, _TRAINING_POINTS) if key == training else points, style

    drawn = {title: found for title, *keys in panels if (found := list(lines(*keys)))}
    if not drawn:
        return None
    figure, grid = _panels(len(drawn))
    named: dict[str, Artist] = {}
    for axes, (title, found) in zip(grid, drawn.items(), strict=True):
        axes.set_title(title)
        axes.set_xlabel("epochs" if known else "updates")
        for run, points, style in found:
            every = max(1, len(points) // 12)
            (named[run.label],) = axes.plot(*zip(*points, strict=True), **style, markevery=every)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    figure.legend(named.values(), named, loc="outside right upper")
    return figure


def thinned(points: Sequence[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """At most `count` points: means of equally many neighbours, so that a noisy curve can be read."""
    if len(points) <= count:
        return list(points)
    parts = np.array_split(np.array(points, dtype=np.float64), count)
    return [(float(part[:, 0].mean()), float(part[:, 1].mean())) for part in parts]


def _trains(run: RunFolder, term: str) -> bool:
    """Whether the run trains a loss term; a weight that is not told counts."""
    weights = run.recipe("objective")
    return not isinstance(weights, dict) or weights.get(f"weight_{term}") != 0
