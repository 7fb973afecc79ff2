"""Words as the Moses tokenizer separates them, and back to plain text.

The standard IWSLT14 files are lower-cased Moses tokens with escapes (`&apos;`). A model of plain text meets
them through :func:`moses_detokenize`, and its output is held against them through :func:`moses_tokenize`,
in lower case. Written from the rules of the tokenizer for English.
"""

# ruff: noqa: SIM905

from __future__ import annotations

import re

_ESCAPES = {"|": "&#124;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;", "[": "&#91;", "]": "&#93;"}
_SEPARATE = re.compile(r"([^\w\s.'`,\-]|_)")
_DOTS = re.compile(r"\.{2,}")
_COMMAS = ((re.compile(r"(\D),"), r"\1 , "), (re.compile(r",(\D|$)"), r" , \1"))
_LETTER = r"[^\W\d_]"
_APOSTROPHES = (
    (re.compile(rf"(?<!{_LETTER})'(?!{_LETTER})"), " ' "),
    (re.compile(rf"(?<![^\W_])'(?={_LETTER})"), " ' "),
    (re.compile(rf"(?<={_LETTER})'(?!{_LETTER})"), " ' "),
    (re.compile(rf"(?<={_LETTER})'(?={_LETTER})"), " '"),
    (re.compile(r"(?<=\d)'(?=s)"), " '"),
)
_ABBREVIATIONS = frozenset(
    "adm brig capt cmdr col corp dr drs e.g gen gov hon hosp hr i.e inc jr lt ltd maj messrs mlle mme mr mrs "
    "ms msgr op ph prof pvt rep reps res rev rt sen sens sfc sgt sr st supt surg v vs".split()
)
"""Before a full stop that ends no sentence; single letters besides."""
_BEFORE_NUMBERS = frozenset("no nos art nr pp".split())
_CLOSING = frozenset(",.!?;:%)]}…")
_OPENING = frozenset("([{$£€¿¡")
_QUOTES = frozenset("\"'")


def moses_tokenize(text: str) -> str:
    """Separate words and punctuation of English as Moses does, and escape what Moses escapes.

    Returns:
        Tokens between single spaces, case kept.
    """
    text = _SEPARATE.sub(r" \1 ", f" {' '.join(text.split())} ")
    text = _DOTS.sub(lambda match: f" {match.group()} ", text)
    for pattern, separated in (*_COMMAS, *_APOSTROPHES):
        text = pattern.sub(separated, text)
    words = text.split()
    following = [*words, ""][1:]
    tokens = " ".join(_full_stop(word, after) for word, after in zip(words, following, strict=True))
    tokens = tokens.replace("&", "&amp;")
    return "".join(_ESCAPES.get(c, c) for c in tokens)


def _full_stop(word: str, following: str) -> str:
    """The word, its full stop set apart where it ends a sentence."""
    stem = word[:-1]
    if not word.endswith(".") or not stem or set(word) == {"."}:
        return word
    abbreviated = "." in stem and any(c.isalpha() for c in stem)
    known = stem.lower() in _ABBREVIATIONS or (len(stem) == 1 and stem.isupper())
    numbered = stem.lower() in _BEFORE_NUMBERS and following[:1].isdigit()
    if abbreviated or known or numbered or following[:1].islower():
        return word
    return f"{stem} ."


def moses_detokenize(text: str) -> str:
    """Plain text of Moses tokens: escapes undone, punctuation joined to the words that it belongs to."""
    for plain, escaped in _ESCAPES.items():
        text = text.replace(escaped, plain)
    tokens = text.replace("&amp;", "&").split()
    parts: list[str] = []
    open_quotes: set[str] = set()
    glue = True
    for token in tokens:
        if token in _QUOTES:
            closing = token in open_quotes
            open_quotes ^= {token}
            parts.append(token if glue or closing else f" {token}")
            glue = not closing
            continue
        clitic = len(token) > 1 and token[0] == "'" and token[1].isalpha()
        joined = glue or clitic or token[0] in _CLOSING
        parts.append(token if joined else f" {token}")
        glue = token in _OPENING
    return "".join(parts)
