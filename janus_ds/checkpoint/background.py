"""One piece of work beside training, whose failure is never lost."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Background"]


class Background:
    """Runs one action at a time in a thread of its own.

    The thread is no daemon: a program that ends, by an error too, ends after the action.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None

    def start(self, action: Callable[[], None]) -> None:
        """Begin an action; the one before must have been waited for."""
        if self._thread is not None:
            raise RuntimeError("the action before has not been waited for")
        self._thread = threading.Thread(target=self._run, args=(action,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the action, if there is one.

        Raises:
            BaseException: what the action raised.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _run(self, action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException as fault:
            self._fault = fault
