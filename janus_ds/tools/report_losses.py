"""Loss terms against epochs, one row of panels a run (the paper's Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from janus_ds.tools.report_curves import thinned
from janus_ds.tools.report_data import RunFolder
from janus_ds.tools.report_style import COLOURS, INK, MUTED, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_losses"]

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
