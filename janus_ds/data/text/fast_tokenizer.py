"""SentencePiece models and lists of words as the `tokenizer.json` of the package `tokenizers`.

The ids of a text are those of the tokenizer that it was made of, with bos and eos around them. Special
symbols that a text spells are taken for symbols; SentencePiece itself knows `<mask>` only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from janus_ds.data.text.tokenizer import MASK_TEXT, SentencePieceTokenizer

_SPACE = "\u2581"
_UNIGRAM = 1


def sentencepiece_json(tokenizer: SentencePieceTokenizer, special: Mapping[str, int]) -> str:
    """Of a unigram or BPE model.

    Args:
        tokenizer: the model.
        special: special symbols and their ids.
    """
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
