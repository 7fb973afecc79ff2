"""Which pairs are trained on: not empty, not far too unequal, not seen before. All is counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Set

from janus_ds.data.pair_settings import PairSettings

__all__ = ["PairCleaner", "pair_key"]

_SHORT_WORDS = 10
"""Where the longer side has fewer words than this, the ratio says nothing."""


def pair_key(source: str, target: str) -> bytes:
    """A hash that tells pairs apart."""
    return hashlib.blake2b(f"{source}\n{target}".encode(), digest_size=8).digest()


class PairCleaner:
    """Looks at pairs one after the other.

    Args:
        settings: limits.
        held_out: keys of validation and test pairs: training pairs among them are counted, and kept.
        counts: what is read, left out ("empty", "too_unequal", "duplicates") and "also_held_out".
    """

    def __init__(self, settings: PairSettings, held_out: Set[bytes], counts: Counter[str]) -> None:
        self._settings = settings
        self._held_out = held_out
        self._counts = counts
        self._seen: set[bytes] = set()

    def keeps(self, source: str, target: str) -> bool:
        """Whether the pair is trained on."""
        self._counts["lines"] += 1
        fault = self._fault(source, target)
        if fault is not None:
            self._counts[fault] += 1
        return fault is None

    def _fault(self, source: str, target: str) -> str | None:
        if not source or not target:
            return "empty"
        words = sorted((len(source.split()), len(target.split())))
        if words[1] >= _SHORT_WORDS and words[1] > self._settings.max_ratio * words[0]:
            return "too_unequal"
        key = pair_key(source, target)
        if key in self._seen and self._settings.duplicates == "drop":
            return "duplicates"
        self._seen.add(key)
        self._counts["also_held_out"] += key in self._held_out
        return None
