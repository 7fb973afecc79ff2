"""Text in and out where a run has no tokenizer of its own: token ids as numbers, or fairseq's words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from janus_ds.batch import SpecialTokens
from janus_ds.data.text.tokenizer import FIRST_WORDS, MASK_TEXT, Words
from janus_ds.errors import DataError

DICT_NAME = "dict.txt"
_OVERWRITE = " #fairseq:overwrite"


_CONTROL = re.compile("[\x00-\x08\n-\x1f\x7f-\x9f\u2028\u2029]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_MARKUP = re.compile(r"[\\`*{}\[\]()<>#!|&~$:^=\"']")


def one_line(text: str) -> str:
    """Decoded text for a file of one output a line, whatever a model writes.

    Line ends and other control characters (tabs stay) become spaces, lone surrogates U+FFFD.
    """
    return _SURROGATE.sub("\ufffd", _CONTROL.sub(" ", text)).strip()


def markdown_text(text: str) -> str:
    """Text from outside as one line of Markdown that is text and nothing else: no link, picture or HTML."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


def checked_texts(texts: str | Sequence[str], where: str = "input") -> list[str]:
    """The texts as a list; `where` they stand is for messages.

    Raises:
        DataError: one is no string, or holds half a character.
    """
    several = isinstance(texts, Iterable) and not isinstance(texts, str | bytes)
    checked: list[Any] = list(texts) if several else [texts]
    for number, text in enumerate(checked, 1):
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeEncodeError):
            what = "has a lone surrogate" if isinstance(text, str) else f"is of type {type(text).__name__}"
            raise DataError(
                f"the text {what}", f"line {number} of the {where}", "give Unicode text as a string"
            ) from None
    return checked


def batches_of(lengths: Mapping[int, int], most: int, most_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of like lengths, the longest first (memory runs out at once or never)."""
    batch: list[int] = []
    for index in sorted(lengths, key=lambda i: -lengths[i]):
        width = lengths[batch[0]] if batch else 0
        if batch and (len(batch) == most or (len(batch) + 1) * width > most_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def searches_of(batches: Iterable[list[int]], joined: bool) -> Iterator[tuple[int, list[int]]]:
    """How many sentences a search holds at a time, and its indices.

    If they are joined, the batches behind one wait for its places, until one is twice as large: a single long
    sentence does not make few places of all.
    """
    places, indices = 0, list[int]()
    for batch in batches:
        if indices and (not joined or len(batch) >= 2 * places):
            yield places, indices
            indices = []
        places = places if indices else len(batch)
        indices += batch
    if indices:
        yield places, indices


def fit_sources(
    sources: Iterable[Sequence[int]], table: int, action: str = "cut"
) -> tuple[list[list[int]], list[int]]:
    """Sources as they are decoded, and the numbers (from 1) of those that are too long for the encoder.

    Args:
        sources: token ids without bos and eos.
        table: the most that is read, bos and eos included, such as the encoder's positions.
        action: what becomes of one that is too long: cut, skip (nothing of it stays), or stop (neither it nor
            what comes behind it is given).
    """
    most, rows = table - 2, [list(source) for source in sources]
    long = [i for i, row in enumerate(rows, 1) if len(row) > most]
    if long and action == "stop":
        return rows[: long[0] - 1], long[:1]
    left = most if action == "cut" else 0
    return [row if len(row) <= most else row[:left] for row in rows], long


def long_warning(numbers: Sequence[int], total: int, table: int, action: str = "cut") -> str:
    """What is said about inputs that were too long: how many, which ones, what became of them.

    Arguments as in :func:`fit_sources`.
    """
    few = len(numbers) == 1
    lines = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    done = "cut" if action == "cut" else "skipped: an empty output"
    return (
        f"{len(numbers):,} of {total:,} inputs {'is' if few else 'are'} longer than the {table - 2} tokens "
        f"that are read (line{'s' * (not few)} {lines}) and {'was' if few else 'were'} {done}"
    )


def too_long(tokens: int, number: int, table: int, to_do: str = "") -> DataError:
    """The error about an input of so many tokens, without bos and eos; `number` is its line's."""
    return DataError(
        f"the text has {tokens + 2} tokens with bos and eos; the model reads up to {table}",
        f"line {number} of the input",
        to_do or "cut the line into shorter ones, or choose --on-long cut or --on-long skip",
    )


class TextCodec(Protocol):
    """What a generator asks of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without bos and eos."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids."""


class IdText:
    """Texts that are token ids already, written as numbers: "5 6 7"."""

    def __init__(self, special: SpecialTokens) -> None:
        self._special = special

    def encode(self, text: str) -> list[int]:
        """The numbers of a text; "<mask>" is the number of the mask.

        Raises:
            DataError: something is no number, or no id of the vocabulary.
        """
        size, text = self._special.vocab_size, text.replace(MASK_TEXT, f" {self._special.mask} ")
        for word in text.split():
            if not word.isascii() or not word.isdigit() or int(word) >= size:
                raise DataError(
                    f"{word!r} is not a token id", "the input", f"give numbers from 0 to {size - 1}, or text"
                )
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as numbers."""
        return " ".join(str(id_) for id_ in ids)


class FairseqWords(Words):
    """Words of fairseq's `dict.txt`: for text that BPE has cut already.

    fairseq puts four special symbols first and, for BART, a mask behind the last word.

    Args:
        path: the `dict.txt`, one "word count" a line.

    Raises:
        DataError: the file cannot be read, or is of another vocabulary size.
    """

    def __init__(self, path: Path, special: SpecialTokens) -> None:
        words = [*FIRST_WORDS, *_read_words(path)]
        self.fingerprint = hashlib.sha256("\n".join(words).encode()).hexdigest()
        if special.vocab_size == len(words) + 1:
            words.append(MASK_TEXT)
        if special.vocab_size != len(words):
            raise DataError(
                f"the dictionary has {len(words)} symbols, the model {special.vocab_size}",
                str(path),
                "give the dict.txt that the model was trained with",
            )
        super().__init__(words, special)


def _read_words(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the dictionary cannot be read ({error})", str(path), "give the path of a fairseq dict.txt"
        ) from error
    words = []
    for number, line in enumerate(lines, 1):
        word, _, count = line.removesuffix(_OVERWRITE).rpartition(" ")
        if line and not (word and count.isdigit()):
            raise DataError(
                "the line is not a word and its count", f"{path}, line {number}", "give a fairseq dict.txt"
            )
        if line:
            words.append(word)
    return words
