"""Tokenizers: ids, masks, round trips, fingerprints, and their faults."""

# ruff: noqa: RUF001

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Fast

from janus_ds.data.prepare.train_tokenizer import fitting_normalization, train_sentencepiece
from janus_ds.data.text.hf_tokenizer import read_hf_tokenizer, sentencepiece_json
from janus_ds.data.text.tokenizer import ByteLevelBPE, SentencePieceTokenizer, load_tokenizer
from janus_ds.errors import DataError
from tests.support.texts import documents

TEXTS = documents(60)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request) -> SentencePieceTokenizer:
    return train_sentencepiece(TEXTS, request.param, 90)


def small_byte_level() -> dict[str, bytes]:
    """A byte-level BPE of five specials, letters, and three merges."""
    symbols = ["<s>", "<pad>", "</s>", "<unk>", *"helowrd.ĠĊ", "he", "ll", "Ġw", "<mask>"]
    vocab = json.dumps({symbol: number for number, symbol in enumerate(symbols)}).encode()
    return {"vocab.json": vocab, "merges.txt": "#version: 0.2\nh e\nl l\nĠ w\n".encode()}


def test_sentencepiece_ids_masks_and_round_trip(trained):
    special = trained.special
    assert (special.bos, special.pad, special.eos, special.unk, special.mask) == (0, 1, 2, 3, 4)
    assert special.vocab_size == 90
    rows = trained.encode_batch(TEXTS)
    assert rows[3] == trained.encode(TEXTS[3])
    assert max(map(max, rows)) < 90
    assert min(map(min, rows)) > 4
    assert trained.decode([0, *rows[3], 2, 1, 1]) == " ".join(TEXTS[3].split())
    masked = "Bada <mask> ko<mask>la. <mask>"
    ids = trained.encode(masked)
    assert ids.count(4) == 3
    # A mask stands for whole tokens, space included: no lone space is left before it.
    assert ids[: ids.index(4)] == trained.encode("Bada")
    assert trained.encode("<mask>ba <mask>") == [4, *trained.encode("<mask>ba")[1:], 4]
    assert trained.encode(trained.decode(ids)) == ids
    assert trained.encode("") == []
    assert trained.decode([]) == ""
    assert 3 in trained.encode("日")


def test_sentencepiece_training_is_a_function_of_the_text(trained, tmp_path):
    again = [train_sentencepiece(TEXTS, kind, 90).fingerprint for kind in ("unigram", "bpe")]
    assert again.count(trained.fingerprint) == 1
    trained.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == trained.fingerprint
    assert loaded.special == trained.special
    assert loaded.encode(TEXTS[0]) == trained.encode(TEXTS[0])


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("added_tokens.json", {"<ent>": 18, "<mask>": 17}, "symbols of its own: <ent>"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"18": {"content": "<ent>"}}}, "its own: <ent>"),
        ("tokenizer_config.json", {"add_prefix_space": True}, "without a space before the text"),
    ],
)
def test_a_byte_level_bpe_of_which_more_lies_beside_is_refused(tmp_path, name, values, words):
    """By its two files alone, the same text would have other ids than it had in training."""
    for file, data in small_byte_level().items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / name).write_text(json.dumps(values))
    for read in (load_tokenizer, read_hf_tokenizer):
        with pytest.raises(DataError, match=words):
            read(tmp_path)
    plain = {"add_prefix_space": False, "added_tokens_decoder": {"17": {"content": "<mask>"}}}
    (tmp_path / name).write_text(json.dumps(plain if "config" in name else {"<mask>": 17}))
    assert load_tokenizer(tmp_path).special.vocab_size == 18


def test_byte_level_ids_and_masks(tmp_path):
    for name, data in small_byte_level().items():
        (tmp_path / name).write_bytes(data)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, ByteLevelBPE)
    assert (tokenizer.special.bos, tokenizer.special.mask, tokenizer.special.vocab_size) == (0, 17, 18)
    assert tokenizer.encode("hello world.") == [14, 15, 7, 16, 7, 9, 6, 10, 11]
    # The mask takes the space before it, as in Hugging Face's BART.
    assert tokenizer.encode("he <mask> he") == [14, 17, 12, 14]
    assert tokenizer.decode([0, 14, 15, 7, 17, 2, 1]) == "hello <mask>"
    assert tokenizer.encode(tokenizer.decode([14, 17, 17, 12, 14])) == [14, 17, 17, 12, 14]
    tokenizer.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == tokenizer.fingerprint


def test_windows_line_ends_of_merges_are_the_same_tokenizer():
    vocab, merges = small_byte_level().values()
    own, other = ByteLevelBPE(vocab, merges), ByteLevelBPE(vocab, merges.replace(b"\n", b"\r\n"))
    assert own.fingerprint == other.fingerprint
    assert own.encode("hello who") == other.encode("hello who")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab.json": b'{"a": 0'}, "vocab.json is cut"),
        ({"vocab.json": b'{"<s>": 0, "b": 2}'}, "ids 0, 1, 2"),
        ({"vocab.json": b'{"<s>": 0, "b": 1}'}, "no symbol <pad>, </s>, <unk>, <mask>"),
        ({"merges.txt": b"h e\nl l l\n"}, "merge 2 is not two symbols"),
        ({"merges.txt": b"\xff\xfe"}, "merges.txt is damaged: it is not UTF-8"),
        ({"merges.txt": b"q z\n"}, "merges.txt does not fit vocab.json"),
    ],
)
def test_damaged_byte_level_files_are_named(tmp_path, change, said):
    for name, data in {**small_byte_level(), **change}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert said in caught.value.what
    assert str(tmp_path) in caught.value.where


def test_other_faults_say_what_to_do(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "RUN/tokenizer" in caught.value.fix
    (tmp_path / "sentencepiece.model").write_bytes(b"no model at all")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match=r"vocabulary of 4000 symbols .* different pieces"):
        train_sentencepiece(TEXTS[:3], "unigram", 4000)
    with pytest.raises(DataError, match="there is no text"):
        train_sentencepiece([], "bpe", 90)
    for size, advice in ((9, "or more"), (4000, "or less")):
        with pytest.raises(DataError) as caught:
            train_sentencepiece(TEXTS[:3], "unigram", size)
        named = int(caught.value.fix.split()[2])
        assert advice in caught.value.fix
        assert train_sentencepiece(TEXTS[:3], "unigram", named).special.vocab_size == named


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("size", [120, 600])
def test_identity_gives_text_back_as_it_was(kind: str, size: int, monkeypatch) -> None:
    """Full-width signs, ligatures, spaces; with enough symbols characters that were never seen, too."""
    monkeypatch.setattr("janus_ds.data.prepare.train_tokenizer._LEAST_WITH_BYTES", 500)
    known = ["你好，世界！价格：５元，对吗？", "Wait… ½ cup № 5 ﬁne ™ x²  don’t ", *TEXTS[:20]]
    assert fitting_normalization(known[:1] + TEXTS) == "nfkc"
    assert fitting_normalization(known[:2]) == "identity"
    words = [f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmn" for c in "opqrst"] if size > 500 else []
    tokenizer = train_sentencepiece([*known, *words], kind, size, "identity")
    unseen = ["龍が飛ぶ。", "Ж\U0001f600"] if size > 500 else []
    for text in known + unseen:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    fast = Fast.from_str(sentencepiece_json(tokenizer, {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}))
    for text in known + unseen:
        assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
