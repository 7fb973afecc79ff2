"""From parallel text to shards: what is kept, counted and refused."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from janus_ds.data.prepare.pair_files import PairFiles, pair_up
from janus_ds.data.prepare.pairs import prepare_pairs
from janus_ds.data.prepare.settings import Languages, PairSettings
from janus_ds.data.prepare.train_tokenizer import train_words
from janus_ds.data.stream.index import Manifest
from janus_ds.data.stream.source import SampleSource
from janus_ds.data.text.tokenizer import WordTokenizer, load_tokenizer
from janus_ds.errors import ConfigError, DataError, UsageError
from tests.support.tiny_pairs import make_tiny_pairs, tiny_lines

DE_EN = Languages("de", "en")
SETTINGS = PairSettings(DE_EN, vocab_size=60, max_tokens=40)


def write(folder: Path, name: str, pairs: list[tuple[str, str]]) -> list[PairFiles]:
    files = PairFiles(folder / f"{name}.de", folder / f"{name}.en")
    files.source.write_text("".join(f"{a}\n" for a, _ in pairs), encoding="utf-8")
    files.target.write_text("".join(f"{b}\n" for _, b in pairs), encoding="utf-8")
    return [files]


def texts(data: Path, split: str) -> list[tuple[str, str]]:
    """What the shards of a split say."""
    tokenizer = load_tokenizer(data / "tokenizer")
    source = SampleSource(data / split)
    rows = source.read(np.arange(source.samples))
    return [
        (tokenizer.decode(rows["source"].row(i)), tokenizer.decode(rows["target"].row(i)))
        for i in range(source.samples)
    ]


def test_pairs_stay_together_and_training_is_mixed_held_out_is_not(tmp_path):
    files = make_tiny_pairs(tmp_path / "text")
    settings = replace(SETTINGS, duplicates="keep")
    report = prepare_pairs(files, tmp_path / "data", settings)
    lines = tiny_lines(200, 0)
    found = texts(tmp_path / "data", "train")
    assert sorted(found) == sorted(lines)
    assert found != lines
    assert texts(tmp_path / "data", "valid") == tiny_lines(24, 1)
    assert (tmp_path / "data/raw/test.en").read_text() == files["test"][0].target.read_text()
    manifest = Manifest.load(tmp_path / "data")
    assert manifest.task == "pair"
    assert manifest.settings["languages"] == {"source": "de", "target": "en"}
    assert report.counts["train"]["kept"] == manifest.splits["train"].samples == 200
    # The same call again has nothing to do, other settings are refused.
    assert prepare_pairs(files, tmp_path / "data", settings).already_whole
    with pytest.raises(DataError, match="other settings"):
        prepare_pairs(files, tmp_path / "data", SETTINGS)


def test_cleaning_is_counted_and_leaves_held_out_text_alone(tmp_path):
    good = tiny_lines(100)
    bad = [
        ("", "nothing ."),
        ("nichts .", "  "),
        ("eins", "one " * 30),
        good[3],
        ("so lang " * 30, "so " * 50),
    ]
    train = write(tmp_path, "train", [*dict.fromkeys(good), *bad])
    held_out = write(tmp_path, "test", [good[0], ("", "empty source"), ("zu lang " * 30, "too long " * 30)])
    report = prepare_pairs({"train": train, "test": held_out}, tmp_path / "data", SETTINGS)
    counts, unique = report.counts["train"], len(dict.fromkeys(good))
    assert counts["lines"] == unique + 5
    assert (counts["empty"], counts["too_unequal"], counts["duplicates"], counts["too_long"]) == (2, 1, 1, 1)
    assert counts["kept"] == unique
    assert counts["also_held_out"] == 1
    test = report.counts["test"]
    assert (test["lines"], test["kept"], test["empty"], test["too_long"]) == (3, 1, 1, 1)
    assert (tmp_path / "data/raw/test.en").read_text().splitlines() == [
        good[0][1],
        "empty source",
        ("too long " * 30).strip(),
    ]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("我们今天下午要去图书馆看书", "This afternoon we are going to the library to read some books ."),
        (
            "私たちは今日の午後、図書館に本を読みに行きます。",
            "We are going to the library today to read .",
        ),
        ("บ่ายวันนี้เราจะไปอ่านหนังสือที่ห้องสมุด", "This afternoon we are going to read books at the library ."),
    ],
)
def test_scripts_without_spaces_are_as_long_as_their_translations(tmp_path, source, target):
    other = source[:2], target
    report = prepare_pairs(
        {"train": write(tmp_path, "train", [*tiny_lines(100), (source, target), (target, source), other])},
        tmp_path / "data",
        replace(SETTINGS, vocab_size=300, tokenizer="bpe-words"),
    )
    assert report.counts["train"]["too_unequal"] == 1


def test_compressed_files_and_processes_give_the_same_bytes(tmp_path):
    plain = make_tiny_pairs(tmp_path / "text")["train"]
    zipped = PairFiles(tmp_path / "train.de.xz", tmp_path / "train.en.gz")
    zipped.source.write_bytes(lzma.compress(plain[0].source.read_bytes()))
    zipped.target.write_bytes(gzip.compress(plain[0].target.read_bytes()))
    prepare_pairs({"train": plain}, tmp_path / "a", SETTINGS)
    prepare_pairs({"train": [zipped]}, tmp_path / "b", SETTINGS, processes=2)
    for name in ("train/shard-000000.tar", "train/index.json", "tokenizer/sentencepiece.model"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet", "translation", "named"])
def test_records_give_the_bytes_of_two_files(tmp_path, kind):
    rows = [{"de": source, "en": target} for source, target in tiny_lines(60, 0)]
    path, given = tmp_path / f"train.{kind}", (None, None)
    if kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        if kind == "translation":
            rows = [{"id": 1, "translation": row} for row in rows]
        if kind == "named":
            rows, given = [{"doc": row["de"], "sum": row["en"]} for row in rows], ("doc", "sum")
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = pair_up([path], DE_EN, "--train", given)
    prepare_pairs({"train": files}, tmp_path / "records", SETTINGS)
    prepare_pairs({"train": write(tmp_path, "train", tiny_lines(60, 0))}, tmp_path / "lines", SETTINGS)
    shards = [(tmp_path / name / "train" / "shard-000000.tar").read_bytes() for name in ("records", "lines")]
    assert shards[0] == shards[1]


def test_records_without_a_side_are_refused_by_place(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"de": "a", "en": "b"}\n{"de": "a", "fr": "b"}\n')
    with pytest.raises(
        DataError, match="no text in field 'en' or 'target' or 'tgt'; it has: de, fr"
    ) as caught:
        list(pair_up([path], DE_EN, "--train")[0].read())
    assert "line 2" in caught.value.where
    assert "--target-field" in caught.value.fix
    (tmp_path / "a.de").write_text("a\n")
    with pytest.raises(UsageError, match="only records have fields"):
        pair_up([tmp_path / "a.de"] * 2, DE_EN, "--train", ("doc", None))


def test_a_side_may_lie_in_a_field_called_translation(tmp_path):
    """Which, where it is text, does not hold both sides."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "Ein Hund.", "translation": "A dog."}\n')
    (files,) = pair_up([path], DE_EN, "--train", ("text", "translation"))
    assert list(files.read()) == [("Ein Hund.", "A dog.")]


@pytest.mark.parametrize("value", [b"Ein Hund.", date(2026, 1, 1), Decimal("1.5")])
def test_what_a_column_holds_instead_of_text_is_told(tmp_path, value):
    path = tmp_path / "train.parquet"
    pq.write_table(pa.table({"de": [value], "en": ["A dog."]}), path)
    with pytest.raises(DataError, match="no text in field 'de'") as caught:
        list(pair_up([path], DE_EN, "--train")[0].read())
    assert repr(value)[:9] in caught.value.what


def test_lower_case(tmp_path):
    pairs = [(a.title(), b.upper()) for a, b in tiny_lines(120)]
    files = {"train": write(tmp_path, "train", pairs), "valid": write(tmp_path, "valid", pairs[:5])}
    prepare_pairs(files, tmp_path / "data", replace(SETTINGS, lowercase=True))
    assert texts(tmp_path / "data", "valid") == [(a.lower(), b.lower()) for a, b in pairs[:5]]
    assert (tmp_path / "data/raw/valid.en").read_text().splitlines()[0] == pairs[0][1]
    assert Manifest.load(tmp_path / "data").settings["lowercase"] is True


def test_text_in_subwords_is_taken_as_it_is(tmp_path):
    pairs = [("ein fl@@ uss &apos;s .", "a riv@@ er &apos;s ."), ("zwei flü@@ sse", "two riv@@ ers")]
    files = {"train": write(tmp_path, "train", pairs)}
    prepare_pairs(files, tmp_path / "data", replace(SETTINGS, tokenizer="bpe-words"))
    tokenizer = load_tokenizer(tmp_path / "data/tokenizer")
    assert isinstance(tokenizer, WordTokenizer)
    assert sorted(texts(tmp_path / "data", "train")) == [
        ("ein fluss &apos;s .", "a river &apos;s ."),
        ("zwei flüsse", "two rivers"),
    ]
    assert tokenizer.special.vocab_size == 5 + len(
        {w for pair in pairs for side in pair for w in side.split()}
    )
    assert tokenizer.encode("a <mask> unheard .")[1:3] == [4, 3]
    given = replace(SETTINGS, tokenizer=str(tmp_path / "data/tokenizer"))
    prepare_pairs(files, tmp_path / "again", given)
    assert Manifest.load(tmp_path / "again").tokenizer_fingerprint == tokenizer.fingerprint


def test_words_that_are_no_subwords_are_refused():
    with pytest.raises(DataError, match="100,001 different words") as error:
        train_words(f"word{i}" for i in range(100_001))
    assert "subword-nmt" in error.value.fix
    with pytest.raises(DataError, match="no text"):
        train_words(["<unk> <s>"])
    with pytest.raises(DataError, match="list of different words"):
        WordTokenizer(b"<s>\n<pad>\nword\n")


@pytest.mark.parametrize(
    ("source", "target", "what", "where", "fix"),
    [
        (b"a\n", b"a\n\n\nb\n", "different numbers of lines: 1 and 4", "x.en", "empty lines count"),
        (b"", b"", "hold no line", "x.de", "hold text"),
        (b"a\nf\xfcr\n", b"a\nb\n", "not UTF-8", "x.de, line 2", "iconv"),
        (b"a\nb\n", b"a\n" + b"wort " * 10_000 + b"\n", "10,000 words", "x.en, line 2", "line ends"),
    ],
)
def test_unfit_files_are_refused(tmp_path, source, target, what, where, fix):
    files = PairFiles(tmp_path / "x.de", tmp_path / "x.en")
    files.source.write_bytes(source)
    files.target.write_bytes(target)
    with pytest.raises(DataError) as error:
        list(files.read())
    assert what in error.value.what
    assert where in error.value.where
    assert fix in error.value.fix


def test_files_in_the_wrong_order_or_number_are_refused(tmp_path):
    de, en, other = (tmp_path / name for name in ("train.de.gz", "train.en", "train.txt"))
    for path in (de, en, other):
        path.write_text("x\n")
    assert pair_up([de, en, other, other], DE_EN, "--train")[1] == PairFiles(other, other)
    with pytest.raises(UsageError, match=r"another order: train\.en stands for de") as error:
        pair_up([en, de], DE_EN, "--train")
    assert "exchange --source-lang and --target-lang" in error.value.fix
    with pytest.raises(UsageError, match="one of them is missing"):
        pair_up([de, en, de], DE_EN, "--train")
    with pytest.raises(DataError, match="does not exist"):
        pair_up([de, tmp_path / "no.en"], DE_EN, "--train")
    os.mkfifo(tmp_path / "pipe.en")
    for there in (tmp_path / "pipe.en", tmp_path):
        with pytest.raises(DataError, match="is no regular file"):
            pair_up([de, there], DE_EN, "--train")


def test_settings_that_cannot_be_meant_and_data_that_is_not_there(tmp_path):
    files = {"train": write(tmp_path, "train", [("", "a"), ("b", "")])}
    settings = PairSettings(Languages("de", "de"), vocab_size=2, max_ratio=0.5)
    with pytest.raises(
        ConfigError, match=r"--vocab-size .*; --max-ratio .*; source and target language are both"
    ):
        prepare_pairs(files, tmp_path / "data", settings)
    with pytest.raises(DataError, match="no tokenizer of this name"):
        prepare_pairs(files, tmp_path / "data", replace(SETTINGS, tokenizer="bpe"))
    with pytest.raises(DataError, match="no pair is left"):
        prepare_pairs(files, tmp_path / "data", SETTINGS)
    assert not (tmp_path / "data").exists()
    assert not list(tmp_path.glob(".data*"))


def test_columns_that_are_there_are_told(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"german": ["Ein Hund."], "english": ["A dog."]}), path)
    with pytest.raises(DataError, match="it has: english, german"):
        list(pair_up([path], DE_EN, "--train")[0].read())
