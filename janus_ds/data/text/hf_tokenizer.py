"""Tokenizers as Hugging Face stores them: BART's in and out, all other kinds out.

Folders from the hub hold `vocab.json` and `merges.txt`; newer versions of transformers write
`tokenizer.json` alone. What we write holds both, so that any version reads the same ids.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from janus_ds.data.text.fast_tokenizer import sentencepiece_json, words_json
from janus_ds.data.text.tokenizer import (
    MASK_TEXT,
    MOST_TOKENIZER_BYTES,
    ByteLevelBPE,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from janus_ds.errors import DataError
from janus_ds.io import read_json, write_atomic

_FAST, _CONFIG, _VOCAB, _MERGES = "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"

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
    if (folder / _VOCAB).is_file() and (folder / _MERGES).is_file():
        return load_tokenizer(folder)
    path = folder / _FAST
    if not path.is_file():
        return None
    try:
        values = read_json(path, MOST_TOKENIZER_BYTES)
        model, added = values["model"], values.get("added_tokens") or []
        vocab = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"the tokenizer cannot be read ({type(error).__name__}: {error})"
        raise DataError(what, str(path), "copy the file again") from None
    _refuse_other_kinds(values, added, str(path))
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
    if kind != ("BPE", "ByteLevel", False) or values.get("normalizer"):
        raise DataError(
            "the tokenizer is not BART's byte-level BPE without a space before the text",
            where,
            "give BART's own tokenizer files",
        )
    unknown = [token["content"] for token in added if token["content"] not in _ROLES.values()]
    if unknown:
        raise DataError(
            f"the tokenizer has added symbols of its own: {', '.join(unknown[:5])}",
            where,
            "give a tokenizer with no more than <s>, <pad>, </s>, <unk> and <mask>",
        )
