"""How a step that works on fixed buffers is run again: as a captured CUDA graph, or by calling it.

Calling it again gains nothing. It stands in on devices without graphs, so that everything but the capture
can be tested there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["CalledAgain", "Capture", "CapturedGraph", "StepRunner", "capture_on"]

_WARM_UPS = 3
"""Calls before a capture: libraries choose their kernels and take their workspaces at first."""


class StepRunner(Protocol):
    """A step that runs again and again on the same buffers."""

    def replay(self) -> Tensor:
        """Run once more; the result stands where the last one stood."""


Capture = Callable[[Callable[[], Tensor]], StepRunner]
"""Makes a runner of a step; it may run the step on what the buffers hold, any number of times."""


class CalledAgain:
    """A runner for any device: the step is called, its result copied to where the first one stood."""

    def __init__(self, body: Callable[[], Tensor]) -> None:
        self._body = body
        out = body()
        # To be changed whatever the gradient mode of the step.
        with torch.inference_mode(False):
            self._out = torch.empty_like(out)

    def replay(self) -> Tensor:
        """See :class:`StepRunner`."""
        return self._out.copy_(self._body())


class CapturedGraph:
    """A runner for a CUDA device: the step is captured once, and a replay is one launch.

    Args:
        device: of the buffers.
        pool: a `torch.cuda.graph_pool_handle`: graphs share the memory of what lives within a step only.
        side: the stream of captures; libraries keep a workspace for every stream.
        body: the step.
    """

    def __init__(
        self, device: torch.device, pool: Any, side: torch.cuda.Stream, body: Callable[[], Tensor]
    ) -> None:
        with torch.cuda.device(device):
            here = torch.cuda.current_stream()
            side.wait_stream(here)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    body()
            here.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(self._graph, pool, side, capture_error_mode="thread_local"):
                self._out = body()

    def replay(self) -> Tensor:
        """See :class:`StepRunner`."""
        self._graph.replay()
        return self._out


def capture_on(device: torch.device) -> Capture:
    """The runners of a device; those of one call share their memory on a CUDA device."""
    if device.type != "cuda":
        return CalledAgain
    with torch.cuda.device(device):
        return partial(CapturedGraph, device, torch.cuda.graph_pool_handle(), torch.cuda.Stream())
