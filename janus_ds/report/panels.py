"""Two pictures of many panels: loss terms against epochs (Figure 6), and quality against time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from janus_ds.report.rows import metric_title, mode_title, thinned
from janus_ds.report.runs import RunFolder, System, iterations_of, sorted_modes
from janus_ds.report.style import COLOURS, INK, MUTED, Look, looks_of, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

__all__ = ["draw_losses", "draw_tradeoff", "frontier"]

_TRAINING_POINTS = 120


@dataclass(frozen=True)
class _Kind:
    """Terms of one unit and size, which share a row of panels."""

    title: str
    unit: str
    terms: dict[str, tuple[str, str]]
    """Name in metrics.jsonl to (label, colour)."""


_KINDS = (
    _Kind(
        "Token losses",
        "nats/token",
        {"ar": ("AR", COLOURS[0]), "nar": ("NAR", COLOURS[1]), "aux": ("AUX", COLOURS[2])},
    ),
    _Kind(
        "Divergences",
        "nats/masked token",
        {
            "kl_ar_nar": ("K(AR, NAR)", COLOURS[3]),
            "kl_ar_aux": ("K(AR, AUX)", COLOURS[5]),
            "kl_nar_aux": ("K(NAR, AUX)", COLOURS[4]),
        },
    ),
    _Kind("Length", "nats/sentence", {"length": ("length", COLOURS[6])}),
)


def draw_losses(runs: Sequence[RunFolder]) -> Figure | None:
    """The terms that each run trains: thin lines in training, points on held-out data.

    Returns:
        None if no run has a curve.
    """
    drawn = [run for run in runs if any(_terms(run, kind) for kind in _KINDS)]
    kinds = [kind for kind in _KINDS if any(_terms(run, kind) for run in drawn)]
    if not drawn:
        return None
    figure = new_figure(max(2.9 * len(kinds), 4.5), 0.7 + 1.4 * len(drawn))
    grid = figure.subplots(len(drawn), len(kinds), squeeze=False, sharey="col")
    common = len({_epochs(run) is None for run in drawn}) == 1
    for row, run in enumerate(drawn):
        epochs = _epochs(run)
        for axes, kind in zip(grid[row], kinds, strict=True):
            if _terms(run, kind):
                _panel(axes, run, kind, epochs)
                axes.set_ylim(_limits(drawn, kind))
                axes.set_ylabel(f"{kind.title}\n{kind.unit}", fontsize=7.5)
            else:
                axes.set_axis_off()
                text = f"{kind.title.lower()}: not trained"
                axes.text(0.5, 0.5, text, transform=axes.transAxes, color=MUTED, ha="center")
            axes.set_xlabel("" if common else "updates" if epochs is None else "epochs")
        grid[row, 0].set_title(run.label)
    if common:
        figure.supxlabel("updates" if _epochs(drawn[0]) is None else "epochs", fontsize=8.5, color=INK)
        right = max(axes.get_xlim()[1] for axes in grid.flat)
        for axes in grid.flat:
            axes.set_xlim(0, right)
    _legend(figure, drawn)
    return figure


def _terms(run: RunFolder, kind: _Kind) -> list[str]:
    """Terms of the kind that the run has figures of and trains; a weight that is not told counts."""
    weights = run.recipe("objective")
    known = weights if isinstance(weights, dict) else {}
    return [t for t in kind.terms if run.points(t) and known.get(f"weight_{t}") != 0]


def _epochs(run: RunFolder) -> dict[int, float] | None:
    """Epochs by update; None where the size of the data, or the count of samples, is not at hand."""
    samples = run.samples_in_training()
    totals = run.points("samples_total")
    return {step: total / samples for step, total in totals} if samples and totals else None


def _panel(axes: Axes, run: RunFolder, kind: _Kind, epochs: dict[int, float] | None) -> None:
    def at(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
        if epochs is None:
            return [(float(step), value) for step, value in points]
        return [(epochs[step], value) for step, value in points if step in epochs]

    for term in _terms(run, kind):
        _, colour = kind.terms[term]
        training = thinned(at(run.points(term)), _TRAINING_POINTS)
        axes.plot(*zip(*training, strict=True), color=colour, linewidth=0.7, alpha=0.7)
        held_out = at(run.points(f"valid/{term}"))
        if held_out:
            every = max(1, len(held_out) // 16)
            axes.plot(
                *zip(*held_out, strict=True), color=colour, marker="o", markersize=3, linewidth=1.2,
                markevery=every,
            )  # fmt: skip
    axes.set_xlim(left=0)
    axes.locator_params(axis="both", nbins=5)


def _limits(runs: Sequence[RunFolder], kind: _Kind) -> tuple[float, float]:
    """One scale for all runs, so that panels can be compared."""
    values = [
        value
        for run in runs
        for term in _terms(run, kind)
        for points in (thinned(run.points(term), _TRAINING_POINTS), run.points(f"valid/{term}"))
        for _, value in points
    ]
    return 0.0, max(values) * 1.05 or 1.0


def _legend(figure: Figure, runs: Sequence[RunFolder]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linewidth=2, label=label)
        for kind in _KINDS
        for term, (label, colour) in kind.terms.items()
        if any(term in _terms(run, kind) for run in runs)
    ]
    handles += [
        Line2D([], [], color=INK, linewidth=0.8, alpha=0.75, label="thin: training"),
        Line2D([], [], color=INK, marker="o", markersize=3.2, linewidth=1.3, label="points: held out"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(len(handles), 5))


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
    figure.legend(handles=list(_run_legend(runs, looks, shapes)), loc="outside right upper")
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


def _run_legend(
    runs: Sequence[RunFolder], looks: dict[str, Look], shapes: dict[str, str]
) -> Iterator[Line2D]:
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
