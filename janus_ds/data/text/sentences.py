"""Sentences of a text, by rule, and blocks of complete sentences.

The rule: a line end always ends a sentence. Within a line a sentence ends after `.`, `!`, `?` or an
ellipsis with any closing quotes and brackets, where white space follows and what follows does not
begin with a lower-case letter; except after a single full stop that belongs to an initial ("J.") or
to a common English abbreviation ("Mr."). After the full stops of Chinese and Japanese no white space
is needed. White space inside a sentence becomes single spaces.
"""

# ruff: noqa: RUF001, SIM905

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_CLOSING = "\"'”’»)\\]"

_OPENING = "\"'“‘«([-–—"

# Each run of stops is looked at once: otherwise a line of n of them would take n squared steps.
_END = re.compile(rf"(?:(?<![.!?…])[.!?…]++[{_CLOSING}]*+\s++|[。！？]+[」』”’）]*\s*)")

_ABBREVIATIONS = frozenset(
    "Mr Mrs Ms Messrs Dr Drs Prof St Sr Jr Rev Hon Gen Col Capt Cpt Lt Maj Sgt Cmdr Adm Gov Sen Rep Pres "
    "Mme Mlle Vol vol pp ed eds Ed Fig fig Figs cf vs e.g i.e viz al ca approx Mt Ft U.S U.K U.N D.C".split()
)

_BEFORE_NUMBERS = frozenset("No Nos no nos p Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec".split())


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, none empty, in order."""
    sentences = []
    for line in text.split("\n"):
        start = 0
        for match in _END.finditer(line):
            if match.end() < len(line) and _ends_sentence(line, match):
                sentences.append(line[start : match.end()])
                start = match.end()
        sentences.append(line[start:])
    evened = (" ".join(sentence.split()) for sentence in sentences)
    return [sentence for sentence in evened if sentence]


def _ends_sentence(line: str, match: re.Match[str]) -> bool:
    following = line[match.end() : match.end() + 8].lstrip(_OPENING)
    if following[:1].islower():
        return False
    if match.group().rstrip() != ".":
        return True
    before = line[max(0, match.start() - 24) : match.start()]
    words = before.split()
    word = words[-1].lstrip(_OPENING) if words and not before[-1].isspace() else ""
    initial = len(word) == 1 and word.isupper() and word != "I"
    numbered = following[:1].isdigit() and word in _BEFORE_NUMBERS
    return not (initial or numbered or word in _ABBREVIATIONS)


@dataclass(frozen=True)
class CutRows:
    """Where a document's tokens are cut into blocks.

    Args:
        lengths: tokens of each block; the blocks cover all tokens in order.
        overlong: sentences longer than a block, which had to be cut.
    """

    lengths: list[int]
    overlong: int


def cut_rows(rows: list[list[int]], limit: int, head: Callable[[int], list[int]] | None = None) -> CutRows:
    """Cut a document into blocks of complete sentences of at most `limit` tokens, greedily.

    A sentence longer than `limit` is cut every `limit` tokens; its rest begins the next block.

    Args:
        rows: the tokens of each sentence. A sentence that begins a block is replaced by `head` of
            its number, where that is given (byte-level BPE: without the space before it).
        limit: most tokens of a block.
        head: gives the tokens of a sentence that begins a block.
    """
    lengths: list[int] = []
    filled = overlong = 0
    for number, row in enumerate(rows):
        size = len(row)
        if filled and filled + size > limit:
            lengths.append(filled)
            filled = 0
        if not filled and number and head is not None:
            rows[number] = head(number)
            size = len(rows[number])
        overlong += size > limit
        while size > limit:
            lengths.append(limit)
            size -= limit
        filled += size
    if filled:
        lengths.append(filled)
    return CutRows(lengths, overlong)
