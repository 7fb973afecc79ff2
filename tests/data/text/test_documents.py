"""Documents of every input format, compressed or not, and the words for unfit input."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest
import zstandard

from janus_ds.data.text.documents import DocumentReader, DocumentRule, Position
from janus_ds.data.text.text_files import list_inputs
from janus_ds.errors import DataError

PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
}
TEXT = "One.\nTwo two.\n\n\n  \nThree é 日本.\r\n\nFour."
WIKI = (
    '<doc id="1" url="u" title="A &amp; B">\nA &amp; B\n\nFirst &lt;b&gt; line.\nSecond.\n</doc>\n'
    '\n<doc id="2" url="u" title="C">\nC\n\nThird.\n</doc>\n'
)


def read(paths: list[Path], start: Position | None = None, **rule: str) -> list[str]:
    reader = DocumentReader(list_inputs(paths), DocumentRule(**rule))
    return [text for text, _ in reader.read(start or Position())]


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_text_is_cut_by_blank_lines_lines_or_files(tmp_path):
    path = write(tmp_path / "a.txt", "\ufeff" + TEXT)
    assert read([path]) == ["One.\nTwo two.", "Three é 日本.", "Four."]
    assert read([path], document="line") == ["One.", "Two two.", "Three é 日本.", "Four."]
    assert read([path], document="file") == ["One.\nTwo two.\nThree é 日本.\nFour."]


@pytest.mark.parametrize("suffix", sorted(PACK))
def test_compressed_files_read_the_same_and_cuts_are_found(tmp_path, suffix):
    text = "\n\n".join(f"Document {n} of many." for n in range(20_000))
    packed = PACK[suffix](text.encode())
    path = write(tmp_path / f"a.txt{suffix}", packed)
    assert read([path]) == text.split("\n\n")
    twice = write(tmp_path / f"b.txt{suffix}", PACK[suffix](b"One.\n\n") + PACK[suffix](b"Two."))
    assert read([twice]) == ["One.", "Two."]
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 255
    for data in (packed[: len(packed) // 2], packed[:-3], bytes(damaged)):
        write(path, data)
        with pytest.raises(DataError) as caught:
            read([path])
        assert str(path) in caught.value.where


def test_jsonl_and_wiki_are_recognised(tmp_path):
    lines = [json.dumps({"text": "Öne.\nTwo."}), "", json.dumps({"text": "  "}), '{"text": "Three."}']
    named = write(tmp_path / "in" / "a.jsonl", "\n".join(lines))
    unnamed = write(tmp_path / "in" / "b", "\n".join(lines))
    wiki = write(tmp_path / "in" / "AA" / "wiki_00", WIKI)
    write(tmp_path / "in" / ".hidden", "no")
    assert list_inputs([tmp_path / "in"]) == [wiki, named, unnamed]
    expected = ["First <b> line.\nSecond.", "Third.", "Öne.\nTwo.", "Three.", "Öne.\nTwo.", "Three."]
    assert read([tmp_path / "in"]) == expected
    assert read([write(tmp_path / "c.jsonl", '{"body": "B."}')], field="body") == ["B."]
    assert read([write(tmp_path / "d.txt", "{ a text }\n{more}")]) == ["{ a text }\n{more}"]


def test_reading_goes_on_from_any_position(tmp_path):
    paths = [write(tmp_path / f"{n}.txt", TEXT) for n in range(3)]
    write(paths[1], "\n\n")
    reader = DocumentReader(paths, DocumentRule())
    read_all = list(reader.read())
    assert [text for text, _ in read_all] == ["One.\nTwo two.", "Three é 日本.", "Four."] * 2
    assert reader.bytes_read == reader.total_bytes
    for number, (_, position) in enumerate(read_all):
        assert read(paths, position) == [text for text, _ in read_all[number + 1 :]]


@pytest.mark.parametrize(
    ("name", "data", "what", "where"),
    [
        ("a.txt", b"Fine.\n\nNot f\xefne.\n", "not UTF-8: byte 0xef", "line 3, byte 12"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "not JSON", "line 2"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "no text in field 'text'; it has: body, id", "line 1"),
        ("a.jsonl", b'["a"]\n', "no text in field", "line 1"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate", "line 1"),
        ("wiki_00", WIKI[:-8].encode(), "no </doc>", "document begun at line 8"),
        ("wiki_00", (WIKI + "stray\n").encode(), "outside of <doc>", "line 13"),
    ],
)
def test_unfit_files_are_told_by_line(tmp_path, name, data, what, where):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        read([path])
    assert what in caught.value.what
    assert where in caught.value.where
    assert str(path) in caught.value.where


def test_inputs_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list_inputs([tmp_path / "no.txt"])
    with pytest.raises(DataError, match="folder is empty"):
        list_inputs([tmp_path])
    with pytest.raises(DataError, match="no input is given"):
        list_inputs([])


def test_texts_without_an_end_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("janus_ds.data.text.documents._LONGEST_DOCUMENT_CHARACTERS", 20)
    monkeypatch.setattr("janus_ds.data.text.text_files._LONGEST_LINE_BYTES", 64)
    path = write(tmp_path / "a.txt", "Eight c.\n" * 10)
    texts = read([path], document="file")
    assert "\n".join(texts) == ("Eight c.\n" * 10).rstrip()
    assert max(map(len, texts)) <= 30
    with pytest.raises(DataError, match="a line is longer"):
        read([write(path, "x" * 100)])
