"""fp16's dynamic loss scale inside DeepSpeed: when it is at its end, and how a step leaves it alone."""

from __future__ import annotations

from typing import Any

__all__ = ["LossScale"]

_FIELDS = ("cur_scale", "last_overflow_iter", "cur_hysteresis")


class LossScale:
    """The scaler of a DeepSpeed optimizer, if it has a dynamic one.

    DeepSpeed ends a run by an exception in the midst of a step when the scale is at its minimum, for a
    bad sample too; here the scale stays there, and the guards decide.

    Args:
        scaler: DeepSpeed's; None or a static one makes all of this do nothing.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler if getattr(scaler, "dynamic", False) else None
        self._before: dict[str, Any] = {}
        if self._scaler is not None:
            self._scaler.raise_error_at_min_scale = False

    def remember(self) -> bool:
        """Before an update: note the scale. True where one more overflow could not lower it."""
        scaler = self._scaler
        if scaler is None:
            return False
        self._before = {name: getattr(scaler, name) for name in _FIELDS}
        patient = scaler.delayed_shift > 1 and scaler.cur_hysteresis > 1
        return bool(scaler.cur_scale <= scaler.min_scale and not patient)

    def put_back(self) -> None:
        """Undo what the last update did to the scale."""
        for name, value in self._before.items():
            setattr(self._scaler, name, value)
