"""A dictionary of words, for text that has been cut into subwords already ("@@ " of subword-nmt)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from janus_ds.batch import SpecialTokens
from janus_ds.errors import DataError
from janus_ds.io import disk_faults, fingerprint_of, write_atomic

WORDS_NAME = "words.txt"

FIRST_WORDS, MASK_WORD = ("<s>", "<pad>", "</s>", "<unk>"), "<mask>"
_SPECIAL_WORDS = (*FIRST_WORDS, MASK_WORD)

_JOIN = "@@ "

_MOST_WORDS = 100_000


def shown_ids(ids: Iterable[int], special: SpecialTokens) -> list[int]:
    """Ids without bos, eos and pad."""
    dropped = (special.bos, special.pad, special.eos)
    return [int(id_) for id_ in ids if int(id_) not in dropped]


def save_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write a tokenizer's files, each whole; makes the folder."""
    with disk_faults(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_atomic(directory / name, data)


class Words:
    """Words between spaces, numbered by a list, special symbols included."""

    joiner = ""

    def __init__(self, words: list[str], special: SpecialTokens) -> None:
        self.words, self.special = words, special
        self._ids = {word: number for number, word in enumerate(words)} | {MASK_WORD: special.mask}

    def encode(self, text: str) -> list[int]:
        """Ids of the words without bos and eos; unknown words become unk."""
        return [self._ids.get(word, self.special.unk) for word in text.split()]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of many texts at once."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Words with spaces between them and subwords joined; bos, eos and pad are dropped."""
        text = " ".join(self.words[id_] for id_ in shown_ids(ids, self.special))
        return f"{text} ".replace(_JOIN, "").rstrip()


class WordTokenizer(Words):
    """Words of a list that begins with bos 0, pad 1, eos 2, unk 3, mask 4.

    Args:
        data: bytes of `words.txt`, one word a line, special symbols included.

    Raises:
        DataError: the list is damaged.
    """

    def __init__(self, data: bytes, where: str = WORDS_NAME) -> None:
        try:
            words = data.decode("utf-8").split("\n")[:-1]
        except UnicodeDecodeError:
            words = []
        if tuple(words[:5]) != _SPECIAL_WORDS or len(set(words)) != len(words):
            raise DataError(
                "this is not a list of different words that begins with the special symbols",
                where,
                "copy the file again, or prepare the data again",
            )
        super().__init__(words, SpecialTokens(0, 1, 2, 3, 4, vocab_size=len(words)))
        self._data = data
        self.fingerprint = fingerprint_of(b"words", data)

    def save(self, directory: Path) -> None:
        """Write `words.txt`."""
        save_files(directory, {WORDS_NAME: self._data})


def train_words(lines: Iterable[str]) -> WordTokenizer:
    """The dictionary of all words of the lines, the most frequent first.

    Raises:
        DataError: there is no text, or so many words that it cannot have been cut into subwords.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line.split())
    for word in _SPECIAL_WORDS:
        counts.pop(word, None)
    if not counts:
        raise DataError("there is no text", "the training files", "give files that hold text")
    if len(counts) > _MOST_WORDS:
        raise DataError(
            f"the text has {len(counts):,} different words, too many for text cut into subwords",
            "--tokenizer bpe-words",
            "apply BPE before (subword-nmt), or use --tokenizer sentencepiece-bpe on the plain text",
        )
    ordered = sorted(counts, key=lambda word: (-counts[word], word))
    return WordTokenizer("".join(f"{word}\n" for word in (*_SPECIAL_WORDS, *ordered)).encode())
