"""Parquet files and tars of raw text made by others, whole, cut and hostile."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import resource
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from janus_ds.data.text.documents import Position
from janus_ds.data.text.text_files import list_inputs
from janus_ds.errors import DataError
from tests.data.text.test_documents import read
from tests.support.bad_server import serve
from tests.support.hostile import bounded

TEXTS = [f"Text {n} é.\nLine." for n in range(300)]


def fails(path: Path | str, what: str) -> DataError:
    with pytest.raises(DataError, match=what) as caught:
        read([path])
    assert str(caught.value).count("\n") == 2
    return caught.value


def parquet(path: Path, columns: dict[str, list[str | None]], rows: int = 70) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows)
    return path


def tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_folders_of_the_hub_and_their_columns(tmp_path: Path) -> None:
    """As wikimedia/wikipedia lies there: linked shards, a README beside them."""
    hub, blobs = tmp_path / "wiki", tmp_path / "blobs"
    (hub / "data").mkdir(parents=True)
    (hub / "README.md").write_text("no text")
    for n in range(2):
        part = TEXTS[150 * n : 150 * n + 150]
        titles = [f"T{i}" for i in range(150)]
        blob = parquet(blobs / str(n), {"id": titles, "title": titles, "text": part})
        (hub / "data" / f"train-0000{n}-of-00002.parquet").symlink_to(blob)
    assert read([hub]) == TEXTS
    assert read([hub], field="title")[0] == "T0"
    assert read([hub], Position(1, 100)) == TEXTS[250:]
    assert read([parquet(tmp_path / "a.parquet", {"body": ["One.", None, "Two."]})]) == ["One.", "Two."]
    two = parquet(tmp_path / "b.parquet", {"body": ["a"], "title": ["b"]})
    assert "--field" in fails(two, "of text it has: body, title").fix
    fails(parquet(tmp_path / "c.parquet", {"count": [1, 2]}), "of text it has: none")
    whole = (hub / "data/train-00000-of-00002.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    fails(tmp_path / "cut.parquet", "cut or damaged")
    (tmp_path / "flip.parquet").write_bytes(whole[:40] + bytes(2000) + whole[2040:])
    fails(tmp_path / "flip.parquet", "cut or damaged")
    fails(f"pipe:cat {two}", "from disk only")


@pytest.mark.parametrize("kind", [pa.binary(), pa.list_(pa.string())])
def test_another_column_does_not_stand_in_for_one_that_is_no_text(tmp_path: Path, kind: pa.DataType) -> None:
    """The addresses of pages would have been trained on, and nothing said so."""
    table = pa.table({"text": pa.array([["Text"] if kind == pa.list_(pa.string()) else b"Text"], kind)})
    pq.write_table(table.append_column("url", pa.array(["https://host"])), tmp_path / "a.parquet")
    assert "--field" in fails(tmp_path / "a.parquet", "no column 'text' of text; of text it has: url").fix
    views = pa.table({"text": pa.array(["Text"], pa.string_view()), "url": ["https://host"]})
    pq.write_table(views, tmp_path / "b.parquet")
    assert read([tmp_path / "b.parquet"]) == ["Text"]


def test_webdataset_tars_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("janus_ds.data.stream.remote._FIRST_PAUSE", 0.01)
    txt = {f"{n:06}.txt": text.encode() for n, text in enumerate(TEXTS[:150])}
    both = {f"d/{n:06}.json": json.dumps({"text": text}).encode() for n, text in enumerate(TEXTS[150:])}
    tar(tmp_path / "shard-000.tar", {**txt, "000149.json": b"{}", "000149.jpg": b"\xff\xd8"})
    tar(tmp_path / "shard-001.tar.gz", both, "w:gz")
    with serve(tmp_path) as server:
        server.plan["shard-000.tar"] = ["cut"]
        assert read([f"{server.address}/shard-000.tar", f"{server.address}/shard-001.tar.gz"]) == TEXTS
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = [f"{'é' * 40}/{'d' * 150}/{n}.{form}.txt" for n in range(2)]
        with tarfile.open(tmp_path / "long.tar", "w", format=form) as archive:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = 4
                archive.addfile(entry, io.BytesIO(b"Text"))
        assert read([tmp_path / "long.tar"]) == ["Text", "Text"]
    kept = f"pipe:cat {tmp_path}/shard-000.tar | grep -av '^.{{300,400}}$'"
    assert list_inputs([kept]) == [kept]  # in quotes, it is the command's own
    pattern = f"pipe:cat {tmp_path}/shard-{{000..001}}.tar*"
    assert read([pattern]) == read([f"{tmp_path}/shard-{{000.tar,001.tar.gz}}"]) == TEXTS


def test_zeros_between_streams_of_xz_end_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many: what came behind more than a MiB of them was lost without a word."""
    monkeypatch.setattr("janus_ds.data.text.byte_streams.BUFFER_BYTES", 64)
    one, two = (lzma.compress(text) for text in (b"One.\n\n", b"Two."))
    (tmp_path / "a.txt.xz").write_bytes(one + bytes(400) + two + bytes(400))
    assert read([tmp_path / "a.txt.xz"]) == ["One.", "Two."]


def test_a_command_that_writes_less_at_its_second_try_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it wrote before it failed would stand for all of it."""
    monkeypatch.setattr("janus_ds.data.stream.remote._FIRST_PAUSE", 0.01)
    tried = tmp_path / "tried"
    command = f"if [ -e {tried} ]; then echo Less; else touch {tried}; echo What it has begun; exit 3; fi"
    with pytest.raises(DataError, match="less came than at the try before"):
        read([f"pipe:{command}"])


def test_long_windows_of_zstd(tmp_path: Path) -> None:
    """As `zstd --long=31` writes them: dumps of Reddit, for example."""
    text = "A text of one line."
    # No sum and no size; a window of 2^31 bytes; one block, the last one, of bytes as they are.
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([(31 - 10) << 3]) + (len(text) << 3 | 1).to_bytes(3, "little")
    (tmp_path / "a.txt.zst").write_bytes(frame + text.encode())
    assert read([tmp_path / "a.txt.zst"]) == [text]


def test_a_raw_dump_of_a_wiki_is_not_taken_as_text(tmp_path: Path) -> None:
    path = tmp_path / "enwiki-latest-pages-articles.xml.bz2"
    path.write_bytes(bz2.compress(b'<mediawiki xml:lang="en">\n <page>\n  <title>A</title>\n </page>\n'))
    assert "WikiExtractor" in fails(path, "raw dump of a wiki").fix
    assert len(read([path], format="text")) == 1


@pytest.mark.parametrize("name", ["reviews.csv", "reviews.TSV.gz"])
def test_a_table_is_not_taken_as_text(name: str, tmp_path: Path) -> None:
    path, lines = tmp_path / name, b"text,label\ngood,1\n"
    path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert "Parquet or JSON lines" in fails(path, "a table").fix
    assert read([path], format="text", document="line") == ["text,label", "good,1"]


def record(keyword: bytes, value: bytes) -> bytes:
    """A record of a pax header, preceded by its own length."""
    length = len(keyword) + len(value) + 3
    while len(b"%d" % length) + len(keyword) + len(value) + 3 != length:
        length += 1
    return b"%d %s=%s\n" % (length, keyword, value)


def test_hostile_tars(tmp_path: Path) -> None:
    """Links and devices are no text; bombs and cut files end in words, within bounded memory."""
    odd = tmp_path / "odd.tar"
    with tarfile.open(odd, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            entry = tarfile.TarInfo("a.txt")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        entry = tarfile.TarInfo("../../b.txt")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"Text"))
    assert read([odd]) == ["Text"]
    whole = tar(tmp_path / "a.tar", {"a.txt": b"Text " * 3000, "b.txt": b"Text"}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:9000])
    fails(tmp_path / "cut.tar", "cut or damaged")
    fails(tar(tmp_path / "e.tar", {"a.jsonl": b'{"text": "a"}'}), "no .txt or .json")
    fails(tar(tmp_path / "j.tar", {"a.json": b"[" * 100_000}), "not JSON")
    fails(tar(tmp_path / "u.tar", {"a.txt": b"\xff"}), "not UTF-8")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, kind in {"t": b"0", "l": b"L", "x": b"x"}.items():
        entry = tarfile.TarInfo("big.txt")
        entry.size, entry.type = 1 << 30, kind
        with gzip.open(tmp_path / f"{name}.tar.gz", "wb", 1) as file:
            file.write(entry.tobuf(tarfile.GNU_FORMAT))
            for _ in range(40):
                file.write(bytes(1 << 20))
        fails(tmp_path / f"{name}.tar.gz", "larger than 64 MiB" if kind == b"0" else "a header has")
    # Headers that `tarfile` takes for larger files than a careless reader does, and one that it never ends.
    for number, extra in enumerate(
        [
            [(b"g", record(b"size", b"%d" % (1 << 36)))],
            [(b"X", record(b"size", b"%d" % (1 << 36)))],
            [(b"x", record(b"size", b"%d" % (1 << 36))), (b"x", record(b"comment", b"x"))],
            [(b"x", record(b"comment", b"x\n10 size=5\n") + b"9999 size=5\n")],
            [(b"x", record(b"size", b"1" * 1_000_000))],
            [(b"x", record(b"size", b"-5"))],
        ]
    ):
        blocks = b""
        for kind, records in [*extra, (b"0", b"Text")]:
            entry = tarfile.TarInfo("c.txt")
            entry.size, entry.type = len(records), kind
            blocks += entry.tobuf(tarfile.GNU_FORMAT) + records + bytes(-len(records) % 512)
        (tmp_path / f"p{number}.tar").write_bytes(blocks + bytes(1024))
        with bounded():
            fails(tmp_path / f"p{number}.tar", "cut or damaged")
    sparse = tarfile.TarInfo("s.txt")
    sparse.size, sparse.type = 1 << 36, tarfile.GNUTYPE_SPARSE
    (tmp_path / "s.tar").write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    fails(tmp_path / "s.tar", "sparse")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
