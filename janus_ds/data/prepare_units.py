"""The parallel part of a preparation: texts in, packed blocks of each split out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from janus_ds.data.documents import DocumentReader, Position
from janus_ds.data.prepare_settings import PrepareSettings
from janus_ds.data.ragged import Ragged
from janus_ds.data.sentences import cut_rows, split_sentences
from janus_ds.data.shards import token_dtype
from janus_ds.data.tokenizer import Tokenizer

__all__ = ["BlockEncoder", "UnitResult", "read_units", "split_of"]


@dataclass(frozen=True)
class UnitResult:
    """Samples by split and stream, in reading order, and counts to be added up."""

    samples: dict[str, dict[str, Ragged]]
    counts: Counter[str]


def split_of(text: str, settings: PrepareSettings) -> str:
    """train, valid or test, by the hash of the text: equal texts never lie in two splits."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little") / 2**64
    if draw < settings.valid_share:
        return "valid"
    return "test" if draw < settings.valid_share + settings.test_share else "train"


def read_units(
    reader: DocumentReader, start: Position, unit_characters: int
) -> Iterator[tuple[list[str], Position]]:
    """Documents in portions of about equal size, each with the position behind it."""
    texts: list[str] = []
    size, behind = 0, start
    for text, behind in reader.read(start):
        texts.append(text)
        size += len(text)
        if size >= unit_characters:
            yield texts, behind
            texts, size = [], 0
    if texts:
        yield texts, behind


class BlockEncoder:
    """Turns documents into blocks of complete sentences (task `denoise`, one stream "target").

    Args:
        tokenizer: encodes the sentences.
        settings: block size and shares of the splits.
    """

    streams = ("target",)
    task = "denoise"

    def __init__(self, tokenizer: Tokenizer, settings: PrepareSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        special = tokenizer.special
        self._forbidden = frozenset((special.bos, special.pad, special.eos, special.mask))
        self._unk = special.unk
        self._dtype = np.dtype(token_dtype(special.vocab_size))

    def __call__(self, texts: Sequence[str]) -> UnitResult:
        """Blocks of all texts; a block never holds text of two documents."""
        counts: Counter[str] = Counter(documents=len(texts))
        joiner = self._tokenizer.joiner
        documents = [split_sentences(text) for text in texts]
        joined = ((joiner if i else "") + s for document in documents for i, s in enumerate(document))
        encoded = iter(self._tokenizer.encode_batch(list(joined)))
        rows: list[list[int]] = []
        lengths: list[int] = []
        splits: list[str] = []
        for text, document in zip(texts, documents, strict=True):
            kept, kept_rows = self._without_specials(document, encoded, counts)
            head = partial(self._head, kept) if joiner else None
            cut = cut_rows(kept_rows, self._settings.block_tokens, head)
            counts["sentences_cut"] += cut.overlong
            counts["text_bytes"] += len(text.encode())
            rows.extend(kept_rows)
            lengths.extend(cut.lengths)
            splits.extend([split_of(text, self._settings)] * len(cut.lengths))
        values = np.fromiter(chain.from_iterable(rows), self._dtype, sum(lengths))
        counts["unknown_tokens"] += int(np.count_nonzero(values == self._unk))
        return UnitResult(_by_split(Ragged.from_lengths(values, lengths), splits), counts)

    def _without_specials(
        self, sentences: list[str], encoded: Iterator[list[int]], counts: Counter[str]
    ) -> tuple[list[str], list[list[int]]]:
        """Leave out sentences that spell a special symbol: an eos inside a block would mean its end."""
        kept, rows = [], []
        for sentence in sentences:
            row = next(encoded)
            if self._forbidden.isdisjoint(row):
                kept.append(sentence)
                rows.append(row)
        counts["sentences"] += len(kept)
        counts["sentences_with_special_symbols"] += len(sentences) - len(kept)
        return kept, rows

    def _head(self, sentences: list[str], number: int) -> list[int]:
        return self._tokenizer.encode(sentences[number])


def _by_split(blocks: Ragged, splits: list[str]) -> dict[str, dict[str, Ragged]]:
    names = np.array(splits, dtype=str)
    return {
        str(name): {"target": blocks.take(np.flatnonzero(names == name))} for name in dict.fromkeys(splits)
    }
