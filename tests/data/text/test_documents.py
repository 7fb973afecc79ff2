"""Documents of every input format, compressed or not, and the words for unfit input."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pytest
import zstandard

from janus_ds.data.text.documents import DocumentReader, DocumentRule, Position
from janus_ds.data.text.text_files import list_inputs
from janus_ds.errors import DataError
from tests.support.bad_server import serve

PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
}
TEXT = "One.\nTwo two.\n\n\n  \nThree é 日本.\r\n\nFour."
WIKI = (
    '<doc id="1" url="u" title="A &amp; B">\nA &amp; B\n\nFirst &lt;b&gt; line.\nSecond.\n</doc>\n'
    '\n<doc id="2" url="u" title="The "C"">\nThe "C"\n\nThird.\n</doc>\n'
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
    # All that follows a damaged one would be lost.
    for place in (0, 16):
        second = bytearray(PACK[suffix](b"Two."))
        second[place] ^= 255
        write(twice, PACK[suffix](b"One.\n\n") + bytes(second) + PACK[suffix](b"Three."))
        with pytest.raises(DataError, match=r"cut or damaged|cannot be read"):
            read([twice])
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 255
    for data in (packed[: len(packed) // 2], packed[:-3], bytes(damaged), b""):
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


ROWS = [{"text": f'Text {n}, "é" [{{}}].\nLine.', "n": [1, {"a": n}]} for n in range(40)]


@pytest.mark.parametrize("name", ["a.json", "a.txt", "a"])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays_and_objects_over_several_lines(tmp_path, monkeypatch, name, indent):
    """Whatever pieces the file comes in: a value may be cut anywhere."""
    monkeypatch.setattr("janus_ds.data.text.text_files.BUFFER_BYTES", 7)
    texts = [row["text"] for row in ROWS]
    array = write(tmp_path / name, json.dumps(ROWS, indent=indent))
    assert read([array]) == texts
    objects = write(tmp_path / "b" / name, "\n".join(json.dumps(row, indent=2) for row in ROWS))
    assert read([objects]) == texts
    assert read([write(tmp_path / "c" / name, json.dumps(texts, indent=indent))]) == texts
    assert read([write(tmp_path / "d.txt", "[Music]\n\n[1] A note.")]) == ["[Music]", "[1] A note."]


def test_what_a_folder_holds(tmp_path):
    inside = tmp_path / "in"
    for name in ("a.txt", "data/b.txt", ".cache/c.txt", "data/.git/d.txt", "data/.e.txt"):
        write(inside / name, name)
    write(tmp_path / "far" / "f.txt", "far/f.txt")
    (inside / "linked").symlink_to(tmp_path / "far")
    # Their text would come twice.
    (inside / "newest.txt").symlink_to(inside / "a.txt")
    (inside / "same").symlink_to(tmp_path / "far")
    (inside / "data" / "loop").symlink_to(inside)
    (inside / ".dangling").symlink_to(tmp_path / "nowhere")
    assert read([inside]) == ["a.txt", "data/b.txt", "far/f.txt"]
    # Of a disk that is not mounted: without a word, half of the text would be missing.
    (inside / "data" / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="leads to nothing") as caught:
        read([inside])
    assert caught.value.where == str(inside / "data" / "dangling")
    shards = [write(tmp_path / f"part-{n:02}.txt", f"{n}") for n in range(11)]
    assert list_inputs([f"{tmp_path}/part-{{00..10}}.txt"]) == shards
    assert list_inputs([f"{tmp_path}/part-{{10..08}}.txt"]) == shards[:7:-1]
    with pytest.raises(DataError, match=r"part-008\.txt"):
        list_inputs([f"{tmp_path}/part-{{8..010}}.txt"])
    odd = write(tmp_path / "{a,b}.txt", "odd")
    assert list_inputs([odd]) == [odd]
    with pytest.raises(DataError, match="more than"):
        list_inputs([f"{tmp_path}/{{0..9999999999}}.txt"])


@pytest.mark.parametrize("suffix", sorted(PACK))
def test_a_file_in_a_folder_that_is_there_packed_too_is_refused(tmp_path, suffix):
    """As `gunzip -k` leaves it."""
    write(tmp_path / "in" / "a.txt", "Text.")
    packed = write(tmp_path / "in" / f"a.txt{suffix}", PACK[suffix](b"Text."))
    with pytest.raises(DataError, match="compressed and not") as caught:
        read([tmp_path / "in"])
    assert caught.value.where == str(packed)
    assert read([packed, tmp_path / "in" / "a.txt"]) == ["Text.", "Text."]


def test_text_comes_from_servers_and_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("janus_ds.data.stream.remote._FIRST_PAUSE", 0.01)
    folder = tmp_path / "web"
    write(folder / "a.jsonl.gz", gzip.compress(b'{"text": "One."}\n{"text": "Two."}\n'))
    write(folder / "b", lzma.compress(b"Three.\n" * 50_000))
    with serve(folder) as server:
        server.plan["b"] = ["500", "cut"]
        assert read([f"{server.address}/a.jsonl.gz?token=secret"]) == ["One.", "Two."]
        assert read([f"{server.address}/b"], document="line") == ["Three."] * 50_000
        with pytest.raises(DataError, match="HTTP status 404") as caught:
            read([f"{server.address}/none?token=secret"])
    assert "secret" not in str(caught.value)
    assert read([f"pipe:cat {folder}/a.jsonl.gz"]) == ["One.", "Two."]
    assert read([f"pipe:echo {'a' * 300}"]) == ["a" * 300]
    with pytest.raises(DataError, match="status 3"):
        read(["pipe:echo Begun; exit 3"])


def test_a_file_that_changes_while_it_comes_is_not_read_on(tmp_path, monkeypatch):
    """The rest of the new version would follow the beginning of the old one."""
    monkeypatch.setattr("janus_ds.data.stream.remote._FIRST_PAUSE", 0.01)
    write(tmp_path / "a.txt", (b"Old " * 1000 + b"\n") * 2500)
    with serve(tmp_path, plan={"a.txt": ["cut"]}) as server:
        reader = DocumentReader([f"{server.address}/a.txt"], DocumentRule(document="line"))
        lines = reader.read()
        assert next(lines)[0].startswith("Old")
        write(tmp_path / "a.txt", (b"Newer " * 1000 + b"\n") * 2500)
        with pytest.raises(DataError, match="has changed while it came"):
            list(lines)


def test_a_file_that_is_still_being_written_is_told(tmp_path):
    """Such as one that is on its way here."""
    path = write(tmp_path / "a.txt", "One.\n\nTwo.")
    documents = DocumentReader([path], DocumentRule()).read()
    assert next(documents)[0] == "One."
    write(path, "One.\n\nTwo.\n\nThree.")
    with pytest.raises(DataError, match="changed its size") as caught:
        list(documents)
    assert caught.value.where == str(path)


def test_addresses_may_have_any_letters(tmp_path):
    write(tmp_path / "Übung 1" / "ä.txt", "Text.")
    with serve(tmp_path) as server:
        for name in ("Übung 1/ä.txt", "%C3%9Cbung%201/ä.txt"):
            assert read([f"{server.address}/{name}"]) == ["Text."]


def test_a_command_may_be_silent_for_long(monkeypatch):
    waits = {}

    def transferred(location, patience, _):
        waits[location] = patience.stall_seconds
        yield b"Text."

    monkeypatch.setattr("janus_ds.data.text.text_files.transferred", transferred)
    for location in ("pipe:sort -u a.txt", "https://host/a.txt"):
        assert read([location]) == ["Text."]
    assert waits == {"pipe:sort -u a.txt": 3600, "https://host/a.txt": 60}


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
        ("a.json", b'["a",\n"\\udc00b"]', "the text holds half of a surrogate pair", "line 2"),
        ("a.jsonl", b'"a"\n"\\ud800"\n', "the text holds half of a surrogate pair", "line 2"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}', "there is no ]", "line 2"),
        ("a.json", b'[{"text": "a"},\n{"text": nope}]', "not JSON", "value at line 2"),
        ("a.json", b'[{"text": "a"},\n{"text": 5}]', "no text in field 'text'", "line 2"),
        ("a.json", b'{"data": [{"text": "a"}]}', "it has: data", "line 1"),
        ("a.json", b"A text.", "not JSON", "line 1"),
        ("a.json", b'{"text": "' + b"x" * 300_000, "not JSON", "line 1"),
        ("a.json", b"[" * 100_000, "not JSON", "line 1"),
        ("a.txt", b'{"body": "a"}\n{"body": "b"}\n', "it has: body", "line 1"),
        ("a.txt", "﻿Text.".encode("utf-16"), "UTF-16,", "a.txt"),
        ("a.txt", "Text in it.".encode("utf-16-be"), "UTF-16BE", "a.txt"),
        ("a.txt", "Text.".encode("utf-32"), "UTF-32,", "a.txt"),
        ("a.jsonl", b'{"text": null}\n', "no text in field 'text'; it holds null there", "line 1"),
        ("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF file", "a.txt"),
        ("a.txt", b"PK\x03\x04\x14\x00\x06\x00", "a ZIP archive", "a.txt"),
        ("a.txt", b"Fine.\n\x00\x01\xff\n", "no text", "line 2"),
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
    with pytest.raises(DataError, match="does not exist"):
        list_inputs(["a" * 300])
    with pytest.raises(DataError, match="neither a file nor a folder"):
        list_inputs(["/dev/null"])
    with pytest.raises(DataError, match="folder is empty"):
        list_inputs([tmp_path])
    with pytest.raises(DataError, match="no input is given"):
        list_inputs([])


def test_a_folder_inside_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Its text would be missing without a word."""
    write(tmp_path / "in" / "a.txt", "Text.")
    write(tmp_path / "in" / "locked" / "b.txt", "More.")
    real = os.scandir

    def refusing(place):
        if str(place).endswith(("locked", "lost+found")):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    write(tmp_path / "disk" / "lost+found" / "c.txt", "Lost.")
    write(tmp_path / "disk" / "a.txt", "Text.")
    monkeypatch.setattr("os.scandir", refusing)
    assert list_inputs([tmp_path / "disk"]) == [tmp_path / "disk" / "a.txt"]
    with pytest.raises(DataError, match="folder cannot be read") as caught:
        list_inputs([tmp_path / "in"])
    assert caught.value.where == str(tmp_path / "in" / "locked")


def test_texts_without_an_end_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("janus_ds.data.text.documents._LONGEST_DOCUMENT_CHARACTERS", 20)
    monkeypatch.setattr("janus_ds.data.text.text_files.LONGEST_TEXT_BYTES", 64)
    path = write(tmp_path / "a.txt", "Eight c.\n" * 10)
    texts = read([path], document="file")
    assert "\n".join(texts) == ("Eight c.\n" * 10).rstrip()
    assert max(map(len, texts)) <= 30
    with pytest.raises(DataError, match="a line is longer"):
        read([write(path, "x" * 100)])
