"""Preparation: equal bytes for any number of processes, blocks that hold the text, faults, resumption."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import lzma
import os
import signal
import threading
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from janus_ds.data.prepare.blocks import encode_blocks, split_sentences
from janus_ds.data.prepare.corpus import prepare, prepare_bundled_corpus
from janus_ds.data.prepare.settings import PrepareSettings
from janus_ds.data.prepare.writing import ordered_map
from janus_ds.data.stream.index import Manifest, SplitIndex
from janus_ds.data.stream.shards import ShardReader
from janus_ds.data.stream.verify import verify_dataset
from janus_ds.data.text.documents import DocumentRule
from janus_ds.data.text.tokenizer import ByteLevelBPE, load_tokenizer
from janus_ds.errors import BusyError, ConfigError, DataError, ResourceError
from tests.data.text.test_tokenizer import small_byte_level
from tests.support.texts import documents

SETTINGS = PrepareSettings(
    vocab_size=90, block_tokens=24, valid_share=0.1, test_share=0.1, samples_per_member=4, members_per_shard=8
)
DOCUMENTS = documents(200)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    return path


@pytest.fixture(scope="module")
def whole(text_file, tmp_path_factory) -> Path:
    """An uninterrupted preparation by one process, in one unit."""
    output = tmp_path_factory.mktemp("data") / "out"
    prepare([text_file], output, SETTINGS)
    return output


def content(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def blocks(directory: Path, split: str) -> list[list[int]]:
    index = SplitIndex.load(directory / split)
    reader = ShardReader(directory / split, index)
    places = [(s, m) for s, shard in enumerate(index.shards) for m in range(len(shard.members))]
    return [row.tolist() for s, m in places for row in reader.read_member(s, m)["target"].rows()]


def test_blocks_hold_all_text_in_order_and_splits_are_by_document(whole):
    tokenizer = load_tokenizer(whole / "tokenizer")
    manifest = Manifest.load(whole)
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    assert manifest.splits.keys() == {"train", "valid", "test"}
    found = {}
    for split, totals in manifest.splits.items():
        rows = blocks(whole, split)
        assert (len(rows), sum(map(len, rows))) == (totals.samples, totals.tokens)
        assert max(map(len, rows)) <= 24
        found[split] = " ".join(tokenizer.decode(row) for row in rows).replace(" ", "")
    texts = {document: "".join(document.split()) for document in DOCUMENTS}
    held = {split: [d for d, text in texts.items() if text in found[split]] for split in found}
    assert sorted(chain.from_iterable(held.values())) == sorted(DOCUMENTS)
    assert 8 <= len(held["valid"]) <= 35
    for split, names in held.items():
        assert found[split] == "".join(texts[name] for name in DOCUMENTS if name in names)
    assert verify_dataset(whole).faults == []


def test_blocks_begin_with_sentences(whole):
    tokenizer = load_tokenizer(whole / "tokenizer")
    starts = {s.split()[0] for document in DOCUMENTS for s in split_sentences(document)}
    counts = Manifest.load(whole).settings["counts"]
    odd = [row for row in blocks(whole, "train") if tokenizer.decode(row).split()[0] not in starts]
    assert 0 < counts["sentences_cut"] < counts["sentences"] / 5
    assert len(odd) <= 2 * counts["sentences_cut"]
    assert counts["documents"] == 200
    assert counts["text_bytes"] == sum(len(document.encode()) for document in DOCUMENTS)


@pytest.fixture
def small_units(monkeypatch):
    """Small portions of work, and progress made lasting after each."""
    monkeypatch.setattr("janus_ds.data.prepare.corpus._UNIT_CHARACTERS", 2000)
    monkeypatch.setattr("janus_ds.data.prepare.corpus._COMMIT_SECONDS", 0.0)


def test_bytes_do_not_depend_on_processes_or_units(text_file, whole, tmp_path, small_units):
    seen = []
    report = prepare([text_file], tmp_path / "out", SETTINGS, 3, seen.append)
    assert content(tmp_path / "out") == content(whole)
    assert report.done.documents == 200
    assert report.done.megabytes_per_second > 0
    assert [p.share for p in seen if p.stage == "writing shards"][-1] == 1.0
    again = prepare([text_file], tmp_path / "out", SETTINGS)
    assert again.already_whole
    assert again.manifest == report.manifest


class InterruptionError(Exception):
    """Stands for anything that ends the process."""


def test_an_interrupted_preparation_goes_on(text_file, whole, tmp_path, small_units):
    output = tmp_path / "out"
    calls = 0
    for stop_after in (1, 2, 5, 9, None):  # units done in each call; None: to the end
        left = stop_after

        def stop(progress, limit=left):
            nonlocal calls
            calls += progress.stage == "writing shards"
            if calls == limit:
                raise InterruptionError

        calls = 0
        if stop_after is None:
            report = prepare([text_file], output, SETTINGS)
            assert report.resumed
            assert report.done.documents < 120  # the earlier work was kept
        else:
            with pytest.raises(InterruptionError):
                prepare([text_file], output, SETTINGS, progress=stop)
            with pytest.raises(DataError, match="holds no manifest"):
                Manifest.load(output)
    assert content(output) == content(whole)


def test_what_an_interruption_left_is_guarded(text_file, whole, tmp_path, small_units):
    output = tmp_path / "out"
    units = 0

    def stop(progress):
        nonlocal units
        units += progress.stage == "writing shards"
        if units == 6:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        prepare([text_file], output, SETTINGS, progress=stop)
    with pytest.raises(DataError, match="unfinished preparation with other settings"):
        prepare([text_file], output, dataclasses.replace(SETTINGS, block_tokens=25))
    # A damaged shard or journal means doing the work again, not wrong data.
    first = output / "train" / "shard-000000.tar"
    first.write_bytes(first.read_bytes()[:-1])
    assert not prepare([text_file], output, SETTINGS).resumed
    assert content(output) == content(whole)
    with pytest.raises(DataError, match="prepared with other settings"):
        prepare([text_file], output, dataclasses.replace(SETTINGS, block_tokens=25))


def test_a_full_disk_loses_nothing(text_file, whole, tmp_path, monkeypatch, small_units):
    output, real, calls = tmp_path / "out", os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match="disk is full"):
        prepare([text_file], output, SETTINGS)
    monkeypatch.setattr("os.fsync", real)
    assert prepare([text_file], output, SETTINGS).resumed
    assert content(output) == content(whole)


def test_two_preparations_do_not_share_a_folder(text_file, tmp_path):
    def second(progress):
        other = os.fork()
        if not other:
            with contextlib.suppress(BusyError):
                prepare([text_file], tmp_path / "out", SETTINGS)
                os._exit(1)
            os._exit(0)
        assert os.waitpid(other, 0)[1] == 0
        raise InterruptionError

    with pytest.raises(InterruptionError):
        prepare([text_file], tmp_path / "out", SETTINGS, progress=second)


def test_byte_level_blocks_read_as_bart_reads_them():
    tokenizer = ByteLevelBPE(*small_byte_level().values())
    settings = dataclasses.replace(SETTINGS, block_tokens=10, valid_share=0.0, test_share=0.0)
    samples, counts = encode_blocks(tokenizer, settings, ["<mask>.\nhello.\nworld.\n<mask>.\nwho."])
    rows = [row.tolist() for row in samples["train"]["target"].rows()]
    # Sentences inside a block have the space before them, the first of a block has none.
    assert rows == [tokenizer.encode("hello. world."), tokenizer.encode("who.")]
    assert counts["sentences_with_special_symbols"] == 2


def test_unfit_settings_inputs_and_outputs(text_file, tmp_path):
    bad = PrepareSettings(block_tokens=0, valid_share=1.5, rule=DocumentRule(format="pdf"))
    with pytest.raises(ConfigError) as caught:
        prepare([text_file], tmp_path / "a", bad)
    for name in ("--block-tokens", "--valid-share", "--format"):
        assert name in caught.value.what
    with pytest.raises(DataError, match="no tokenizer of this name"):
        prepare([text_file], tmp_path / "a", PrepareSettings(tokenizer="wordpiece"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(DataError, match="holds no text"):
        prepare([empty], tmp_path / "b", SETTINGS)
    (tmp_path / "latin.txt").write_bytes("Caf\xe9.".encode("latin1"))
    with pytest.raises(DataError, match="not UTF-8"):
        prepare([tmp_path / "latin.txt"], tmp_path / "b", SETTINGS, processes=2)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"not empty: it holds mine\.txt"):
        prepare([text_file], tmp_path / "c", SETTINGS)
    ByteLevelBPE(*small_byte_level().values()).save(tmp_path / "bpe")
    all_held = dataclasses.replace(
        SETTINGS, tokenizer=str(tmp_path / "bpe"), valid_share=0.9999, test_share=0
    )
    with pytest.raises(DataError, match="none of the 200 documents gave training text"):
        prepare([text_file], tmp_path / "d", all_held)
    with pytest.raises(DataError, match="holds no text"):
        prepare([empty], tmp_path / "e", all_held)


def test_the_pool_keeps_order_tells_errors_and_notices_deaths():
    items = [(n, f"note {n}") for n in range(20)]
    assert list(ordered_map(lambda n: n * n, items, 3)) == [(n * n, f"note {n}") for n in range(20)]
    assert list(ordered_map(lambda n: n, items[:1], 3)) == [(0, "note 0")]

    def faulty(number: int) -> int:
        if number == 5:
            raise DataError("odd", "here", "mend it")
        return number

    with pytest.raises(DataError, match="odd"):
        list(ordered_map(faulty, items, 2))
    with pytest.raises(ResourceError, match=r"(?s)worker process ended.* again with fewer --processes$"):
        list(ordered_map(lambda n: os.kill(os.getpid(), signal.SIGKILL), items, 2))


def test_the_bundled_corpus_is_built_once(tmp_path, monkeypatch):
    corpus = tmp_path / "package" / "assets" / "corpus"
    corpus.mkdir(parents=True)
    (corpus / "novels.txt.xz").write_bytes(lzma.compress("\n\n".join(DOCUMENTS).encode()))
    monkeypatch.setattr("janus_ds.data.prepare.corpus.resources.files", lambda _: tmp_path / "package")
    monkeypatch.chdir(tmp_path)
    made = []
    real = prepare

    def counted(inputs, output, *args, **kwargs):
        report = real(inputs, output, *args, **kwargs)
        made.append(report.already_whole)
        return report

    monkeypatch.setattr("janus_ds.data.prepare.corpus.prepare", counted)
    threads = [threading.Thread(target=prepare_bundled_corpus, args=(None, 24, 90)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, True]
    path = prepare_bundled_corpus(block_tokens=24, vocab_size=90)
    assert path == Path("runs/data/novels-24-90")
    assert verify_dataset(path).faults == []
    assert np.mean([len(row) for row in blocks(path, "train")]) > 12
    with pytest.raises(DataError, match="other settings"):
        prepare_bundled_corpus(path, 23, 90)
    # With the tokenizer of a model to start from: another place, and the same symbols.
    given = prepare_bundled_corpus(block_tokens=24, tokenizer=path / "tokenizer")
    assert given != path
    assert load_tokenizer(given / "tokenizer").fingerprint == load_tokenizer(path / "tokenizer").fingerprint
    (path / "manifest.json").unlink()
    with pytest.raises(DataError, match="not empty"):
        prepare_bundled_corpus(block_tokens=24, vocab_size=90)


def test_few_documents_give_a_validation_split_all_the_same(tmp_path):
    """A run needs one to start: blocks are cut from the end of training, and counted."""
    path = tmp_path / "three.txt"
    path.write_text("One cat sees the dog.\n\nTwo cats see the dog.\n\nThree dogs see a cat.\n")
    small = PrepareSettings(vocab_size=25, block_tokens=5)
    report = prepare([path], tmp_path / "a", small)
    assert report.counts["validation_blocks_of_training_documents"] == 1
    assert report.manifest.splits["valid"].samples == 1
    none = prepare([path], tmp_path / "b", dataclasses.replace(small, valid_share=0.0))
    assert list(none.manifest.splits) == ["train"]
    assert none.manifest.splits["train"].samples == report.manifest.splits["train"].samples + 1
