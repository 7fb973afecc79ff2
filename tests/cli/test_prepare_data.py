"""`launch/prepare_data.py` as a user starts it, kills it, and starts it again."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from janus_ds.cli import prepare as prepare_module
from janus_ds.cli.prepare import prepare_data, prepare_glge
from janus_ds.data.prepare import pairs
from janus_ds.data.prepare.corpus import prepare
from janus_ds.data.prepare.settings import PrepareSettings
from janus_ds.data.prepare.writing import PrepareProgress
from janus_ds.data.stream.index import Manifest
from janus_ds.data.text.tokenizer import ByteLevelBPE
from janus_ds.errors import DataError, UsageError
from tests.data.prepare.test_corpus import content
from tests.data.text.test_tokenizer import small_byte_level
from tests.support.processes import in_session, wait_until
from tests.support.texts import documents
from tests.support.tiny_pairs import make_tiny_pairs
from tests.support.warm import warm_starter

WORDS = ("--task", "nmt", "--tokenizer", "bpe-words")


@pytest.mark.parametrize(
    ("given", "named", "told"),
    [
        (["--train", "a.de", "a.en"], "--train", "--task nmt"),
        (["--task", "nmt", "--input", "a.txt"], "--input", "--task denoise"),
        (["--task", "nmt", "--beam", "1"], "--beam", "--task nmt --distill"),
        (["--distill", "run", "--lowercase"], "--lowercase", "--task nmt"),
        (["--distill", "run", "--vocab-size", "90"], "--vocab-size", "without --distill"),
        (["--tokenizer", ".", "--normalization", "nfkc"], "--normalization", "sentencepiece-bpe"),
        (["--tokenizer", ".", "--vocab-size", "32000"], "--vocab-size", "sentencepiece-bpe"),
        ([*WORDS, "--tokenizer-sample-mb", "5"], "--tokenizer-sample-mb", "sentencepiece-bpe"),
    ],
)
def test_an_option_of_another_task_is_refused_by_name(given: list[str], named: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        prepare_data(["--output", "nowhere", *given])
    assert caught.value.where == named
    assert caught.value.fix.endswith(told)


def test_another_command_is_another_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--output", str(tmp_path / "out"), "--vocab-size", "90", "--processes", "1", "--input"]
    texts = [tmp_path / name for name in ("hush-1", "hush-2")]
    for seed, path in enumerate(texts):
        path.write_text("\n\n".join(documents(40 + seed)))
    assert prepare_data([*asked, f"pipe:cat {texts[0]}"]) == 0
    assert prepare_data([*asked, f"pipe:cat {texts[0]}"]) == 0
    assert "whole already" in capsys.readouterr().out
    with pytest.raises(DataError, match="from other input"):
        prepare_data([*asked, f"pipe:cat {texts[1]}"])
    assert "hush" not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_name_that_is_not_utf8_is_remembered(tmp_path: Path) -> None:
    text = tmp_path / os.fsdecode(b"caf\xe9.txt")
    text.write_text("\n\n".join(documents(40)))
    asked = [
        "--output",
        str(tmp_path / "out"),
        "--vocab-size",
        "90",
        "--processes",
        "1",
        "--input",
        str(text),
    ]
    for _ in range(2):
        assert prepare_data(asked) == 0
    request = Manifest.load(tmp_path / "out").settings["request"]
    assert request["inputs"] == [["caf\\xe9.txt", text.stat().st_size]]


def test_an_output_inside_of_the_input_folder_is_no_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an interrupted preparation left there would be other input, so that it could not go on."""
    monkeypatch.setattr("janus_ds.data.prepare.corpus._UNIT_CHARACTERS", 2000)
    monkeypatch.setattr("janus_ds.data.prepare.corpus._COMMIT_SECONDS", 0.0)
    (tmp_path / "a.txt").write_text("\n\n".join(documents(200)))
    settings = PrepareSettings(vocab_size=90, block_tokens=24, samples_per_member=4, members_per_shard=8)
    units = []

    def stop(progress: PrepareProgress) -> None:
        units.append(progress.stage)
        if units.count("writing shards") == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path], tmp_path / "out", settings, progress=stop)
    assert list((tmp_path / "out" / "train").glob("*.tar"))
    assert prepare([tmp_path], tmp_path / "out", settings).resumed
    assert prepare([tmp_path], tmp_path / "out", settings).already_whole


def test_a_file_at_fault_is_mended_without_loss(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a given tokenizer, which needs no first look at all files."""
    monkeypatch.setattr("janus_ds.data.prepare.corpus._UNIT_CHARACTERS", 2000)
    monkeypatch.setattr("janus_ds.data.prepare.corpus._COMMIT_SECONDS", 0.0)
    names = [home / f"{letter}.txt" for letter in "abcd"]
    for path in names:
        path.write_text("\n\n".join(documents(40)))
    given = ["--tokenizer", str(home / "bpe"), "--processes", "1"]
    asked = ["--input", *map(str, names), *given, "--output"]
    sound = names[2].read_bytes()
    names[2].write_bytes(b"Caf\xe9. " + sound)
    with pytest.raises(DataError, match="not UTF-8"):
        prepare_data([*asked, str(home / "out")])
    first, time = names[0].read_bytes(), names[0].stat().st_mtime_ns
    names[0].write_bytes(first + b"Another.")
    with pytest.raises(DataError, match="unfinished preparation"):
        prepare_data([*asked, str(home / "out")])
    names[0].write_bytes(first)
    os.utime(names[0], ns=(time, time))
    names[2].write_bytes("Café. ".encode() + sound)
    assert prepare_data([*asked, str(home / "out")]) == 0
    assert "went on with an interrupted preparation" in capsys.readouterr().out
    assert prepare_data([*asked, str(home / "new")]) == 0
    assert content(home / "out") == content(home / "new")


def test_a_preparation_on_nfs_ends_well_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, a file that is removed while it is open stays in its folder: that of the lock."""
    remove = os.rmdir

    def rmdir(path: str, **options: int) -> None:
        opened = (os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))
        if str(path).endswith(".prepare") and any("/.prepare/.lock" in place for place in opened):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        remove(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    (tmp_path / "a.txt").write_text("\n\n".join(documents(40)))
    asked = ["--output", str(tmp_path / "out"), "--vocab-size", "90", "--processes", "1"]
    assert prepare_data([*asked, "--input", str(tmp_path / "a.txt")]) == 0
    assert not (tmp_path / "out" / ".prepare").exists()


def test_as_many_processes_as_the_job_has_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as the machine has."""
    for module, known in ((pairs, "prepare_glge"), (prepare_module, "prepare")):
        asked = []
        monkeypatch.setattr(module, known, lambda *words, asked=asked: asked.append(words[3]) or 1 / 0)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 6, 7})
        words = ["--task", "xsum", "--tokenizer", "t"] if module is pairs else []
        with pytest.raises(ZeroDivisionError):
            (prepare_glge if words else prepare_data)(["--input", "a", "--output", "b", *words])
        assert asked == [3]


def test_progress_leaves_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a terminal; of a command's text, no share is known."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "a.txt").write_text("\n\n".join(documents(40)))
    asked = ["--output", str(tmp_path / "out"), "--vocab-size", "90", "--processes", "1"]
    assert prepare_data([*asked, "--input", f"pipe:cat {tmp_path}/a.txt"]) == 0
    shown = capsys.readouterr().err
    assert "0.0%" not in shown
    assert "training the tokenizer ...\n\r" in shown
    assert shown.endswith("MB/s\n")
    (files,) = make_tiny_pairs(tmp_path / "text")["train"]
    pair = ["--train", str(files.source), str(files.target), "--source-lang", "de", "--target-lang", "en"]
    asked[1:4] = [str(tmp_path / "pairs"), "--vocab-size", "60"]
    assert prepare_data(["--task", "nmt", *pair, *asked]) == 0
    assert "training the tokenizer ..." in capsys.readouterr().err


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's, with a text and a tokenizer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("\n\n".join(documents(40)))
    ByteLevelBPE(*small_byte_level().values()).save(tmp_path / "bpe")
    return tmp_path


def test_paths_may_begin_at_home(home: Path) -> None:
    asked = ["--input=~/a.txt", "--output=~/out", "--tokenizer=~/bpe", "--processes", "1"]
    assert prepare_data(asked) == 0
    assert (home / "out" / "manifest.json").is_file()
    with pytest.raises(DataError, match="does not exist"):
        prepare_data(["--input=~nobody-at-all/a.txt", "--output=~/other"])


def test_killed_preparations_go_on_and_end_in_the_same_bytes(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(documents(16_000)))  # some units of work: the kills fall between
    settings = PrepareSettings(
        tokenizer="sentencepiece-bpe",
        vocab_size=200,
        tokenizer_sample_mb=1,
        block_tokens=24,
        members_per_shard=8,
    )
    prepare([text], tmp_path / "whole", settings)

    output, state = tmp_path / "out", tmp_path / "out" / ".prepare" / "state.json"
    options = ("--input", text, "--output", output, "--tokenizer", "sentencepiece-bpe", "--vocab-size", 200,
               "--tokenizer-sample-mb", 1, "--block-tokens", 24, "--members-per-shard", 8,
               "--processes", 2)  # fmt: skip
    words, log, kills = ["launch/prepare_data.py", *map(str, options)], tmp_path / "log", 0
    for _ in range(2):
        before = state.read_bytes() if state.exists() else b""
        process = warm_starter().start(words, log)

        def moved(process=process, before=before) -> bool:
            return process.poll() is not None or (state.exists() and state.read_bytes() != before)

        wait_until(moved, 600, "a change of the journal")
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        wait_until(lambda pid=process.pid: not in_session(pid), 120, "the end of the workers")
    assert kills
    log.unlink()
    code, told = warm_starter().start(words, log).wait(600), log.read_text()
    assert code == 0, told
    assert "sentences cut" in told
    if kills == 2:
        assert "went on with an interrupted preparation" in told
        assert "MB/s" in told
    assert content(output) == content(tmp_path / "whole")
