"""What both preparations of pairs do on the way from text to tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from janus_ds.batch import SpecialTokens

__all__ = ["plain_ids", "portions", "structural"]

Pair = tuple[str, str]


def portions(pairs: Iterable[Pair], size: int) -> Iterator[tuple[Sequence[Pair], int]]:
    """Pairs in portions of `size`, each with the number of pairs up to its end; at least one portion."""
    portion: list[Pair] = []
    done = 0
    for pair in pairs:
        portion.append(pair)
        if len(portion) == size:
            done += size
            yield portion, done
            portion = []
    if portion or not done:
        yield portion, done + len(portion)


def structural(special: SpecialTokens) -> frozenset[int]:
    """Symbols that text may spell but a sample must not hold: an eos inside would mean the end."""
    return frozenset((special.bos, special.pad, special.eos, special.mask))


def plain_ids(ids: Sequence[int], special: SpecialTokens) -> list[int]:
    """Tokens of a text without such symbols."""
    dropped = structural(special)
    return [id_ for id_ in ids if id_ not in dropped]
