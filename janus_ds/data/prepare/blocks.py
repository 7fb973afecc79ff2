"""The parallel part of a preparation: texts in, packed blocks of complete sentences of each split out.

A line end always ends a sentence. Within a line a sentence ends after `.`, `!`, `?` or an ellipsis with any
closing quotes and brackets, where white space follows and what follows does not begin with a lower-case
letter; except after a single full stop that belongs to an initial ("J.") or to a common English abbreviation
("Mr."). After the full stops of Chinese and Japanese no white space is needed, and where there is none, none
comes into a block. White space becomes single spaces.
"""

# ruff: noqa: RUF001, SIM905

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain

import numpy as np

from janus_ds.batch import Ragged
from janus_ds.data.prepare.settings import PrepareSettings
from janus_ds.data.stream.shards import token_dtype
from janus_ds.data.text.tokenizer import (
    Tokenizer,
    structural,
)

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
    return [sentence for sentence, _ in _with_borders(text)]


def _with_borders(text: str) -> list[tuple[str, bool]]:
    """The sentences, and whether another one precedes each with nothing between them."""
    sentences = []
    for line in text.split("\n"):
        start, glued = 0, False
        for match in _END.finditer(line):
            if match.end() < len(line) and _ends_sentence(line, match):
                sentences.append((line[start : match.end()], glued))
                start, glued = match.end(), not match.group()[-1].isspace()
        sentences.append((line[start:], glued))
    evened = ((" ".join(sentence.split()), glued) for sentence, glued in sentences)
    return [(sentence, glued) for sentence, glued in evened if sentence]


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


def cut_rows(
    rows: list[list[int]], limit: int, head: Callable[[int], list[int]] | None = None
) -> tuple[list[int], int]:
    """Cut a document into blocks of complete sentences of at most `limit` tokens, greedily.

    A sentence longer than `limit` is cut every `limit` tokens; its rest begins the next block.

    Returns:
        tokens of each block, which cover all tokens in order; how many sentences were longer than a block.

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
    return lengths, overlong


def split_of(text: str, settings: PrepareSettings) -> str:
    """train, valid or test, by the hash of the text: equal texts never lie in two splits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little") / 2**64
    if draw < settings.valid_share:
        return "valid"
    return "test" if draw < settings.valid_share + settings.test_share else "train"


def encode_blocks(
    tokenizer: Tokenizer, settings: PrepareSettings, texts: Sequence[str]
) -> tuple[dict[str, dict[str, Ragged]], Counter[str]]:
    """Blocks of the texts, by split and stream ("target"), and counts; none holds text of two documents."""
    special, joiner, counts = tokenizer.special, tokenizer.joiner, Counter(documents=len(texts))
    documents = [_with_borders(text) for text in texts]
    joined = (
        sentence if glued or not number else joiner + sentence
        for document in documents
        for number, (sentence, glued) in enumerate(document)
    )
    encoded, forbidden = iter(tokenizer.encode_batch(list(joined))), structural(special)
    rows, lengths, splits = list[list[int]](), list[int](), list[str]()
    for text, document in zip(texts, documents, strict=True):
        own = [(sentence, next(encoded), glued) for sentence, glued in document]
        # Sentences that spell a special symbol are left out: an eos inside a block would mean its end.
        kept = [part for part in own if forbidden.isdisjoint(part[1])]
        kept_rows = [tokenizer.glued(row) if glued else row for _, row, glued in kept]
        head = None
        if joiner or any(glued for _, _, glued in kept):
            head = partial(_head, tokenizer, [sentence for sentence, _, _ in kept])
            if kept and kept[0] is not own[0]:
                kept_rows[0] = head(0)
        blocks, overlong = cut_rows(kept_rows, settings.block_tokens, head)
        counts["sentences"] += len(kept)
        counts["sentences_with_special_symbols"] += len(own) - len(kept)
        counts["sentences_cut"] += overlong
        counts["text_bytes"] += len(text.encode())
        rows += kept_rows
        lengths += blocks
        splits += [split_of(text, settings)] * len(blocks)
    dtype = np.dtype(token_dtype(special.vocab_size))
    values = np.fromiter(chain.from_iterable(rows), dtype, sum(lengths))
    counts["unknown_tokens"] += int(np.count_nonzero(values == special.unk))
    whole, names = Ragged.from_lengths(values, lengths), np.array(splits, dtype=str)
    samples = {name: {"target": whole.take(np.flatnonzero(names == name))} for name in dict.fromkeys(splits)}
    return samples, counts


def _head(tokenizer: Tokenizer, sentences: Sequence[str], number: int) -> list[int]:
    return tokenizer.encode(sentences[number])
