"""The progress bar of rank 0: losses, tokens/s and the time left."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from tqdm import tqdm

__all__ = ["Progress"]

_SHOWN = ("loss", "ar", "nar", "aux")


class Progress:
    """A bar over the steps of a run, on standard error.

    Where standard error is a file, it is refreshed every ten seconds only.

    Args:
        step: completed steps at the start.
        max_steps: steps of the run.
        visible: False on all ranks but the first.
    """

    def __init__(self, step: int, max_steps: int, visible: bool) -> None:
        self._bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            disable=not visible,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )

    def advance(self, values: Mapping[str, object]) -> None:
        """One more step with these figures."""
        shown = {key: f"{values[key]:.3f}" for key in _SHOWN if isinstance(values.get(key), float)}
        speed = values.get("tokens_per_second")
        if isinstance(speed, float):
            shown["tok/s"] = f"{speed:,.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def note(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()
