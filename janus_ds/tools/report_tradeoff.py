"""Quality against time: every mode of every run in one picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from janus_ds.tools.report_data import RunFolder, System, iterations_of, sorted_modes
from janus_ds.tools.report_style import INK, MUTED, Look, looks_of, new_figure
from janus_ds.tools.report_words import metric_title, mode_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["draw_tradeoff", "frontier"]

_SHAPES = ("D", "^", "P", "X", "v", "*", "h", "<", ">", "p")
_SPAN_FOR_TICKS = 8.0
_MARGIN = 1.35


@dataclass(frozen=True)
class _Clock:
    """A way to take the time of a sentence."""

    title: str
    key: str

    def milliseconds(self, system: System) -> float | None:
        """Milliseconds a sentence; None if not measured."""
        value = system.speed.get(self.key)
        if value is None:
            return None
        return 1000 / value if self.key == "sentences_per_second" else value


_CLOCKS = (
    _Clock("One by one (batch 1)", "ms_per_sentence_batch_1"),
    _Clock("In batches", "sentences_per_second"),
)


def draw_tradeoff(runs: Sequence[RunFolder], task: str, metric: str) -> Figure | None:
    """A panel for single sentences and one for batches.

    Returns:
        None where no time was measured.
    """
    clocks = [clock for clock in _CLOCKS if any(_points(run, task, metric, clock) for run in runs)]
    if not clocks:
        return None
    looks = looks_of(runs)
    modes = sorted_modes([run.tasks[task] for run in runs])
    shapes = _shapes(modes)
    figure = new_figure(max(4.1 * len(clocks), 5.4) + 1.2, 3.9)
    panels = figure.subplots(1, len(clocks), squeeze=False, sharey=True)[0]
    for axes, clock in zip(panels, clocks, strict=True):
        axes.set_title(clock.title)
        axes.set_xscale("log")
        named = [point for run in runs for point in _points(run, task, metric, clock)]
        every = [(ms, quality) for _, ms, quality in named]
        _draw_frontier(axes, every)
        _number_points(axes, named)
        for run in runs:
            _draw_run(axes, _points(run, task, metric, clock), looks[run.label], shapes)
        axes.set_xlabel("ms/sentence")
        _plain_ticks(axes, [ms for ms, _ in every])
    panels[0].set_ylabel(metric_title(metric))
    panels[0].margins(y=0.1)
    figure.legend(handles=list(_legend(runs, looks, shapes)), loc="outside right upper")
    return figure


def _points(run: RunFolder, task: str, metric: str, clock: _Clock) -> list[tuple[str, float, float]]:
    """(mode, ms, quality), in the order of modes."""
    systems = run.tasks[task]
    found = []
    for mode in sorted_modes([systems]):
        ms, quality = clock.milliseconds(systems[mode]), systems[mode].metrics.get(metric)
        if ms is not None and quality is not None:
            found.append((mode, ms, quality))
    return found


def _shapes(modes: Sequence[str]) -> dict[str, str]:
    """Plain NAR circles, AR squares, every other mode a shape of its own."""
    others = [mode for mode in modes if mode != "ar" and iterations_of(mode) is None]
    return {
        mode: "s"
        if mode == "ar"
        else "o"
        if mode not in others
        else _SHAPES[others.index(mode) % len(_SHAPES)]
        for mode in modes
    }


def _draw_run(
    axes: Axes, points: Sequence[tuple[str, float, float]], look: Look, shapes: dict[str, str]
) -> None:
    chain = [(ms, quality) for mode, ms, quality in points if iterations_of(mode) is not None]
    if chain:
        axes.plot(*zip(*chain, strict=True), color=look.colour, linestyle=look.line, linewidth=0.9, zorder=2)
    for mode, ms, quality in points:
        face = look.colour if look.filled else "white"
        size = 6.5 if shapes[mode] != "o" else 5.0
        axes.plot(
            [ms], [quality], linestyle="", marker=shapes[mode], color=look.colour, markerfacecolor=face,
            markersize=size, zorder=3,
        )  # fmt: skip


def _number_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Iterations over the best point of each number: runs take about the same time, labels would collide."""
    best: dict[int, tuple[float, float]] = {}
    for mode, ms, quality in points:
        number = iterations_of(mode)
        if number is not None and (number not in best or quality > best[number][1]):
            best[number] = ms, quality
    for number, place in best.items():
        axes.annotate(
            str(number),
            place,
            (0, 5),
            textcoords="offset points",
            fontsize=8,
            color=INK,
            ha="center",
            zorder=4,
        )


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(ms, quality) of the points that no faster point equals, from fast to slow."""
    best: list[tuple[float, float]] = []
    for ms, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or quality > best[-1][1]:
            best.append((ms, quality))
    return best


def _draw_frontier(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    edge = frontier(points)
    edge.append((max(ms for ms, _ in points) * _MARGIN, edge[-1][1]))
    axes.step(*zip(*edge, strict=True), where="post", color="#d0d0d0", linewidth=4, zorder=1)


def _plain_ticks(axes: Axes, times: Sequence[float]) -> None:
    """Ticks such as 2, 5, 10 in place of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    narrow = max(times) / min(times) < _SPAN_FOR_TICKS
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(min(times) / _MARGIN, max(times) * _MARGIN)


def _legend(runs: Sequence[RunFolder], looks: dict[str, Look], shapes: dict[str, str]) -> Iterator[Line2D]:
    from matplotlib.lines import Line2D

    for run in runs:
        look = looks[run.label]
        face = look.colour if look.filled else "white"
        yield Line2D(
            [], [], color=look.colour, linestyle=look.line, marker="o", markerfacecolor=face, label=run.label
        )
    names: dict[str, list[str]] = {}
    for mode, shape in shapes.items():
        names.setdefault("NAR iterations" if shape == "o" else mode_title(mode), []).append(shape)
    for name, found in names.items():
        yield Line2D([], [], color=MUTED, linestyle="", marker=found[0], label=name)
