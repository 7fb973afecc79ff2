"""Text of the demonstration model: held-out parts that share no sentence with training, on either side.

Collections such as Tatoeba give a sentence several translations, so a split by line would put one
sentence's translation into training and another into the test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from janus_ds.errors import DataError
from janus_ds.io import disk_faults

Pair = tuple[str, str]

_SENTENCES_JOINED = (2, 3, 4)
_SHORT_WORDS = 3
_ENDS = (".", "!", ".", "")


@dataclass(frozen=True)
class PairSplits:
    """Pairs by split, and how many were left out of training because a held-out part has their sentence."""

    train: list[Pair]
    joined: list[Pair]
    """Training pairs put one after another."""
    short: list[Pair]
    """Copies of training pairs of a few words: greetings and answers, rare in the text, common in use. Where
    both sides end with a full stop, every second copy has another end. The preparation keeps one of equal
    pairs: what is trained on more are those with another end."""
    valid: list[Pair]
    test: list[Pair]
    left_out: int


def split_pairs(
    pairs: Sequence[Pair], valid: int, test: int, joined_share: float = 0.0, short_copies: int = 0
) -> PairSplits:
    """Draw held-out parts by hash of the target side, so that the draw does not depend on the order.

    Sentences count as equal if they differ in case, punctuation and white space alone. A held-out target
    sentence comes with one source; its other translations, and training pairs with a held-out sentence on
    either side, are left out.

    Args:
        pairs: source and target.
        valid: pairs of the validation part.
        test: pairs of the test part.
        joined_share: training pairs that are two to four pairs in a row, as a share of the pairs. Where all
            sentences are short, they train the later positions.
        short_copies: how many times more training has each pair of at most three target words.

    Raises:
        DataError: there are too few distinct target sentences.
    """
    by_target: dict[str, Pair] = {}
    for pair in sorted(pairs, key=_order):
        by_target.setdefault(_plain(pair[1]), pair)
    drawn = sorted(by_target, key=digest)
    if len(drawn) <= 2 * (valid + test):
        raise DataError(
            f"there are {len(drawn):,} distinct target sentences, too few to hold out {valid + test:,}",
            "parallel text",
            "give more text, or hold out less",
        )
    held_test = [by_target[key] for key in drawn[:test]]
    sources = {_plain(source) for source, _ in held_test}
    rest = (by_target[key] for key in drawn[test:])
    held_valid = [pair for _, pair in zip(range(valid), _without(rest, sources, set()), strict=False)]
    sources |= {_plain(source) for source, _ in held_valid}
    targets = {_plain(target) for _, target in [*held_test, *held_valid]}
    train = list(_without(pairs, sources, targets))
    joined = _joined(sorted(train, key=_order), round(joined_share * len(train)))
    few = [pair for pair in train if len(pair[1].split()) <= _SHORT_WORDS]
    short = [_with_end(pair, _ENDS[copy % len(_ENDS)]) for copy in range(short_copies) for pair in few]
    return PairSplits(train, joined, short, held_valid, held_test, len(pairs) - len(train) - valid - test)


def _without(pairs: Iterable[Pair], sources: set[str], targets: set[str]) -> Iterator[Pair]:
    return (pair for pair in pairs if _plain(pair[0]) not in sources and _plain(pair[1]) not in targets)


def _joined(pairs: Sequence[Pair], count: int) -> list[Pair]:
    joined: list[Pair] = []
    start = 0
    while len(joined) < count:
        size = _SENTENCES_JOINED[len(joined) % len(_SENTENCES_JOINED)]
        group = [pairs[(start + i) % len(pairs)] for i in range(size)]
        joined.append((" ".join(source for source, _ in group), " ".join(target for _, target in group)))
        start += size
    return joined


def _with_end(pair: Pair, end: str) -> Pair:
    if not all(side.endswith(".") for side in pair):
        return pair
    source, target = (side[:-1] + end for side in pair)
    return source, target


def _plain(text: str) -> str:
    words = "".join(c if c.isalnum() or c.isspace() else " " for c in text.lower()).split()
    return " ".join(words) or text


def digest(text: str) -> bytes:
    """A number by which text is drawn, whatever its order."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _order(pair: Pair) -> tuple[bytes, Pair]:
    return digest("\t".join(pair)), pair


def write_splits(splits: PairSplits, folder: Path, languages: tuple[str, str]) -> None:
    """Write SPLIT.LANGUAGE, one sentence a line.

    Raises:
        ResourceError: full disk or missing permission.
    """
    parts = {
        "train": [*splits.train, *splits.joined, *splits.short],
        "valid": splits.valid,
        "test": splits.test,
    }
    with disk_faults(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, pairs in parts.items():
            for side, language in enumerate(languages):
                text = "".join(f"{pair[side]}\n" for pair in pairs)
                (folder / f"{name}.{language}").write_text(text, encoding="utf-8")
