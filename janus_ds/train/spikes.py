"""Losses far above those before them: where a spike begins, from the losses of the run alone.

A spike is a loss above `median + train.spike_factor x deviation` of the last `train.spike_window`
losses that counted. The deviation is 1.4826 times the median absolute deviation, which for normal
noise is its standard deviation and which a few odd steps cannot move, and at least 1 % of the median.
Only rises count: a loss may fall as fast as it likes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping

from janus_ds.config.schema import TrainConfig

__all__ = ["LossWatch"]

_NORMAL = 1.4826
"""Median absolute deviation -> standard deviation, for normal noise."""
_LEAST_SHARE = 0.01


class LossWatch:
    """Knows from which loss on a step is a spike.

    Args:
        train: action, factor and window.
        recent: losses that counted, oldest first; brought up to date here, and part of the checkpoint,
            so that a resumed run judges as the unbroken one.
    """

    def __init__(self, train: TrainConfig, recent: list[float]) -> None:
        self.action = train.spike_action
        self._factor = train.spike_factor
        self._window = train.spike_window
        self.recent = recent

    @property
    def on(self) -> bool:
        """Whether losses are watched at all."""
        return self.action != "off"

    @property
    def median(self) -> float:
        """Of the losses in the window."""
        return statistics.median(self.recent)

    def limit(self) -> float:
        """The largest loss that is no spike; infinite while the window is not full."""
        if not self.on or len(self.recent) < self._window:
            return math.inf
        middle = self.median
        spread = _NORMAL * statistics.median(abs(loss - middle) for loss in self.recent)
        return middle + self._factor * max(spread, _LEAST_SHARE * abs(middle))

    def add(self, loss: float) -> None:
        """Take in the loss of a step that counted."""
        if self.on:
            self.recent.append(loss)
            del self.recent[: -self._window]

    def weigh(self, now: Mapping[str, float], before: Mapping[str, float]) -> None:
        """Forget all losses where ramps have changed what is summed: they cannot be compared."""
        if now != before:
            self.recent.clear()
