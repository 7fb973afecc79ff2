"""The tokenizer of a data directory: loaded from a folder, or trained on a sample of the input."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from janus_ds.data.documents import DocumentReader
from janus_ds.data.prepare_settings import PrepareSettings
from janus_ds.data.prepare_units import split_of
from janus_ds.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from janus_ds.errors import DataError
from janus_ds.io import disk_faults

__all__ = ["ensure_tokenizer", "hash_sample", "sample_lines"]

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
        lines = sample_lines(reader, settings, settings.tokenizer_sample_mb * 1_000_000, progress)
        if not lines:
            raise DataError(
                "the input holds no text outside of the held-out splits",
                ", ".join(str(path) for path in reader.files[:3]),
                "give files that hold text, or smaller --valid-share and --test-share",
            )
        progress("training the tokenizer")
        tokenizer = train_sentencepiece(lines, settings.trained_kind, settings.vocab_size)
    temporary = work / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    with disk_faults(folder):
        temporary.rename(folder)
    return tokenizer


def sample_lines(
    reader: DocumentReader,
    settings: PrepareSettings,
    limit: int,
    progress: Callable[[str], None],
) -> list[str]:
    """Lines of the training documents, at most `limit` characters of them, in reading order.

    Lines are taken by their hash, so the choice is spread over the whole input and does not depend
    on chance; at least half of `limit` is used where there is enough text.
    """
    return hash_sample(_training_lines(reader, settings, progress), limit)


def hash_sample(lines: Iterable[str], limit: int) -> list[str]:
    """At most `limit` characters of the lines, taken by their hash, in reading order."""
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
