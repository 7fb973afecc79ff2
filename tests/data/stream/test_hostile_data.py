"""Data that lies: an accepted file or a three-part error, within bounds of memory, disk and time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from janus_ds.data.prepare.corpus import Journal, Progress, prepare
from janus_ds.data.prepare.pair_files import held_out_text, side_limit
from janus_ds.data.prepare.settings import PrepareSettings
from janus_ds.data.stream import index as index_module
from janus_ds.data.stream.index import Manifest, SplitIndex
from janus_ds.data.stream.loader import StepLoader
from janus_ds.data.stream.pipeline import BatchMaker
from janus_ds.data.stream.sample_order import RankShare
from janus_ds.data.stream.source import SampleSource
from janus_ds.data.stream.verify import verify_dataset
from janus_ds.data.text.documents import DocumentReader, DocumentRule
from janus_ds.data.text.text_files import TextFile
from janus_ds.data.text.tokenizer import load_tokenizer
from janus_ds.errors import DamagedDataError, DataError
from janus_ds.io import sha256_of_file
from tests.support.hostile import ODD, PATHS, TRAPS, attacks, bounded, mutated, note, taken_or_refused
from tests.support.packed_data import run_config

MB = 1 << 20


def rewrite(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest or index changed by somebody who knows how its checksum is made."""
    body = json.loads(source.read_bytes())
    del body["checksum"]
    change(body)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**body, "checksum": index_module._checksum(body)}))


def replace_inside(path: list[int], odd: Any, body: dict[str, Any]) -> None:
    new = mutated(body, path, odd)
    body.clear()
    body.update(new if isinstance(new, dict) else {"value": new})


@pytest.mark.parametrize(
    "name", ["../secret.tar", "/etc/hostname", "a/b.tar", "", "x\0.tar", ".hidden", 7, None]
)
def test_names_that_leave_the_folder_are_refused(tiny, tmp_path, name):
    def shard(body: dict[str, Any]) -> None:
        body["shards"][0]["name"] = name

    rewrite(tiny / "train" / "index.json", tmp_path / "index.json", shard)
    with pytest.raises(DataError, match="missing or odd"):
        SplitIndex.load(tmp_path)


def test_the_language_of_raw_text_is_a_name(tiny, tmp_path):
    (tmp_path / "raw").mkdir()
    for languages in ({"source": "../../x", "target": "en"}, {"source": 1, "target": 2}, [], "de", {}):
        rewrite(
            tiny / "manifest.json",
            tmp_path / "manifest.json",
            lambda body, value=languages: body["settings"].update(languages=value),
        )
        with pytest.raises(DataError, match="no translation data"):
            held_out_text(tmp_path, "test")
    assert side_limit({"request": []}, "source") is None
    assert side_limit({"request": {"settings": {"limits": {"source": "5"}}}}, "source") is None
    assert side_limit({"request": {"prepared": []}}, "source") is None


@pytest.mark.parametrize("kind", [Manifest, SplitIndex])
@attacks(250)
@given(path=PATHS, odd=ODD)
def test_mutated_files_are_accepted_or_refused_in_words(tiny, tmp_path, kind, path, odd):
    name = "manifest.json" if kind is Manifest else "train/index.json"

    target = tmp_path / Path(name).name
    rewrite(tiny / name, target, partial(replace_inside, path, odd))
    with taken_or_refused():
        kind.load(tmp_path)


@attacks(100)
@given(path=PATHS, odd=ODD)
def test_a_mutated_journal_starts_anew_or_goes_on(tmp_path_factory, path, odd):
    folder = tmp_path_factory.mktemp("journal")
    with Journal(folder, {}) as journal:
        journal.commit(Progress())
        file = folder / ".prepare" / "state.json"
        file.write_text(json.dumps(mutated(json.loads(file.read_text()), path, odd)))
        with taken_or_refused():
            assert isinstance(journal.load(), Progress)


def test_json_of_many_values_is_refused_before_it_is_read(tmp_path):
    """A file of empty lists takes 25 times its size."""
    body = "[" + "[]," * 4_500_000 + "[]]"
    for name, kind in (("manifest.json", Manifest), ("vocab.json", None)):
        (tmp_path / name).write_text(f'{{"a": {body}}}')
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        with bounded(), pytest.raises(DataError, match="more than"):
            kind.load(tmp_path) if kind else load_tokenizer(tmp_path)
    for name in ("a.jsonl", "a.json"):
        (tmp_path / name).write_text(f'{{"a": {body}}}\n')
        with bounded(), pytest.raises(DataError, match="more than"):
            list(DocumentReader([tmp_path / name], DocumentRule()).read())


@pytest.mark.parametrize("text", TRAPS)
def test_files_of_another_shape_are_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    (tmp_path / "vocab.json").write_text(text)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError):
        Manifest.load(tmp_path)
    with pytest.raises(DataError):
        load_tokenizer(tmp_path)


def test_ids_of_a_vocabulary_are_numbers(tmp_path):
    symbols = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    for odd in ("4", 4.0, 900, -1, True):
        (tmp_path / "vocab.json").write_text(
            json.dumps({**dict(zip(symbols, range(5), strict=True)), "<mask>": odd})
        )
        with pytest.raises(DataError, match="does not map symbols"):
            load_tokenizer(tmp_path)


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder"])
def test_what_is_no_regular_file_is_not_read(copy, kind):
    def replace_by_device(path: Path) -> None:
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "zero":
            path.symlink_to("/dev/zero")
        else:
            path.mkdir()

    shard = copy / "train" / "shard-000000.tar"
    replace_by_device(shard)
    report = verify_dataset(copy)
    assert [fault.place for fault in report.faults] == [f"train/{shard.name}"]
    with pytest.raises(DamagedDataError, match=f"{shard.name}, member 000000"):
        SampleSource(copy / "train").read([0])
    replace_by_device(copy / "manifest.json")
    with pytest.raises(DataError):
        Manifest.load(copy)


def test_a_file_beyond_the_bound_is_refused_and_not_read_whole(tmp_path):
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="larger than"), bounded(300 * MB):
        Manifest.load(tmp_path)


def test_a_zstd_bomb_takes_bounded_memory(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "zeros.txt.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(bytes(1 << 30)))
    assert path.stat().st_size < 200_000
    with pytest.raises(DataError, match="a line is longer than 64 MiB"), bounded(300 * MB):
        list(TextFile(path).lines())


@pytest.mark.parametrize("fault", [errno.EIO, errno.ESTALE])
def test_a_failing_disk_names_the_shard_and_the_quarantine_works(copy, monkeypatch, fault):
    pread, failing = os.pread, {"left": 10**9}

    def broken(descriptor: int, size: int, offset: int) -> bytes:
        if failing["left"] and offset < 2048:  # the first member of each shard
            failing["left"] -= 1
            raise OSError(fault, os.strerror(fault))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(DamagedDataError, match=r"shard-000000\.tar, member 000000") as caught:
        SampleSource(copy / "train").read([0])
    assert "cannot be read" in caught.value.what
    source = SampleSource(copy / "train", max_damage=0.5)
    replaced = source.replace_damaged([0])
    assert replaced[0] != 0
    assert [damage.member for damage in source.take_damage()] == ["000000"]
    assert len(source.read(replaced)["target"]) == 1
    # Once, as a stale handle: opened again, nothing is lost.
    failing["left"] = 1
    assert len(SampleSource(copy / "train").read([0])["target"]) == 1


def test_an_input_that_is_a_fifo_is_refused(tmp_path):
    os.mkfifo(tmp_path / "in.txt")
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        prepare([tmp_path / "in.txt"], tmp_path / "out", PrepareSettings())


@attacks(60)
@given(path=PATHS, odd=ODD)
def test_training_on_a_mutated_index_goes_on_or_is_refused(tiny, tmp_path_factory, path, odd):
    folder = tmp_path_factory.mktemp("mutated")
    for shard in (tiny / "train").glob("*.tar"):
        (folder / shard.name).symlink_to(shard)

    rewrite(tiny / "train" / "index.json", folder / "index.json", partial(replace_inside, path, odd))
    with taken_or_refused():
        maker = BatchMaker(folder, run_config(), load_tokenizer(tiny / "tokenizer").special)
        assert [len(step.sample_ids) for step in StepLoader(maker, RankShare(0, 1, 4), 0, 2)] == [12, 12]


def test_links_and_devices_in_a_shard_are_never_made(copy):
    shard = copy / "train" / "shard-000000.tar"
    with tarfile.open(shard, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"../evil-{kind.decode()}")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)

    def believe(body: dict[str, Any]) -> None:
        body["shards"][0].update(size=shard.stat().st_size, sha256=sha256_of_file(shard))

    rewrite(copy / "train" / "index.json", copy / "train" / "index.json", believe)
    before = set(copy.parent.rglob("*"))
    assert [fault.place for fault in verify_dataset(copy).faults]
    assert len(SampleSource(copy / "train").read([0])["target"]) == 1
    note("names that write outside the folder", 4, len(set(copy.parent.rglob("*")) - before))
    assert set(copy.parent.rglob("*")) == before
