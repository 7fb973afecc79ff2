"""Made-up text for tests of the preparation: words of syllables, sentences, documents."""

from __future__ import annotations

import random

SYLLABLES = [consonant + vowel for consonant in "bdklmnrst" for vowel in "aeo"]


def sentence(rng: random.Random, words: int) -> str:
    """A sentence of so many words."""
    text = " ".join("".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(words))
    return text.capitalize() + rng.choice(".!?")


def document(rng: random.Random) -> str:
    """Three lines of some sentences."""
    lines = (" ".join(sentence(rng, rng.randint(2, 9)) for _ in range(rng.randint(1, 4))) for _ in range(3))
    return "\n".join(lines)


def documents(count: int, seed: int = 1) -> list[str]:
    """So many different documents."""
    rng = random.Random(seed)
    return [document(rng) for _ in range(count)]
