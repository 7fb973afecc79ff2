"""Text to token ids and back: SentencePiece, BART's byte-level BPE, and words.

A saved tokenizer is a folder with `sentencepiece.model`, with `vocab.json` and `merges.txt`, or with
`words.txt`; no other file is needed, so a folder from elsewhere works as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_ds.batch import SpecialTokens
from janus_ds.errors import DataError
from janus_ds.io import (
    fingerprint_of,
    make_folder,
    mapping,
    parse_json,
    read_bounded,
    read_json,
    write_atomic,
)

MASK_TEXT = "<mask>"
"""How the mask symbol is written in text."""


_MODEL_NAME, WORDS_NAME = "sentencepiece.model", "words.txt"

_VOCAB_NAME, _MERGES_NAME = "vocab.json", "merges.txt"

TOKENIZER_FILES = ((_MODEL_NAME,), (WORDS_NAME,), (_VOCAB_NAME, _MERGES_NAME))
"""The files of a saved tokenizer, by kind."""

MOST_TOKENIZER_BYTES = 64 << 20
"""Largest file of a tokenizer that is read, here or from afar."""


FIRST_WORDS = ("<s>", "<pad>", "</s>", "<unk>")
_SPECIAL_PIECES = (*FIRST_WORDS, MASK_TEXT)
_JOIN = "@@ "


_SPACE_PIECE = "\u2581"


class Tokenizer:
    """What the rest of the system knows of a tokenizer.

    Attributes:
        special: ids of the special symbols and the size of the vocabulary.
        fingerprint: SHA-256 over the bytes that define the tokenizer.
        files: what :func:`load_tokenizer` reads, by name.
        joiner: what to put before a text that continues another one (" " for byte-level BPE).
    """

    special: SpecialTokens
    fingerprint: str
    files: Mapping[str, bytes]
    joiner = ""

    def encode(self, text: str) -> list[int]:
        """Ids of a text without bos and eos; "<mask>" in it becomes the mask id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of many texts at once."""
        raise NotImplementedError

    def glued(self, ids: list[int]) -> list[int]:
        """Ids of a text that another one precedes with nothing between them, of those that it has alone."""
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids: bos, eos and pad are dropped, the mask is shown as "<mask>"."""
        dropped = (self.special.bos, self.special.pad, self.special.eos)
        return self._text([int(id_) for id_ in ids if int(id_) not in dropped])

    def _text(self, ids: list[int]) -> str:
        raise NotImplementedError

    def save(self, directory: Path) -> None:
        """Write the files that :func:`load_tokenizer` reads."""
        make_folder(directory)
        for name, data in self.files.items():
            write_atomic(directory / name, data)


def structural(special: SpecialTokens) -> frozenset[int]:
    """Symbols that text may spell but a sample must not hold: an eos inside would mean the end."""
    return frozenset((special.bos, special.pad, special.eos, special.mask))


def plain_ids(ids: Sequence[int], special: SpecialTokens) -> list[int]:
    """Tokens of a text without such symbols."""
    dropped = structural(special)
    return [id_ for id_ in ids if id_ not in dropped]


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, unigram or BPE, that has a `<mask>` piece.

    Raises:
        DataError: the bytes are no such model, or a special symbol is missing.
    """

    def __init__(self, model: bytes, where: str = _MODEL_NAME) -> None:
        from sentencepiece import SentencePieceProcessor

        self.model, self.files = model, {_MODEL_NAME: model}
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

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        rows: list[list[int]] = self._processor.Encode(list(texts), out_type=int, num_threads=1)
        return [
            self._without_space_before_mask(row) if MASK_TEXT in text else row
            for text, row in zip(texts, rows, strict=True)
        ]

    def glued(self, ids: list[int]) -> list[int]:
        first = self._processor.IdToPiece(ids[0]) if ids else ""
        rest = self._processor.PieceToId(first.removeprefix(_SPACE_PIECE))
        if first == _SPACE_PIECE:
            return ids[1:]
        return ids if rest == self.special.unk else [rest, *ids[1:]]

    def _text(self, ids: list[int]) -> str:
        return _with_space_before_mask(self._processor.Decode(ids))

    def _without_space_before_mask(self, row: list[int]) -> list[int]:
        # In training a mask replaces whole tokens, space included: "the <mask>" has no lone space.
        following = [*row[1:], -1]
        mask, space = self.special.mask, self._space
        return [id_ for id_, after in zip(row, following, strict=True) if id_ != space or after != mask]


class ByteLevelBPE(Tokenizer):
    """BART's (GPT-2's) byte-level BPE; ids equal those of Hugging Face's BART tokenizer.

    Args:
        vocab: bytes of `vocab.json`, symbols to ids 0 .. V-1.
        merges: bytes of `merges.txt`.
    """

    joiner = " "

    def __init__(self, vocab: bytes, merges: bytes, where: str = _VOCAB_NAME) -> None:
        self.files = {_VOCAB_NAME: vocab, _MERGES_NAME: merges}
        ids, pairs = _read_vocab(vocab, where), _read_merges(merges, where)
        # Of what the files say, not of their bytes: the same tokenizer comes in several spellings.
        symbols = json.dumps(sorted(ids.items(), key=lambda item: item[1]))
        self.fingerprint = fingerprint_of(b"byte-level-bpe", symbols.encode(), json.dumps(pairs).encode())
        _refuse_missing([piece for piece in _SPECIAL_PIECES if piece not in ids], where)
        bos, pad, eos, unk, mask = (ids[piece] for piece in _SPECIAL_PIECES)
        self.special = SpecialTokens(bos, pad, eos, unk, mask, vocab_size=len(ids))
        self._tokenizer = _build_byte_level(ids, pairs, where)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _text(self, ids: list[int]) -> str:
        return _with_space_before_mask(self._tokenizer.decode(ids, skip_special_tokens=False))

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


class Words(Tokenizer):
    """Words between spaces, numbered by a list, special symbols included; unknown ones become unk.

    For text that has been cut into subwords already ("@@ " of subword-nmt), which decoding joins.
    """

    def __init__(self, words: list[str], special: SpecialTokens) -> None:
        self.words, self.special = words, special
        self._ids = {word: number for number, word in enumerate(words)} | {MASK_TEXT: special.mask}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        unk = self.special.unk
        return [[self._ids.get(word, unk) for word in text.split()] for text in texts]

    def _text(self, ids: list[int]) -> str:
        return f"{' '.join(self.words[id_] for id_ in ids)} ".replace(_JOIN, "").rstrip()


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
        if tuple(words[:5]) != _SPECIAL_PIECES or len(set(words)) != len(words):
            raise DataError(
                "this is not a list of different words that begins with the special symbols",
                where,
                "copy the file again, or prepare the data again",
            )
        super().__init__(words, SpecialTokens(0, 1, 2, 3, 4, vocab_size=len(words)))
        self.files = {WORDS_NAME: data}
        self.fingerprint = fingerprint_of(b"words", data)


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
        _refuse_extended(directory)
        return ByteLevelBPE(read(vocab), read(merges), str(directory))
    raise DataError(
        "the folder holds no tokenizer",
        str(directory),
        f"give a folder with {_MODEL_NAME}, with {WORDS_NAME}, or with {_VOCAB_NAME} and {_MERGES_NAME}; "
        "that of a run is RUN/tokenizer",
    )


def _refuse_extended(directory: Path) -> None:
    """Refuse a byte-level BPE of which transformers keeps more beside its two files."""

    def beside(name: str) -> dict[str, Any]:
        try:
            return read_json(directory / name, MOST_TOKENIZER_BYTES)
        except (OSError, ValueError):
            return {}

    config = beside("tokenizer_config.json")
    listed = mapping(config.get("added_tokens_decoder")).values()
    added = [*beside("added_tokens.json"), *(str(mapping(token).get("content")) for token in listed)]
    refuse_unlike_bart(config.get("add_prefix_space") is True, added, str(directory))


def refuse_unlike_bart(other: bool, added: Iterable[str], where: str) -> None:
    """Refuse a tokenizer of another kind, or one with added symbols, at which a text is cut before all else.

    Raises:
        DataError: it is such a tokenizer, whose ids would be others here.
    """
    own = [token for token in dict.fromkeys(added) if token not in _SPECIAL_PIECES]
    if other or own:
        what = "is not BART's byte-level BPE without a space before the text"
        what = what if other else f"has added symbols of its own: {', '.join(own[:5])}"
        fix = "give BART's own tokenizer files, with no more than <s>, <pad>, </s>, <unk> and <mask> added"
        raise DataError(f"the tokenizer {what}", where, fix)


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
        lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")
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
