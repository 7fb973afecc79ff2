"""Who sees whom, for one sample: the rows of the two streams as text or as an image.

Shape letters: R decoder rows shown, C content rows shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from janus_ds.batch import TwoStreamBatch
from janus_ds.errors import MissingDependencyError
from janus_ds.stream_mask import Segment, dense_mask

__all__ = ["RowPicture", "picture_of"]

_NAMES = {
    Segment.ARC: "AR content",
    Segment.VIS: "visible",
    Segment.CMP: "compensation",
    Segment.MSK: "MASK",
    Segment.ARQ: "AR query",
    Segment.QRY: "AUX query",
}


@dataclass(frozen=True)
class RowPicture:
    """The rows of one sample up to a position, and which content rows each of them sees."""

    segment_R: list[Segment]
    position_R: list[int]
    token_R: list[int]
    predicts_R: list[int | None]
    """The token that a row predicts; None for rows that only give keys and values."""
    seen_RC: NDArray[np.bool_]

    def text(self, pieces: dict[int, str]) -> str:
        """The picture in characters: `#` where a row sees a content row.

        Args:
            pieces: how tokens are written.
        """
        columns = self.seen_RC.shape[1]
        starts = [c for c in range(columns) if c == 0 or self.segment_R[c] != self.segment_R[c - 1]]
        names = {start: self.segment_R[start].name for start in starts}
        lines = [f"{'':<40}{self._spread(names, starts)}"]
        digits = {c: str(self.position_R[c] % 10) for c in range(columns)}
        lines.append(f"{'row, position, token':<40}{self._spread(digits, starts)}")
        for row, segment in enumerate(self.segment_R):
            if row and segment != self.segment_R[row - 1]:
                lines.append("")
            label = f"{segment.name} {self.position_R[row]:>3} {pieces[self.token_R[row]]:<12.12}"
            goal = self.predicts_R[row]
            label += "" if goal is None else f" -> {pieces[goal]:<12.12}"
            cells = {c: "#" if self.seen_RC[row, c] else "." for c in range(columns)}
            lines.append(f"{label:<40}{self._spread(cells, starts)}")
        names_text = ", ".join(f"{s.name} {_NAMES[s]}" for s in dict.fromkeys(self.segment_R))
        return "\n".join([*(line.rstrip() for line in lines), "", f"# sees, . does not; {names_text}"])

    def _spread(self, cells: dict[int, str], starts: list[int]) -> str:
        """Cells at their columns, a gap before each segment; longer texts run on into empty columns."""
        line = ""
        for column in range(self.seen_RC.shape[1]):
            place = column + sum(start <= column for start in starts[1:])
            if column in cells:
                line = line.ljust(place)[:place] + cells[column]
        return line

    def save_image(self, path: Path) -> None:
        """Write the picture as a PNG.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingDependencyError(
                "pictures need matplotlib, which is not installed",
                "--png",
                "pip install matplotlib, or leave --png out: the picture is printed as text",
            ) from None
        rows, columns = self.seen_RC.shape
        figure = Figure(figsize=(2 + columns * 0.16, 1 + rows * 0.16))
        axes = figure.add_subplot()
        axes.imshow(self.seen_RC, cmap="Blues", vmin=0, vmax=1.4, interpolation="none")
        self._label(axes, columns)
        figure.savefig(path, dpi=150, bbox_inches="tight", format="png")

    def _label(self, axes: Any, columns: int) -> None:
        for first, count, name in self._groups():
            axes.axhline(first - 0.5, color="black", linewidth=0.8)
            middle = first + (count - 1) / 2
            axes.text(-1, middle, name, ha="right", va="center", fontsize=8)
            if first < columns:
                axes.axvline(first - 0.5, color="black", linewidth=0.8)
                axes.text(middle, -1, name, ha="left", va="bottom", fontsize=8, rotation=45)
        axes.set_xticks([])
        axes.set_yticks([])

    def _groups(self) -> list[tuple[int, int, str]]:
        return [
            (self.segment_R.index(s), self.segment_R.count(s), _NAMES[s])
            for s in dict.fromkeys(self.segment_R)
        ]


def picture_of(batch: TwoStreamBatch, positions: int) -> RowPicture:
    """The picture of a batch of one sample, cut to the tokens at the first positions.

    Rows stand in order of position inside their segment, so the cut keeps the rule as it is.
    """
    layout = batch.layout
    segment_R = layout.segment_of_rows()
    place_R = torch.cat([torch.arange(layout.width(segment)) for segment in Segment])
    length_R = torch.stack([batch.row_length_B(segment)[0] for segment in Segment])[segment_R]
    shown_R = (place_R < length_R) & (batch.row_position_BR[0] < positions)
    rows = torch.nonzero(shown_R).flatten()
    content = rows[rows < layout.content_rows]
    seen = dense_mask(
        segment_R[rows],
        batch.row_rank_BR[:, rows],
        segment_R[content],
        batch.row_rank_BR[:, content],
        batch.content_valid_BC()[:, content],
    )[0]
    chosen = rows.tolist()
    return RowPicture(
        segment_R=[Segment(int(segment_R[row])) for row in chosen],
        position_R=batch.row_position_BR[0, rows].tolist(),
        token_R=batch.row_token_BR[0, rows].tolist(),
        predicts_R=[_goal(batch, Segment(int(segment_R[row])), int(place_R[row])) for row in chosen],
        seen_RC=seen.numpy(),
    )


def _goal(batch: TwoStreamBatch, segment: Segment, place: int) -> int | None:
    if segment in (Segment.MSK, Segment.QRY):
        return int(batch.masked_target_BM[0, place])
    predicts = Segment.ARQ if batch.layout.arq else Segment.ARC
    return int(batch.ar_target_BA[0, place]) if segment == predicts else None
