"""Tokenizers made of the text that is prepared: SentencePiece models, lists of words, or given ones."""

from __future__ import annotations

import io
import re
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from janus_ds.data.prepare.blocks import split_of
from janus_ds.data.prepare.settings import PrepareSettings, TextSettings
from janus_ds.data.text.documents import DocumentReader
from janus_ds.data.text.tokenizer import (
    FIRST_WORDS,
    MASK_TEXT,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
)
from janus_ds.errors import DataError
from janus_ds.io import disk_faults

# The share of characters that get into the vocabulary; rarer ones become <unk>.
_CHARACTER_COVERAGE = 0.9999
_CJK = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]")
_CJK_SHARE = 0.05
_LEAST_WITH_BYTES = 1000
# A fixed number: the trainer sums expectations per thread, so another number rounds differently.
_TRAINER_THREADS = 2
_LONGEST_SENTENCE_BYTES = 1 << 16
_MOST_WORDS = 100_000
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
        reader: the input, read once more for training.

    Raises:
        DataError: the input cannot be read or is too small, or a given tokenizer is damaged.
    """
    if folder.is_dir():
        return load_tokenizer(folder)
    if settings.trained_kind is None:
        tokenizer = load_tokenizer(Path(settings.tokenizer))
    else:
        nothing = DataError(
            "the input holds no text outside of the held-out splits",
            ", ".join(file.where for file in reader.files[:3]),
            "give files that hold text, or smaller --valid-share and --test-share",
        )
        lines = _training_lines(reader, settings, progress)
        tokenizer = trained_tokenizer(lines, settings, nothing, progress)
    temporary = work / "tokenizer"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    with disk_faults(folder):
        temporary.rename(folder)
    return tokenizer


def trained_tokenizer(
    lines: Iterable[str], settings: TextSettings, nothing: DataError, progress: Callable[[str], None]
) -> Tokenizer:
    """A SentencePiece model of a sample of the lines; raises `nothing` where there is no text."""
    sample = hash_sample(lines, settings.tokenizer_sample_mb * 1_000_000)
    if not sample:
        raise nothing
    progress("training the tokenizer")
    kind, wanted = settings.trained_kind or "unigram", settings.normalization
    normalization = fitting_normalization(sample) if wanted == "auto" else wanted
    return train_sentencepiece(sample, kind, settings.vocab_size, normalization)


def hash_sample(lines: Iterable[str], limit: int) -> list[str]:
    """At most `limit` characters of the lines, of many lines about half of that or more, in reading order:
    taken by their hash, so that the choice is spread over all of them and depends on no chance."""
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


def fitting_normalization(sample: Sequence[str]) -> str:
    """identity for Chinese, Japanese and Korean, whose full-width signs NFKC rewrites; nfkc for others."""
    cjk = sum(len(_CJK.findall(text)) for text in sample)
    return "identity" if cjk > _CJK_SHARE * sum(map(len, sample)) else "nfkc"


def train_sentencepiece(
    sentences: Iterable[str], kind: str, vocab_size: int, normalization: str = "nfkc"
) -> SentencePieceTokenizer:
    """Train a SentencePiece model; the same sentences in the same order give the same bytes.

    Args:
        sentences: all are used, and held in memory by the trainer: hand over a sample.
        kind: "unigram" or "bpe".
        vocab_size: symbols, the five special ones (bos 0, pad 1, eos 2, unk 3, mask 4) included.
        normalization: identity (text comes back as it was: bytes stand for characters that are in no
            symbol, given at least 1,000 symbols) or nfkc (with white space evened).

    Raises:
        DataError: there is too little text for so many symbols, or none at all.
    """
    from sentencepiece import SentencePieceTrainer

    model, lossless = io.BytesIO(), normalization == "identity"
    in_bytes = lossless and vocab_size >= _LEAST_WITH_BYTES
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=[MASK_TEXT],
            normalization_rule_name="identity" if lossless else "nmt_nfkc",
            remove_extra_whitespaces=not lossless,
            byte_fallback=in_bytes,
            character_coverage=1.0 if lossless and not in_bytes else _CHARACTER_COVERAGE,
            num_threads=_TRAINER_THREADS,
            max_sentence_length=_LONGEST_SENTENCE_BYTES,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, ValueError) as error:
        raise DataError(
            f"a vocabulary of {vocab_size} symbols cannot be trained on this text: {_reason(error)}",
            f"--vocab-size {vocab_size}",
            _remedy(str(error)),
        ) from None
    return SentencePieceTokenizer(model.getvalue())


_TOO_FEW = re.compile(r"required_chars\. \d+ vs (\d+)")
_TOO_MANY = re.compile(r"to a value <= (\d+)")


def _remedy(said: str) -> str:
    """What to do about a fault of SentencePiece's trainer."""
    if found := _TOO_FEW.search(said):
        return f"give --vocab-size {found[1]} or more: each character and special symbol needs one"
    found = _TOO_MANY.search(said)
    return f"give --vocab-size {found[1]} or less, or more text" if found else "give more text"


def _reason(error: Exception) -> str:
    """What SentencePiece says, without the source file and line it puts first."""
    if "sentences_.empty" in str(error):
        return "there is no text"
    if found := _TOO_FEW.search(str(error)):
        return f"it has {found[1]} different characters and special symbols"
    if found := _TOO_MANY.search(str(error)):
        return f"it has {found[1]} different pieces"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return re.sub(r"^.*?\]\s*", "", lines[-1]) if lines else type(error).__name__


def train_words(lines: Iterable[str]) -> WordTokenizer:
    """The dictionary of all words of the lines, the most frequent first.

    Raises:
        DataError: there is no text, or so many words that it cannot have been cut into subwords.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line.split())
    for word in (*FIRST_WORDS, MASK_TEXT):
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
    return WordTokenizer("".join(f"{word}\n" for word in (*FIRST_WORDS, MASK_TEXT, *ordered)).encode())
