"""Text in and out where a run has no tokenizer of its own: token ids as numbers, or fairseq's words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from janus_ds.batch import SpecialTokens
from janus_ds.errors import DataError

__all__ = ["DICT_NAME", "FairseqWords", "IdText", "TextCodec", "one_line"]

DICT_NAME = "dict.txt"
_FIRST_WORDS = ("<s>", "<pad>", "</s>", "<unk>")
_MASK_WORD = "<mask>"
_JOIN = "@@ "
_OVERWRITE = " #fairseq:overwrite"


def one_line(text: str) -> str:
    """Decoded text for a file of one output a line: byte-level vocabularies have line ends, and models may
    write them."""
    return text.replace("\r", " ").replace("\n", " ").strip()


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
        """The numbers of a text.

        Raises:
            DataError: something is no number, or no id of the vocabulary.
        """
        size = self._special.vocab_size
        for word in text.split():
            if not word.isascii() or not word.isdigit() or int(word) >= size:
                raise DataError(
                    f"{word!r} is not a token id", "the input", f"give numbers from 0 to {size - 1}, or text"
                )
        return [int(word) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """The ids as numbers."""
        return " ".join(str(id_) for id_ in ids)


class FairseqWords:
    """Words between spaces, numbered by fairseq's `dict.txt`: for text that BPE has cut already.

    fairseq puts four special symbols first and, for BART, a mask behind the last word. In decoded text
    the "@@ " of subword-nmt is joined again.

    Args:
        path: the `dict.txt`, one "word count" a line.
        special: the model's special symbols and vocabulary size.

    Raises:
        DataError: the file cannot be read, or is of another vocabulary size.
    """

    def __init__(self, path: Path, special: SpecialTokens) -> None:
        words = [*_FIRST_WORDS, *_read_words(path)]
        self.fingerprint = hashlib.sha256("\n".join(words).encode()).hexdigest()
        if special.vocab_size == len(words) + 1:
            words.append(_MASK_WORD)
        if special.vocab_size != len(words):
            raise DataError(
                f"the dictionary has {len(words)} symbols, the model {special.vocab_size}",
                str(path),
                "give the dict.txt that the model was trained with",
            )
        self._words = words
        self._ids = {word: id_ for id_, word in enumerate(words)} | {_MASK_WORD: special.mask}
        self._special = special

    def encode(self, text: str) -> list[int]:
        """Ids of the words; unknown words become unk."""
        return [self._ids.get(word, self._special.unk) for word in text.split()]

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them; bos, eos and pad are dropped."""
        dropped = (self._special.bos, self._special.eos, self._special.pad)
        text = " ".join(self._words[id_] for id_ in ids if id_ not in dropped)
        return f"{text} ".replace(_JOIN, "").rstrip()


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
