"""Tokenizers as Hugging Face stores them: BART's in and out, all other kinds out.

Folders from the hub hold `vocab.json` and `merges.txt`; newer versions of transformers write
`tokenizer.json` alone. What we write holds both, so that any version reads the same ids. Of SentencePiece
models and lists of words, a `tokenizer.json` gives the ids of our own tokenizer, with bos and eos around
them; special symbols that a text spells are taken for symbols, where SentencePiece knows `<mask>` only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from janus_ds.data.text.tokenizer import (
    MASK_TEXT,
    MOST_TOKENIZER_BYTES,
    TOKENIZER_FILES,
    ByteLevelBPE,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    refuse_unlike_bart,
)
from janus_ds.errors import DataError
from janus_ds.io import read_json, write_atomic

_FAST, _CONFIG = "tokenizer.json", "tokenizer_config.json"

_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": MASK_TEXT,
}


def read_hf_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None where it has none.

    Raises:
        DataError: its files are damaged, or it is not BART's kind of tokenizer.
    """
    if any(all((folder / name).is_file() for name in names) for names in TOKENIZER_FILES):
        return load_tokenizer(folder)
    path = folder / _FAST
    if not path.is_file():
        return None
    try:
        values = read_json(path, MOST_TOKENIZER_BYTES)
        model, added = values["model"], values.get("added_tokens") or []
        _refuse_other_kinds(values, added, str(path))
        vocab = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the tokenizer cannot be read ({type(error).__name__}: {error})"
        raise DataError(what, str(path), "copy the file again") from None
    text = "#version: 0.2\n" + "\n".join(merges) + "\n"
    return ByteLevelBPE(json.dumps(vocab, ensure_ascii=False).encode(), text.encode(), str(folder))


def write_hf_tokenizer(tokenizer: Any, folder: Path, longest: int) -> None:
    """Write what `AutoTokenizer.from_pretrained` reads.

    Args:
        tokenizer: the run's; one of words has them as `words`.
        folder: exists already.
        longest: positions of the model's table.
    """
    special, roles = tokenizer.special, dict(_ROLES)
    ids = {"<s>": special.bos, "<pad>": special.pad, "</s>": special.eos, "<unk>": special.unk}
    if special.mask == special.unk:
        del roles["mask_token"]
    else:
        ids[MASK_TEXT] = special.mask
    kind: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if isinstance(tokenizer, ByteLevelBPE):
        tokenizer.save(folder)
        fast = tokenizer.fast_json()
        kind = {"tokenizer_class": "BartTokenizer", "add_prefix_space": False, "trim_offsets": True}
        kind["errors"] = "replace"
    elif isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder)
        fast = sentencepiece_json(tokenizer, ids)
    else:
        fast = words_json(tokenizer.words, ids)
    write_atomic(folder / _FAST, fast.encode())
    added = {str(id_): _added_token(piece) for piece, id_ in ids.items()}
    config = {**kind, "model_max_length": longest, "added_tokens_decoder": added, **roles}
    write_atomic(folder / _CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def _added_token(piece: str) -> dict[str, Any]:
    # The mask takes the space before it.
    flags = {"lstrip": piece == MASK_TEXT, "normalized": False, "rstrip": False, "single_word": False}
    return {"content": piece, **flags, "special": True}


def _refuse_other_kinds(values: dict[str, Any], added: list[dict[str, Any]], where: str) -> None:
    pieces = [values.get("pre_tokenizer") or {}]
    kind = (values["model"].get("type"), pieces[0].get("type"), pieces[0].get("add_prefix_space", False))
    other = kind != ("BPE", "ByteLevel", False) or bool(values.get("normalizer"))
    refuse_unlike_bart(other, [token["content"] for token in added], where)


_SPACE = "\u2581"
_UNIGRAM = 1


def sentencepiece_json(tokenizer: SentencePieceTokenizer, special: Mapping[str, int]) -> str:
    """Of a unigram or BPE model."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    messages: Any = sentencepiece_model_pb2
    proto = messages.ModelProto.FromString(tokenizer.model)
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    in_bytes = proto.trainer_spec.byte_fallback
    if proto.trainer_spec.model_type == _UNIGRAM:
        model: Any = models.Unigram(scores, unk_id=tokenizer.special.unk, byte_fallback=in_bytes)
    else:
        ids = {piece: id_ for id_, (piece, _) in enumerate(scores)}
        model = models.BPE(
            ids, _merges(ids, dict(scores)), unk_token="<unk>", fuse_unk=True, byte_fallback=in_bytes
        )
    charsmap = proto.normalizer_spec.precompiled_charsmap
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), " ")]
    fast = _assembled(model, special)
    fast.normalizer = normalizers.Sequence(steps)
    fast.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first")
    space = decoders.Metaspace(_SPACE, prepend_scheme="always")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), space]) if in_bytes else space
    return str(fast.to_str())


def words_json(words: Sequence[str], special: Mapping[str, int]) -> str:
    """Of words between spaces, the marks "@@ " of subword-nmt joined again in decoded text."""
    from tokenizers import Regex, decoders, models, pre_tokenizers

    fast = _assembled(models.WordLevel({word: id_ for id_, word in enumerate(words)}, "<unk>"), special)
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # A prefix that no word has: a space goes before every word.
    spaced = decoders.WordPiece(prefix="\n", cleanup=False)
    joined = decoders.Replace(Regex("@@( |$)"), "")
    fast.decoder = decoders.Sequence([spaced, decoders.Fuse(), joined])
    return str(fast.to_str())


def _assembled(model: Any, special: Mapping[str, int]) -> Any:
    from tokenizers import AddedToken, Tokenizer, processors

    fast = Tokenizer(model)
    fast.add_special_tokens(
        [AddedToken(piece, lstrip=piece == MASK_TEXT, normalized=False) for piece in special]
    )
    pairs = [(piece, special[piece]) for piece in ("<s>", "</s>")]
    fast.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", pairs)
    return fast


def _merges(ids: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges of a BPE model, whose pieces have them as scores: the earliest is the highest."""
    found = []
    for piece in sorted(ids, key=lambda piece: -scores[piece]):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(left, right) for left, right in halves if left in ids and right in ids]
        found += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found
