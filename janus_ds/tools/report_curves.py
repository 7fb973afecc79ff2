"""Whether a validation curve still rises, and what the curves of a run are drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Trend", "thinned", "trend_of"]

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
