"""Rows of different lengths in two flat arrays, the one in-memory form of token data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

IntArray = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Ragged:
    """n rows: row i is `values[offsets[i]:offsets[i + 1]]`.

    Args:
        values: all rows one after the other, one-dimensional.
        offsets: int64, shape (n + 1,), starts at 0, never falls, ends at `len(values)`.
    """

    values: IntArray
    offsets: IntArray

    @classmethod
    def from_rows(cls, rows: Sequence[ArrayLike], dtype: DTypeLike = np.int64) -> Ragged:
        """Build from a list of one-dimensional rows; the values get `dtype`."""
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))  # type: ignore[arg-type]
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        values = np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
        return cls.from_lengths(values, lengths)

    @classmethod
    def from_lengths(cls, values: IntArray, lengths: ArrayLike) -> Ragged:
        """Build from flat values and the length of each row."""
        return cls(values, np.append(0, np.cumsum(np.asarray(lengths, dtype=np.int64))))

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of all parts, in order; `parts` must not be empty."""
        values = np.concatenate([part.values for part in parts])
        return cls.from_lengths(values, np.concatenate([part.lengths for part in parts]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """int64, shape (n,): tokens of each row."""
        return self.offsets[1:] - self.offsets[:-1]

    def row(self, index: int) -> IntArray:
        """Row 0 .. n - 1, a view."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def rows(self) -> list[IntArray]:
        """All rows, as views."""
        return [self.row(index) for index in range(len(self))]

    def map(self, function: Callable[[IntArray], ArrayLike]) -> Ragged:
        """What the function makes of each row (int64), of any length."""
        return Ragged.from_rows([function(row.astype(np.int64)) for row in self.rows()])

    def take(self, rows: ArrayLike) -> Ragged:
        """The chosen rows in the chosen order; a row may be chosen more than once."""
        chosen = np.asarray(rows, dtype=np.int64)
        starts = self.offsets[chosen]
        lengths = self.offsets[chosen + 1] - starts
        offsets = np.append(0, np.cumsum(lengths))
        # Flat position k of the result lies in row r(k): source = start[r] + (k - offset[r]).
        shift = np.repeat(starts - offsets[:-1], lengths)
        return Ragged(self.values[shift + np.arange(offsets[-1])], offsets)

    def slice(self, start: int, stop: int) -> Ragged:
        """Rows start .. stop - 1; the values are a view."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0])
