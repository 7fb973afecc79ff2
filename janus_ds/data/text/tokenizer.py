"""Text to token ids and back: SentencePiece (trained here) and BART's byte-level BPE.

A saved tokenizer is a folder with `sentencepiece.model`, or with `vocab.json` and `merges.txt`; no
other file is needed, so a folder from elsewhere works as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from janus_ds.batch import SpecialTokens
from janus_ds.data.text.word_tokenizer import WORDS_NAME, WordTokenizer, save_files, shown_ids
from janus_ds.errors import DataError
from janus_ds.io import fingerprint_of, parse_json, read_bounded

MASK_TEXT = "<mask>"
"""How the mask symbol is written in text."""

SENTENCEPIECE_KINDS = ("unigram", "bpe")

_MODEL_NAME = "sentencepiece.model"

_VOCAB_NAME, _MERGES_NAME = "vocab.json", "merges.txt"

TOKENIZER_FILES = ((_MODEL_NAME,), (WORDS_NAME,), (_VOCAB_NAME, _MERGES_NAME))
"""The files of a saved tokenizer, by kind."""

MOST_TOKENIZER_BYTES = 64 << 20
"""Largest file of a tokenizer that is read, here or from afar."""


_SPECIAL_PIECES = ("<s>", "<pad>", "</s>", "<unk>", MASK_TEXT)

# The share of characters that get into the vocabulary; rarer ones become <unk>.
_CHARACTER_COVERAGE = 0.9999

NORMALIZATIONS = ("identity", "nfkc")

_CJK = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uac00-\ud7af\uff00-\uffef]")
_CJK_SHARE = 0.05

_LEAST_WITH_BYTES = 1000

# A fixed number: the trainer sums expectations per thread, so another number rounds differently.
_TRAINER_THREADS = 2

_LONGEST_SENTENCE_BYTES = 1 << 16

_SPACE_PIECE = "\u2581"


class Tokenizer(Protocol):
    """What the rest of the system knows of a tokenizer."""

    @property
    def special(self) -> SpecialTokens:
        """Ids of the special symbols and the size of the vocabulary."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes that define the tokenizer."""

    @property
    def joiner(self) -> str:
        """What to put before a text that continues another one (" " for byte-level BPE)."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without bos and eos; "<mask>" in it becomes the mask id."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of many texts at once."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: bos, eos and pad are dropped, the mask is shown as "<mask>"."""

    def save(self, directory: Path) -> None:
        """Write the files that :func:`load_tokenizer` reads."""


def structural(special: SpecialTokens) -> frozenset[int]:
    """Symbols that text may spell but a sample must not hold: an eos inside would mean the end."""
    return frozenset((special.bos, special.pad, special.eos, special.mask))


def plain_ids(ids: Sequence[int], special: SpecialTokens) -> list[int]:
    """Tokens of a text without such symbols."""
    dropped = structural(special)
    return [id_ for id_ in ids if id_ not in dropped]


class SentencePieceTokenizer:
    """A SentencePiece model, unigram or BPE, that has a `<mask>` piece.

    Raises:
        DataError: the bytes are no such model, or a special symbol is missing.
    """

    joiner = ""

    def __init__(self, model: bytes, where: str = _MODEL_NAME) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model = model
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"this is not a SentencePiece model ({error})", where, "copy the file again, or train anew"
            ) from None
        self.fingerprint = fingerprint_of(b"sentencepiece", model)
        processor = self._processor
        mask = processor.PieceToId(MASK_TEXT)
        ids = (processor.bos_id(), processor.pad_id(), processor.eos_id(), processor.unk_id(), mask)
        missing = [
            piece
            for piece, id_ in zip(_SPECIAL_PIECES, ids, strict=True)
            if id_ < 0 or (piece == MASK_TEXT and id_ == processor.unk_id())
        ]
        _refuse_missing(missing, where)
        self.special = SpecialTokens(*ids, vocab_size=processor.GetPieceSize())
        self._space = processor.PieceToId(_SPACE_PIECE)

    def encode(self, text: str) -> list[int]:
        """See :meth:`Tokenizer.encode`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :meth:`Tokenizer.encode_batch`."""
        rows: list[list[int]] = self._processor.Encode(list(texts), out_type=int, num_threads=1)
        return [
            self._without_space_before_mask(row) if MASK_TEXT in text else row
            for text, row in zip(texts, rows, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """See :meth:`Tokenizer.decode`."""
        text: str = self._processor.Decode(shown_ids(ids, self.special))
        return _with_space_before_mask(text)

    def save(self, directory: Path) -> None:
        """See :meth:`Tokenizer.save`."""
        save_files(directory, {_MODEL_NAME: self.model})

    def _without_space_before_mask(self, row: list[int]) -> list[int]:
        # In training a mask replaces whole tokens, space included: "the <mask>" has no lone space.
        following = [*row[1:], -1]
        mask, space = self.special.mask, self._space
        return [id_ for id_, after in zip(row, following, strict=True) if id_ != space or after != mask]


class ByteLevelBPE:
    """BART's (GPT-2's) byte-level BPE; ids equal those of Hugging Face's BART tokenizer.

    Args:
        vocab: bytes of `vocab.json`, symbols to ids 0 .. V-1.
        merges: bytes of `merges.txt`.
    """

    joiner = " "

    def __init__(self, vocab: bytes, merges: bytes, where: str = _VOCAB_NAME) -> None:
        self._vocab, self._merges = vocab, merges
        ids, pairs = _read_vocab(vocab, where), _read_merges(merges, where)
        # Of what the files say, not of their bytes: the same tokenizer comes in several spellings.
        symbols = json.dumps(sorted(ids.items(), key=lambda item: item[1]))
        self.fingerprint = fingerprint_of(b"byte-level-bpe", symbols.encode(), json.dumps(pairs).encode())
        _refuse_missing([piece for piece in _SPECIAL_PIECES if piece not in ids], where)
        bos, pad, eos, unk, mask = (ids[piece] for piece in _SPECIAL_PIECES)
        self.special = SpecialTokens(bos, pad, eos, unk, mask, vocab_size=len(ids))
        self._tokenizer = _build_byte_level(ids, pairs, where)

    def encode(self, text: str) -> list[int]:
        """See :meth:`Tokenizer.encode`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :meth:`Tokenizer.encode_batch`."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See :meth:`Tokenizer.decode`."""
        text: str = self._tokenizer.decode(shown_ids(ids, self.special), skip_special_tokens=False)
        return _with_space_before_mask(text)

    def save(self, directory: Path) -> None:
        """See :meth:`Tokenizer.save`."""
        save_files(directory, {_VOCAB_NAME: self._vocab, _MERGES_NAME: self._merges})

    def fast_json(self) -> str:
        """The `tokenizer.json` of the package `tokenizers`, bos and eos around a text included."""
        from tokenizers import processors

        special = self.special
        whole = type(self._tokenizer).from_str(self._tokenizer.to_str())
        whole.post_processor = processors.RobertaProcessing(
            ("</s>", special.eos), ("<s>", special.bos), trim_offsets=True, add_prefix_space=False
        )
        text: str = whole.to_str()
        return text


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer saved in a folder.

    Raises:
        DataError: the folder holds no tokenizer, or its files are damaged.
    """

    def read(path: Path) -> bytes:
        try:
            return read_bounded(path, MOST_TOKENIZER_BYTES)
        except OSError as error:
            what = f"the file cannot be read ({error.strerror})"
            raise DataError(what, str(path), "copy the file again from where it came") from None

    if (directory / _MODEL_NAME).is_file():
        path = directory / _MODEL_NAME
        return SentencePieceTokenizer(read(path), str(path))
    words = directory / WORDS_NAME
    if words.is_file():
        return WordTokenizer(read(words), str(words))
    vocab, merges = directory / _VOCAB_NAME, directory / _MERGES_NAME
    if vocab.is_file() and merges.is_file():
        return ByteLevelBPE(read(vocab), read(merges), str(directory))
    raise DataError(
        "the folder holds no tokenizer",
        str(directory),
        f"give a folder with {_MODEL_NAME}, with {WORDS_NAME}, or with {_VOCAB_NAME} and {_MERGES_NAME}",
    )


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
    import io

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


def _with_space_before_mask(text: str) -> str:
    return re.sub(rf"(?<=\S){re.escape(MASK_TEXT)}", f" {MASK_TEXT}", text)


def _refuse_missing(missing: list[str], where: str) -> None:
    if missing:
        raise DataError(
            f"the tokenizer has no symbol {', '.join(missing)}",
            where,
            "use a tokenizer that has <s>, <pad>, </s>, <unk> and <mask>, or let the tool train one",
        )


def _read_vocab(data: bytes, where: str) -> dict[str, int]:
    fix = "copy the folder again from where it came"
    try:
        ids = parse_json(data)
    except ValueError as error:
        raise DataError(f"{_VOCAB_NAME} is cut or is not JSON ({error})", where, fix) from None
    numbers: list[Any] = list(ids.values()) if isinstance(ids, dict) else [None]
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
        raise DataError(f"{_VOCAB_NAME} does not map symbols to the ids 0, 1, 2, ...", where, fix)
    return ids


def _read_merges(data: bytes, where: str) -> list[tuple[str, str]]:
    fix = "copy the folder again from where it came"
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{_MERGES_NAME} is damaged: it is not UTF-8", where, fix) from None
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2:
            what = f"{_MERGES_NAME} is damaged: merge {number} is not two symbols"
            raise DataError(what, where, fix)
    return [(left, right) for left, right in pairs]


def _build_byte_level(ids: dict[str, int], merges: list[tuple[str, str]], where: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    try:
        model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>")
    except Exception as error:  # `tokenizers` raises plain Exception
        raise DataError(
            f"{_MERGES_NAME} does not fit {_VOCAB_NAME} ({error})", where, "take both files from one model"
        ) from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As in Hugging Face's BART: the mask takes the space before it, the others do not.
    tokenizer.add_special_tokens(
        [AddedToken(piece, lstrip=piece == MASK_TEXT, normalized=False) for piece in _SPECIAL_PIECES]
    )
    return tokenizer
