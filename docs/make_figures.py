"""Draw the README's pictures: the two streams of the worked example, and a run's loss curves.

python docs/make_figures.py streams docs/figures/two_streams.png
python docs/make_figures.py losses runs/quickstart docs/figures/quickstart_losses.png
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from janus_ds.errors import UsageError, exit_on_error
from janus_ds.observe import read_metrics
from janus_ds.stream_mask import Segment, visible

Row = tuple[str, Segment, int]

# The worked example of the paper's section 3.1: y1..y6 with y2, y3, y5 masked, and the AR stream.
AR_CONTENT: list[Row] = [
    (name, Segment.ARC, i) for i, name in enumerate(["b", *(f"y{i}" for i in range(1, 7))])
]
VISIBLE: list[Row] = [(name, Segment.VIS, i) for i, name in enumerate(["y1", "y4", "y6"])]
MASKS: list[Row] = [(f"M{p}", Segment.MSK, i) for i, p in enumerate([2, 3, 5])]
GOLD: list[Row] = [(f"y{p}", Segment.CMP, i) for i, p in enumerate([2, 3, 5])]
AR_QUERY: list[Row] = [
    (f"?{name}", Segment.ARQ, i) for i, name in enumerate([*(f"y{i}" for i in range(1, 7)), "e"])
]
AUX_QUERY: list[Row] = [(f"?y{p}", Segment.QRY, i) for i, p in enumerate([2, 3, 5])]
COLOURS = {
    Segment.ARC: "#9ecae1",
    Segment.VIS: "#a1d99b",
    Segment.CMP: "#fdd0a2",
    Segment.MSK: "#31a354",
    Segment.ARQ: "#2171b5",
    Segment.QRY: "#e6550d",
}
LABELS = {
    Segment.ARC: "AR content",
    Segment.VIS: "unmasked",
    Segment.CMP: "compensation (gold)",
    Segment.MSK: "MASK, predicts NAR",
    Segment.ARQ: "AR query, predicts AR",
    Segment.QRY: "AUX query, predicts AUX",
}


def draw_streams(path: Path) -> None:
    """The visibility matrix of all rows: who (row) may see whom (column)."""
    keys = [*AR_CONTENT, *VISIBLE, *GOLD, *MASKS]
    rows = [*keys, *AR_QUERY, *AUX_QUERY]
    figure, axes = plt.subplots(figsize=(7.2, 8.6))
    for r, (_, row_segment, row_rank) in enumerate(rows):
        for c, (_, key_segment, key_rank) in enumerate(keys):
            seen = bool(visible(row_segment, row_rank, key_segment, key_rank))
            colour = COLOURS[row_segment] if seen else "#f4f4f4"
            axes.add_patch(plt.Rectangle((c, r), 0.94, 0.94, color=colour))
    axes.set_xlim(0, len(keys))
    axes.set_ylim(len(rows), 0)
    axes.set_xticks([c + 0.5 for c in range(len(keys))], [name for name, _, _ in keys], fontsize=8)
    axes.set_yticks([r + 0.5 for r in range(len(rows))], [name for name, _, _ in rows], fontsize=8)
    axes.xaxis.tick_top()
    axes.set_xlabel("keys and values: content rows only")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[s]) for s in Segment]
    axes.legend(handles, [LABELS[s] for s in Segment], loc="upper center", ncol=3, fontsize=8,
                bbox_to_anchor=(0.5, -0.03), frameon=False)  # fmt: skip
    figure.savefig(path, dpi=110, bbox_inches="tight")


def draw_losses(run: Path, path: Path) -> None:
    """Training (line) and held-out (dots) losses of a run, in nats, with ln V as the start."""
    records = read_metrics(run / "metrics.jsonl")
    special = json.loads((run / "run.json").read_text())["special_tokens"]
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for term, colour in (("ar", "#2171b5"), ("nar", "#31a354"), ("aux", "#e6550d")):
        train = [(r["step"], r[f"{term}_nll"]) for r in records if f"{term}_nll" in r]
        valid = [(r["step"], r[f"valid/{term}_nll"]) for r in records if f"valid/{term}_nll" in r]
        axes.plot(
            *zip(*train, strict=True), color=colour, lw=0.6, alpha=0.5, label=f"{term.upper()}, training"
        )
        if valid:
            axes.plot(*zip(*valid, strict=True), "o", color=colour, ms=5, label=f"{term.upper()}, held out")
    axes.axhline(math.log(special["vocab_size"]), color="grey", lw=0.8, ls=":", label="ln V")
    axes.set_xlabel("updates")
    axes.set_ylabel("negative log-likelihood (nats)")
    axes.legend(fontsize=8, ncol=2)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def main() -> None:
    """Command line: what to draw, from what, to where."""
    match sys.argv[1:]:
        case ["streams", target]:
            draw_streams(Path(target))
        case ["losses", run, target]:
            draw_losses(Path(run), Path(target))
        case _:
            raise UsageError("not a picture that this program draws", "arguments", __doc__ or "")


if __name__ == "__main__":
    exit_on_error(main)
