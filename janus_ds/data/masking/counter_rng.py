"""Random numbers that are functions of (run seed, epoch, sample id, stream, counter) and of nothing else.

Each value is a hash of its coordinates (the finaliser of splitmix64), so there is no state to save, the
numbers do not depend on the order in which they are asked for, and a whole batch is drawn at once. They
are for sampling, not for secrets.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

UInts = NDArray[np.uint64]

Floats = NDArray[Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_TO_UNIT = 2.0**-53


class Stream(IntEnum):
    """What a number is for; two uses never share one. Values are part of the reproducible order."""

    MEMBER_ORDER = 0
    WINDOW_ORDER = 1
    HIDDEN_LENGTH = 2
    HIDDEN_PLACE = 3
    FURTHER_LENGTH = 4
    FURTHER_PLACE = 5
    CIRCLE = 6
    POSITION_ORDER = 7
    SHARE = 8
    COIN = 9
    ROTATION = 10
    BUCKET_ORDER = 11
    SHARD_ORDER = 12
    MIXED_ORDER = 13
    AUX_ORDER = 15


def _mix(x: UInts) -> UInts:
    """The splitmix64 finaliser; works in place on an array that nobody else holds."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _uint64(values: ArrayLike) -> UInts:
    # Through int64, so that negative seeds wrap around instead of failing.
    array = np.atleast_1d(np.asarray(values))
    return array if array.dtype == np.uint64 else array.astype(np.int64).view(np.uint64)


def keys(seed: int, epochs: ArrayLike, ids: ArrayLike, stream: Stream) -> UInts:
    """The key of each (seed, epoch, id, stream): where its sequence of numbers starts.

    Args:
        seed: the run's seed; taken modulo 2**64.
        epochs: integers, shape (B,) or one for all.
        ids: integers, shape (B,).

    Returns:
        uint64, shape (B,).
    """
    return bits(_base(seed, epochs, ids), int(stream))


def _base(seed: int, epochs: ArrayLike, ids: ArrayLike) -> UInts:
    key = _mix(np.array([seed % 2**64], dtype=np.uint64) + _GOLDEN)
    return bits(bits(key, epochs), ids)


def bits(key: UInts, counter: ArrayLike) -> UInts:
    """64 random bits for each pair of key and counter, with broadcasting."""
    return _mix(key + _GOLDEN * (_uint64(counter) + np.uint64(1)))


def uniforms(key: UInts, counter: ArrayLike) -> Floats:
    """A number of [0, 1) with 53 random bits for each pair of key and counter, with broadcasting."""
    return (bits(key, counter) >> np.uint64(11)) * _TO_UNIT


def shuffled(key: UInts, count: int) -> NDArray[np.int64]:
    """A permutation of 0 .. count - 1, the same for the same key (shape (1,)) on every machine."""
    order: NDArray[Any] = np.argsort(bits(key, np.arange(count)), kind="stable")
    return order


class SampleKeys:
    """The keys of a batch of samples, by stream.

    Args:
        seed: the run's seed.
        epochs: int64, shape (B,).
        ids: int64, shape (B,): sample numbers.
    """

    def __init__(self, seed: int, epochs: ArrayLike, ids: ArrayLike) -> None:
        # The stream comes last in `keys`, so that what is common to all streams is hashed once.
        self._base_B = _base(seed, epochs, ids)

    def key(self, stream: Stream) -> UInts:
        """uint64, shape (B,)."""
        return bits(self._base_B, int(stream))

    def bits(self, stream: Stream, columns: int) -> UInts:
        """uint64, shape (B, columns); a column is the same whatever the number of columns."""
        return bits(self.key(stream)[:, None], np.arange(columns))

    def uniforms(self, stream: Stream, columns: int) -> Floats:
        """Numbers of [0, 1), shape (B, columns)."""
        return uniforms(self.key(stream)[:, None], np.arange(columns))

    def uniform(self, stream: Stream) -> Floats:
        """One number of [0, 1) a sample, shape (B,)."""
        return uniforms(self.key(stream), 0)
