"""Perl's random numbers (48-bit linear congruence, "drand48"), for scores that are defined through them.

ROUGE-1.5.5 and Moses' significance script draw bootstrap samples with `srand(seed)` and
`int(rand(n))`. Perl has carried its own drand48 since version 5.20, so the draws are the same
everywhere, and so are the printed scores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["perl_draws"]

_MULTIPLIER = 0x5DEECE66D
_INCREMENT = 0xB
_LOW_WORD = 0x330E
_MASK = (1 << 48) - 1


def perl_draws(seeds: npt.NDArray[np.int64], below: int, count: int) -> Iterator[npt.NDArray[np.int64]]:
    """What `int(rand(below))` gives after `srand(seed)`, for many seeds at once.

    Args:
        seeds: S seeds, each the start of a generator of its own.
        below: draws are from 0 to below - 1.
        count: how many draws to make of each generator.

    Yields:
        `count` arrays of S draws, the k-th of them the k-th draw of every seed.
    """
    mask, multiplier, increment = (np.uint64(n) for n in (_MASK, _MULTIPLIER, _INCREMENT))
    state = ((seeds.astype(np.uint64) << np.uint64(16)) + np.uint64(_LOW_WORD)) & mask
    for _ in range(count):
        # The product wraps at 2**64, which leaves its low 48 bits as they are.
        state = (state * multiplier + increment) & mask
        yield (state.astype(np.float64) * (below / 2.0**48)).astype(np.int64)
