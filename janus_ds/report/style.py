"""How the pictures of a report look, and how they become PNGs.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; markers and line styles say the same.
One colour and marker stand for one kind of run; seeds of a kind differ in line style and filling.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from janus_ds.errors import MissingDependencyError
from janus_ds.report.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "INK",
    "MUTED",
    "Look",
    "Picture",
    "looks_of",
    "new_figure",
    "png_of",
    "require_matplotlib",
    "styled",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#8B6914")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_Line = Literal["-", "--", ":", "-."]
_LINES: tuple[_Line, ...] = ("-", "--", ":", "-.")
_PALEST = 0.08
INK = "#333333"
MUTED = "#767676"
_SETTINGS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    # A run folder may be called what it likes.
    "text.parse_math": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A picture of the report, or why there is none.

    Attributes:
        name: stem of its file.
        title: its heading.
        caption: how to read it; where there is no picture, why.
        png: the image; None if there was nothing to draw.
    """

    name: str
    title: str
    caption: str
    png: bytes | None


@dataclass(frozen=True)
class Look:
    """How a run is drawn everywhere."""

    colour: str
    marker: str
    line: _Line
    filled: bool

    def marks(self) -> dict[str, Any]:
        """Arguments of `Axes.plot` for the colour and the marker."""
        face = self.colour if self.filled else "white"
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face}


def looks_of(runs: Sequence[RunFolder]) -> dict[str, Look]:
    """A look for each run's label: kinds differ in colour and marker, seeds of a kind in line and filling."""
    kinds: dict[str, list[str]] = {}
    for run in runs:
        kinds.setdefault(run.group, []).append(run.label)
    found = {}
    for number, labels in enumerate(kinds.values()):
        # The markers move on after a round of colours, so that no look comes twice in 64 kinds.
        marker = _MARKERS[(number + number // len(COLOURS)) % len(_MARKERS)]
        for seed, label in enumerate(labels):
            line = _LINES[seed % len(_LINES)]
            found[label] = Look(COLOURS[number % len(COLOURS)], marker, line, filled=seed == 0)
    return found


def require_matplotlib(
    where: str = "the report", fix: str = 'pip install "janus_ds[plots]", or pip install matplotlib'
) -> None:
    """See that pictures can be drawn, before anything is read.

    Args:
        where: what asks for them.
        fix: what to do if they cannot.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependencyError("pictures need matplotlib, which is not installed", where, fix) from None


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
    """The figure as PNG of 256 colours, a third of the size; the same figure gives the same bytes."""
    # Pillow comes with matplotlib, which writes its images through it.
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format="png", metadata={"Software": None})
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette())
    with Image.open(drawn) as image:
        reduced = image.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
        reduced.save(small, "PNG", optimize=True)
    return small.getvalue()


def _palette() -> list[int]:
    """White, and our colours in steps to it, which is what smooth edges need.

    A palette of the most frequent colours would lose the one thin line that is drawn in a rare one. The
    palest step keeps its distance, for Pillow takes colours next to each other for one.
    """
    bases = [tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in (*COLOURS, "#000000")]
    steps = 255 // len(bases)
    shares = [_PALEST + (1 - _PALEST) * step / (steps - 1) for step in range(steps)]
    blends = [round(255 + (part - 255) * share) for base in bases for share in shares for part in base]
    return [255, 255, 255, *blends]
