"""Held-out parts of the demonstration model's text share no sentence with training."""

from __future__ import annotations

import random

import pytest
from demo_text import split_pairs, write_splits

from janus_ds.errors import DataError


def many(count: int) -> list[tuple[str, str]]:
    """Pairs in which sources and targets come back in several combinations, case and punctuation."""
    draw = random.Random(0)
    pairs = []
    for number in range(count):
        target = f"Sentence {draw.randrange(count // 2)}"
        pairs.append((f"Satz {draw.randrange(count)}.", target + draw.choice([".", "!", " ."])))
        pairs.append((f"Noch ein Satz {number}", target.upper()))
    return pairs


def plain(text: str) -> str:
    return text.lower().strip(" .!")


def test_no_sentence_is_on_both_sides_of_the_split() -> None:
    pairs = many(300)
    splits = split_pairs(pairs, valid=20, test=30, joined_share=0.1)
    assert (len(splits.valid), len(splits.test)) == (20, 30)
    held = {"test": splits.test, "valid": splits.valid}
    for side in (0, 1):
        train = {plain(pair[side]) for pair in splits.train}
        for part in held.values():
            assert train.isdisjoint(plain(pair[side]) for pair in part)
    assert len({plain(target) for _, target in splits.test}) == 30
    assert {plain(p[0]) for p in splits.test}.isdisjoint(plain(p[0]) for p in splits.valid)
    assert len(splits.train) + splits.left_out + 50 == len(pairs)
    # Only what had to go is gone.
    sources = {plain(pair[0]) for part in held.values() for pair in part}
    targets = {plain(pair[1]) for part in held.values() for pair in part}
    fit = [p for p in pairs if plain(p[0]) not in sources and plain(p[1]) not in targets]
    assert splits.train == fit


def test_the_order_of_the_pairs_does_not_decide() -> None:
    pairs = many(200)
    mixed = random.Random(1).sample(pairs, len(pairs))
    one, other = (split_pairs(given, 10, 10, 0.2) for given in (pairs, mixed))
    assert (one.valid, one.test, one.joined) == (other.valid, other.test, other.joined)
    assert sorted(one.train) == sorted(other.train)


def test_joined_pairs_are_training_pairs_in_a_row(tmp_path) -> None:
    splits = split_pairs(many(100), 5, 5, joined_share=0.25)
    assert len(splits.joined) == round(0.25 * len(splits.train))
    parts = {pair[0]: pair[1] for pair in splits.train}
    source, target = splits.joined[0]
    first = next(s for s in parts if source.startswith(f"{s} "))
    assert any(target.startswith(f"{t} ") for s, t in splits.train if s == first)
    write_splits(splits, tmp_path, ("de", "en"))
    lines = [(tmp_path / f"train.{side}").read_text().splitlines() for side in ("de", "en")]
    assert list(zip(*lines, strict=True)) == [*splits.train, *splits.joined]
    assert len((tmp_path / "test.de").read_text().splitlines()) == 5


def test_too_little_text_is_refused() -> None:
    with pytest.raises(DataError, match="too few to hold out 60"):
        split_pairs(many(100), 30, 30)
