"""The stemmer of ROUGE-1.5.5: Porter's, with the author's later rules and C.-Y. Lin's fourth step.

M. F. Porter, "An algorithm for suffix stripping", Program 14(3), 1980. Later rules: -bli -> -ble and
-logi -> -log in step 2. Lin's fourth step tries one suffix of the list without -ment and -ent, and
then those two by themselves, so that "agreement" becomes "agreem" and "accidental" becomes "accid".
"""

from __future__ import annotations

from functools import lru_cache

__all__ = ["rouge_stem"]

_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble",
    "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate",
    "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al",
    "iviti": "ive", "biliti": "ble", "logi": "log",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ou", "ism", "ate", "iti", "ous", "ive",
    "ize",
)  # fmt: skip


@lru_cache(maxsize=1 << 16)
def rouge_stem(word: str) -> str:
    """Stem of a word of lower-case ASCII letters and digits; three characters or fewer stay as they are."""
    if len(word) <= 3:
        return word
    word = _step_1c(_step_1b(_step_1a(word)))
    word = _longest(word, _STEP_2)
    word = _longest(word, _STEP_3)
    return _step_5(_step_4(word))


def _kinds(word: str) -> str:
    """The word with v for each vowel and c for each consonant; a y is a vowel behind a consonant only."""
    kinds = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and kinds.endswith("c"))
        kinds += "v" if vowel else "c"
    return kinds


def _measure(stem: str) -> int:
    """Porter's m: how often a consonant follows a vowel."""
    return _kinds(stem).count("vc")


def _is_short(stem: str) -> bool:
    """Consonants, one vowel, one consonant other than w, x, y: Porter's condition m = 1 and *o."""
    kinds = _kinds(stem)
    return kinds.endswith("cvc") and kinds.count("v") == 1 and stem[-1] not in "wxy"


def _step_1a(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    if word.endswith("s") and word[-2] != "s":
        return word[:-1]
    return word


def _step_1b(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    for suffix in ("ed", "ing"):
        if word.endswith(suffix):
            stem = word.removesuffix(suffix)
            return _mend(stem) if "v" in _kinds(stem) else word
    return word


def _mend(stem: str) -> str:
    """Put back the e that -ed and -ing swallow, or take the doubled consonant away."""
    if stem.endswith(("at", "bl", "iz")):
        return stem + "e"
    if len(stem) > 1 and stem[-1] == stem[-2] and stem[-1] not in "aeiouylsz":
        return stem[:-1]
    return stem + "e" if _is_short(stem) else stem


def _step_1c(word: str) -> str:
    return word[:-1] + "i" if word.endswith("y") and "v" in _kinds(word[:-1]) else word


def _longest(word: str, rules: dict[str, str]) -> str:
    """Exchange the longest suffix of `rules` if the stem before it has m > 0."""
    suffix = max((s for s in rules if word.endswith(s)), key=len, default="")
    stem = word.removesuffix(suffix)
    return stem + rules[suffix] if suffix and _measure(stem) > 0 else word


def _drop(word: str, suffix: str) -> str:
    stem = word.removesuffix(suffix)
    return stem if _measure(stem) > 1 else word


def _step_4(word: str) -> str:
    word = _drop(word, max((s for s in _STEP_4 if word.endswith(s)), key=len, default=""))
    word = _drop(word, "ment")
    if word.endswith("ent"):
        return _drop(word, "ent")
    return _drop(word, "ion") if word.endswith(("sion", "tion")) else word


def _step_5(word: str) -> str:
    if word.endswith("e"):
        stem = word[:-1]
        measure = _measure(stem)
        if measure > 1 or (measure == 1 and not _is_short(stem)):
            word = stem
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word
