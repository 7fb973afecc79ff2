"""The parallel part of a preparation: texts in, packed blocks of each split out."""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from janus_ds.data.masking.ragged import Ragged
from janus_ds.data.prepare.settings import PrepareSettings
from janus_ds.data.stream.shards import token_dtype
from janus_ds.data.text.documents import DocumentReader, Position
from janus_ds.data.text.sentences import cut_rows, split_sentences
from janus_ds.data.text.tokenizer import Tokenizer, load_tokenizer, structural, train_sentencepiece
from janus_ds.errors import DataError
from janus_ds.io import disk_faults


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
        self._forbidden = structural(special)
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


_LONGEST_PIECE_CHARACTERS = 8192


def ensure_tokenizer(
    folder: Path,
    work: Path,
    settings: PrepareSettings,
    reader: DocumentReader,
    progress: Callable[[str], None],
) -> Tokenizer:
    """The tokenizer saved in `folder`; made first where it is not yet there.

    Args:
        folder: OUT/tokenizer; appears whole or not at all.
        work: a folder for the unfinished one.
        settings: names the tokenizer.
        reader: the input, read once more for training.
        progress: called with the stage along the way.

    Raises:
        DataError: the input cannot be read or is too small, or a given tokenizer is damaged.
    """
    if folder.is_dir():
        return load_tokenizer(folder)
    if settings.trained_kind is None:
        tokenizer = load_tokenizer(Path(settings.tokenizer))
    else:
        training = _training_lines(reader, settings, progress)
        lines = hash_sample(training, settings.tokenizer_sample_mb * 1_000_000)
        if not lines:
            raise DataError(
                "the input holds no text outside of the held-out splits",
                ", ".join(file.where for file in reader.files[:3]),
                "give files that hold text, or smaller --valid-share and --test-share",
            )
        progress("training the tokenizer")
        tokenizer = train_sentencepiece(
            lines, settings.trained_kind, settings.vocab_size, settings.normalization_of(lines)
        )
    temporary = work / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    with disk_faults(folder):
        temporary.rename(folder)
    return tokenizer


def hash_sample(lines: Iterable[str], limit: int) -> list[str]:
    """At most `limit` characters of the lines, and at least half of that where there are as many, in reading
    order: taken by their hash, so that the choice is spread over all of them and depends on no chance."""
    kept: list[tuple[int, str]] = []
    size, threshold = 0, 1 << 32
    for line in lines:
        draw = zlib.crc32(line.encode())
        if draw >= threshold:
            continue
        kept.append((draw, line))
        size += len(line)
        while size > limit and threshold:
            threshold //= 2
            fewer = [(draw, line) for draw, line in kept if draw < threshold]
            # Nothing is left only where the text is one line over and over.
            kept = fewer or kept[:1]
            size = sum(len(line) for _, line in kept)
    return [line for _, line in kept]


def _training_lines(
    reader: DocumentReader, settings: PrepareSettings, progress: Callable[[str], None]
) -> Iterator[str]:
    for text, _ in reader.read():
        progress("reading text for the tokenizer")
        if split_of(text, settings) != "train":
            continue
        for line in text.split("\n"):
            for start in range(0, len(line), _LONGEST_PIECE_CHARACTERS):
                yield line[start : start + _LONGEST_PIECE_CHARACTERS]
