"""Our tokenizers against transformers': equal ids on any text, exact round trips."""

from __future__ import annotations

import lzma
import os
import random
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from janus_ds.batch import SpecialTokens
from janus_ds.data.prepare.train_tokenizer import train_sentencepiece, train_words
from janus_ds.data.text.hf_tokenizer import read_hf_tokenizer, write_hf_tokenizer
from janus_ds.data.text.tokenizer import ByteLevelBPE, load_tokenizer
from janus_ds.decode.text import FairseqWords
from tests.support.hf_models import letters_tokenizer
from tests.support.programs import ROOT

transformers = pytest.importorskip("transformers")

ASSETS = ROOT / "janus_ds/assets"
SHARED = os.environ.get("JANUS_SHARED_DATA")
REAL = pytest.mark.skipif(
    SHARED is None, reason="JANUS_SHARED_DATA is not set: BART's vocabulary is not here"
)
FILES = (
    "wikitext-2/wiki.test.raw",
    "multi30k/train.de.xz",
    "debian_ro-en/all.ro.xz",
    "squadqg/du2017.test.src.xz",
    "personachat/convai2.valid_both_original_no_cands.txt",
    "xsum/pairs.jsonl.xz",
    "pretrain_novels_en/files.tsv",
)
LINES_OF_A_FILE = 1500
SPECIAL = [
    "<mask>",
    "a <mask> b",
    "a<mask>b",
    "  <mask>  <mask>",
    "<s> no </s> end",
    "</s></s><pad>",
    "<unk> word",
    "< mask >",
    "<MASK>",
    "x<s>y <pad>z",
    "the[SEP] of [X_SEP] it",
]
ODD = [
    "",
    " ",
    "  two  spaces  ",
    "tab\tand\r\nlines\n\n",
    "\u00a0\u3000\u200b",
    "naïve Ångström \ufb01 ß İ",
    "日本語のテキスト",
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "don't I'll we've THEY'RE 'tis",
    "12345 6,789.00 ½ ²",
    "\x00\x01\x7f",
    "e\u0301 é",
    "a" * 300,
]
SCRIPTS = ((32, 127), (0xA0, 0x3000), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF))


def lines_of(path: Path) -> Iterator[str]:
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8", newline="") as file:
        for number, line in enumerate(file):
            if number % 7 == 0:
                yield line.rstrip("\n")[:3000]
            if number > 7 * LINES_OF_A_FILE:
                return


@cache
def pair() -> tuple[ByteLevelBPE, Any]:
    """Our tokenizer, and transformers' of the same files, its mask taking the space before it."""
    folder = Path(SHARED or "") / "bart_tokenizer"
    ours = load_tokenizer(folder)
    assert isinstance(ours, ByteLevelBPE)
    mask = transformers.AddedToken("<mask>", lstrip=True, special=True)
    return ours, transformers.BartTokenizerFast.from_pretrained(folder, mask_token=mask)


def differing(ours: ByteLevelBPE, theirs: Any, texts: list[str]) -> list[str]:
    expected = theirs(texts, add_special_tokens=False)["input_ids"]
    return [text for text, a, b in zip(texts, ours.encode_batch(texts), expected, strict=True) if a != b]


@REAL
def test_ids_and_round_trips_on_real_text() -> None:
    ours, theirs = pair()
    figures = []
    for name in FILES:
        path = Path(SHARED or "") / name
        texts = [text for text in lines_of(path) if "<" not in text]
        assert not differing(ours, theirs, texts), name
        ids = ours.encode_batch(texts)
        assert [ours.decode(row) for row in ids] == texts, name
        figures.append(f"{name}: {len(texts)} lines, {sum(map(len, ids))} ids")
    print("\n" + "\n".join(figures))


@REAL
def test_ids_of_special_symbols_odd_and_random_text() -> None:
    ours, theirs = pair()
    rng = random.Random(5)
    wild = ["".join(chr(rng.randrange(*rng.choice(SCRIPTS))) for _ in range(40)) for _ in range(300)]
    assert not differing(ours, theirs, [*SPECIAL, *ODD, *wild])
    plain = [text for text in (*ODD, *wild) if "<" not in text]
    assert [ours.decode(ours.encode(text)) for text in plain] == plain
    assert any(unicodedata.category(c) == "Cn" for text in wild for c in text)
    assert theirs(SPECIAL[1])["input_ids"] == [0, *ours.encode(SPECIAL[1]), 2]
    assert (
        theirs.decode(ours.encode("Hello <mask> world."), skip_special_tokens=False) == "Hello<mask> world."
    )


@pytest.mark.parametrize("forget", [(), ("vocab.json", "merges.txt"), ("tokenizer.json",)])
def test_what_we_write_is_read_by_transformers(tmp_path: Path, forget: tuple[str, ...]) -> None:
    ours = load_tokenizer(letters_tokenizer(tmp_path / "letters", 120))
    assert isinstance(ours, ByteLevelBPE)
    folder = tmp_path / "written"
    folder.mkdir()
    write_hf_tokenizer(ours, folder, 128)
    (folder / "config.json").write_text('{"model_type": "bart"}')
    for name in forget:
        (folder / name).unlink()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["abc <mask> de", "zz.\nab", "<s>ab</s>", "a<mask>b <mask>"]
    assert not differing(ours, theirs, texts)
    assert theirs(texts[0])["input_ids"] == [0, *ours.encode(texts[0]), 2]
    assert (theirs.mask_token_id, theirs.pad_token_id, theirs.model_max_length) == (119, 1, 128)


def test_what_transformers_writes_is_read_by_us(tmp_path: Path) -> None:
    letters = letters_tokenizer(tmp_path / "letters", 120)
    theirs = transformers.BartTokenizerFast.from_pretrained(letters)
    theirs.save_pretrained(tmp_path / "saved")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "saved" / name).unlink(missing_ok=True)
    ours = read_hf_tokenizer(tmp_path / "saved")
    assert isinstance(ours, ByteLevelBPE)
    assert ours.special == load_tokenizer(letters).special
    assert not differing(ours, theirs, ["abc dd ef.", "zz.\nab"])


@pytest.mark.parametrize("kind", ["demo", "unigram", "bpe", "words", "dict"])
def test_every_kind_of_tokenizer_is_written_for_transformers(tmp_path: Path, kind: str) -> None:
    corpus = lzma.decompress((ASSETS / "corpus/novels.txt.xz").read_bytes()).decode().split("\n")
    lines = [line for line in corpus[:3000] if line.strip()]
    if kind == "dict":
        (tmp_path / "dict.txt").write_text("the 9\nlo@@ 5\nwer 3\n")
        ours: Any = FairseqWords(tmp_path / "dict.txt", SpecialTokens(0, 1, 2, 3, 3, 7))
    elif kind == "words":
        ours = train_words(lines)
    else:
        trained = kind != "demo"
        ours = train_sentencepiece(lines, kind, 800) if trained else load_tokenizer(ASSETS / "demo/tokenizer")
    (tmp_path / "config.json").write_text('{"model_type": "bart"}')
    write_hf_tokenizer(ours, tmp_path, 9999)
    if kind in ("demo", "unigram", "bpe"):
        back = read_hf_tokenizer(tmp_path)
        assert back is not None
        assert back.fingerprint == ours.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # Symbols that a text spells are symbols there; `<mask>` is one in SentencePiece as well.
    odd = [text for text in (*SPECIAL, *ODD) if "<" not in text]
    masks = ["<mask> house", "the <mask> <mask>.", "a<mask>b"] if kind in ("demo", "unigram", "bpe") else []
    texts = ["the lo@@ wer", "lo@@", "  two  spaces ", "日本語 Ünï ﬁ ½ 😀😀", *odd, *masks, *lines[:300]]
    rows = [ours.encode(text) for text in texts]
    assert theirs(texts)["input_ids"] == [[0, *row, 2] for row in rows]
    shown = [row for row in rows if not {ours.special.unk, ours.special.mask} & set(row)]
    assert theirs.batch_decode(shown) == [ours.decode(row) for row in shown]
    assert len(shown) >= (2 if kind == "dict" else 100)
