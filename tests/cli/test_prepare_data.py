"""`launch/prepare_data.py` as a user starts it, kills it, and starts it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from janus_ds.data.prepare.corpus import prepare
from janus_ds.data.prepare.settings import PrepareSettings
from tests.data.test_prepare import content
from tests.support.texts import documents

ROOT = Path(__file__).resolve().parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / "prepare_data.py"), *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True, check=False)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def children(pid: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(word) for word in listing.stdout.split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)


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
    kills = 0
    for _ in range(2):
        before = state.read_bytes() if state.exists() else b""
        process = subprocess.Popen(command(*options), env=environment(), stdout=subprocess.DEVNULL)
        wait_until(lambda: process.poll() is not None or (state.exists() and state.read_bytes() != before))  # noqa: B023
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        wait_until(lambda: not any(map(alive, workers)), 20)  # noqa: B023
        assert not any(map(alive, workers)), "a worker outlived its caller"
    assert kills
    last = run(*options)
    assert last.returncode == 0, last.stderr
    assert "sentences cut" in last.stdout
    if kills == 2:
        assert "went on with an interrupted preparation" in last.stdout
        assert "MB/s" in last.stdout
    assert content(output) == content(tmp_path / "whole")


def test_faults_are_told_in_words_with_an_exit_code(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"Caf\xe9 au lait.\n")
    failed = run("--input", tmp_path / "latin.txt", "--output", tmp_path / "out")
    assert failed.returncode == 4
    assert failed.stderr.startswith("error: the text is not UTF-8: byte 0xe9")
    assert "line 1, byte 3" in failed.stderr
    assert "Traceback" not in failed.stderr
