"""What the programs say and the code they end with: the commands in `commands.txt`, two at a time.

Written by commit 5c5119c; `make golden` writes it anew from the commands in it. Each "$ PROGRAM ARGUMENTS" is
followed by "exit CODE" and the output, both streams together. Of `--help` only the names of the options are
kept, of argparse's usage errors only the last line. "janus_ds" stands for `python -m janus_ds`, RUN for a run
folder, DAMAGED for a data directory with two faults, TMP for an empty folder that all commands share (what
one writes there, the next but one may use). Times, speeds and sizes in memory are left out.
"""

from __future__ import annotations

import os
import re
import shutil
from difflib import unified_diff
from pathlib import Path

import pytest

from tests.golden.test_old_runs import restored_run
from tests.support.launch import ROOT
from tests.support.warm import warm_starter

GOLDEN = Path(__file__).with_name("commands.txt")
NOISE = [
    (r"\bin [\d.,]+ ?(ms|s|min|h)( \d+ (s|min))?\b", "in # s"),
    (r"[\d.,]+ [kMGT]?B/s", "# B/s"),
    (r"[\d.,]+ (samples|tokens|documents|pairs)/s", r"# \1/s"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S*", "#time"),
    (r", RowLayout\(.*\)", ""),
]


def commands() -> list[str]:
    """The commands of the committed file, in order."""
    return re.findall(r"^\$ (.*)$", GOLDEN.read_text(), re.M)


@pytest.fixture(scope="module")
def transcript(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same file as it comes out now."""
    names = ("RUN", "DAMAGED", "TMP")
    places = {name: tmp_path_factory.mktemp(name.lower()) for name in names}
    places["RUN"] = restored_run(places["RUN"])
    damage(places["DAMAGED"])
    starts = []
    for number, command in enumerate(commands()):
        script, *words = re.sub(rf"\b({'|'.join(names)})\b", lambda m: str(places[m[0]]), command).split()
        log = tmp_path_factory.getbasetemp() / f"command-{number}"
        starts.append(([script.replace("janus_ds", "janus_ds/__main__.py"), *words], log))
    said = zip(commands(), warm_starter().finish(starts), starts, strict=True)
    parts = (
        "\n".join([f"$ {command}", f"exit {code}", *_lines(log.read_text(), words, places)])
        for command, code, (words, log) in said
    )
    return "\n\n".join(parts) + "\n"


def damage(folder: Path) -> None:
    """The frozen data with a changed byte in one shard and another shard missing."""
    shutil.copytree(ROOT / "tests/golden/frozen/data", folder, dirs_exist_ok=True)
    shard = folder / "train" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    (folder / "valid" / "shard-000000.tar").unlink()


def _lines(text: str, words: list[str], places: dict[str, Path]) -> list[str]:
    if "--help" in words:
        return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text.partition("\noptions:")[2])))
    for name, place in {**places, "ROOT": ROOT}.items():
        text = text.replace(str(place), name)
    for pattern, instead in NOISE:
        text = re.sub(pattern, instead, text)
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return lines[-1:] if lines and lines[0].startswith("usage:") and ": error: " in lines[-1] else lines


def test_every_command_says_and_ends_as_committed(transcript: str) -> None:
    if os.environ.get("JANUS_UPDATE_GOLDEN"):
        GOLDEN.write_text(transcript)
        pytest.skip(f"written anew: {GOLDEN}")
    lines = (text.splitlines(keepends=True) for text in (GOLDEN.read_text(), transcript))
    difference = "".join(unified_diff(*lines, "committed", "now", n=3))
    assert not difference, "\n" + difference
