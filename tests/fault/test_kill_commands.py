"""Kills in the midst of preparation, conversion, distillation and evaluation with an average.

After each kill no half file stands under its final name; the same command again ends as if nothing had
been. Kills come before a file's first byte, before renames and removals, and within a file as it grows.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Tally
from tests.support.hf_folder import hub_folder
from tests.support.hostile import note
from tests.support.processes import in_session, wait_until
from tests.support.program import SETTINGS, Program, wait_for
from tests.support.tiny_data import sentences
from tests.support.tiny_pairs import prepare_tiny
from tests.support.tiny_run import make_run
from tests.support.warm import warm_starter

pytestmark = pytest.mark.timeout(1800)

TIMED = {"run.json": ("attempts", "command"), "scores.json": ("speed",)}
"""What differs from one run of a command to the next, in files of these names."""
CHANGED = "kills of commands that change what the next start makes"
SIZES = (5_000, 30_000, 200_000)
KINDS = ["corpus", "pairs", "distil", "from_hf", "to_hf", "to_fairseq", "from_fairseq", "average"]


@dataclass
class Inputs:
    """What the commands work on, made once."""

    folder: Path
    commands: dict[str, list[Any]] = field(default_factory=dict)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "novel.txt").write_text("\n\n".join(sentences(400)))
    data = prepare_tiny(folder).output
    run, hub = make_run(folder / "run", data, "ar"), hub_folder(folder / "hub")
    made = Inputs(folder)
    small = ["--samples-per-member", 16, "--members-per-shard", 4, "--processes", 2, "--vocab-size", 60]
    nmt = ["prepare", "--task", "nmt"]
    files = [[folder / "text" / f"{split}.{side}" for side in ("de", "en")] for split in ("train", "valid")]
    pairs = ["--source-lang", "de", "--target-lang", "en", "--train", *files[0], "--valid", *files[1]]
    distil = ["--distill", run, "--data", data, "--device", "cpu"]
    decode = ["--data", data, "--average", 2, "--modes", "ar", "--device", "cpu", "--latency-samples", 0]
    made.commands = {
        "corpus": ["prepare", "--input", folder / "novel.txt", *small, "--output"],
        "pairs": [*nmt, *pairs, *small, "--output"],
        "distil": [*nmt, *distil, "--output"],
        "from_hf": ["convert", "--from", "hf", hub, "--to"],
        "to_hf": ["convert", "--to", "hf", folder / "bart", "--output"],
        "to_fairseq": ["convert", "--to", "fairseq", folder / "bart", "--output"],
        "from_fairseq": ["convert", "--from", "fairseq", folder / "bart.pt", "--to"],
        "average": ["eval", "nmt", "--checkpoint", run, *decode, "--output"],
    }
    for kind, result in (("from_hf", "bart"), ("to_fairseq", "bart.pt")):
        assert start(made, kind, folder / result) == 0
    return made


def start(inputs: Inputs, kind: str, output: Path, **plan: Any) -> int:
    """Run a command to its end, or to the kill; nothing that it started stays. Returns its exit code."""
    temporary = output.parent.with_name(f"tmp-{output.parent.name}")
    temporary.mkdir(exist_ok=True)
    words = words_of(output.parent, [*inputs.commands[kind], output], **plan)
    log = inputs.folder / "log"
    process = warm_starter().start(words, log, {"TMPDIR": str(temporary)})
    code = process.wait(900)
    wait_until(lambda: not in_session(process.pid), 120, "the end of all its processes")
    assert not left_in(temporary)
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]
    return code


def words_of(folder: Path, command: list[Any], **plan: Any) -> list[str]:
    whole = {"folder": str(folder), "at": 0, "signal": "SIGKILL", "bytes": 0, "count": "", **plan}
    return ["tests/support/killed.py", json.dumps(whole), *map(str, command)]


def left_in(temporary: Path) -> list[str]:
    """What lies in the folder of temporary files, but for the cache of torch's compiler."""
    return [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")]


def contents(folder: Path) -> dict[str, Any]:
    """Every file below a folder: its bytes, without what is timed."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        if path.is_file():
            name = str(path.relative_to(folder))
            timed = next((keys for end, keys in TIMED.items() if name.endswith(end)), ())
            found[name] = without(json.loads(path.read_bytes()), timed) if timed else path.read_bytes()
    return found


def without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: without(part, names) for key, part in value.items() if key not in names}
    return [without(part, names) for part in value] if isinstance(value, list) else value


def passing(name: str) -> bool:
    """A name that no command takes for a result."""
    return any(part.startswith(".") or part.endswith(".part") for part in Path(name).parts)


class Case:
    """One command, its result without kills, and the folder in which it is killed."""

    def __init__(self, inputs: Inputs, kind: str, folder: Path) -> None:
        self._inputs, self._kind, self._folder = inputs, kind, folder
        self.kills = 0
        assert self._start("whole", count=str(folder / "count")) == 0
        self.points = int((folder / "count").read_text())
        self._whole = contents(folder / "whole")

    def _start(self, place: str, **plan: Any) -> int:
        (self._folder / place).mkdir(exist_ok=True)
        return start(self._inputs, self._kind, self._folder / place / "result", **plan)

    def kill(self, place: str, **plan: Any) -> bool:
        """Kill it, and look at what is there; False where no file is so large."""
        code = self._start(place, **plan)
        if code == 0 and "bytes" in plan:
            return False
        assert code == -getattr(signal, plan.get("signal", "SIGXFSZ")), plan
        self.kills += 1
        note(CHANGED, 1)
        for name, found in contents(self._folder / place).items():
            assert passing(name) or found == self._whole[name], (plan, name)
        return True

    def finish(self, place: str) -> None:
        """The same command again: nothing else than without a kill. Behind its end it may refuse."""
        done = contents(self._folder / place) == self._whole
        code = self._start(place)
        same = (code == 0 or done) and contents(self._folder / place) == self._whole
        note(CHANGED, 0, not same)
        assert same, (code, place)


@pytest.fixture
def case(made: Inputs, tmp_path: Path) -> Callable[[str], Case]:
    return lambda kind: Case(made, kind, tmp_path)


@pytest.mark.parametrize("kind", ["corpus", "distil", "from_hf", "average"])
def test_kills_one_after_the_other(kind: str, case: Callable[[str], Case], tally: Tally) -> None:
    command = case(kind)
    for share, number in ((0.5, "SIGKILL"), (0.3, "SIGTERM")):
        command.kill("again", at=max(1, int(command.points * share)), signal=number)
    command.kill("again", bytes=5_000)
    command.finish("again")
    tally(f"kills of one {kind} command, then the same result", f"{command.kills}")
    assert command.kills >= 2


@pytest.mark.heavy
@pytest.mark.parametrize("kind", KINDS)
def test_kills_all_along(kind: str, case: Callable[[str], Case], tally: Tally) -> None:
    """A dozen points from the first to the last, each from the start and each finished."""
    command = case(kind)
    points = sorted({1 + (command.points - 1) * part // 11 for part in range(12)})
    for at in points:
        command.kill(f"point-{at}", at=at, signal="SIGTERM" if at % 3 == 0 else "SIGKILL")
        command.finish(f"point-{at}")
    for size in SIZES:
        if command.kill(f"size-{size}", bytes=size):
            command.finish(f"size-{size}")
    tally(f"{kind}: kills, each followed by the same command, then the same result", f"{command.kills}")
    assert command.kills >= len(points)


def test_a_killed_training_leaves_nothing_in_the_temporary_folder(inputs: Path, tmp_path: Path) -> None:
    program = Program(inputs, tmp_path / "run", settings=(*SETTINGS, "train.max_steps=1000000"))
    (tmp_path / "tmp").mkdir()
    words = words_of(tmp_path, ["pretrain", *program.words[1:]])
    process = warm_starter().start(words, program.log, {"TMPDIR": str(tmp_path / "tmp")})
    wait_for(lambda: program.steps >= 3, process, program.log)
    for pid in in_session(process.pid):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not in_session(process.pid), 120, "the end of its workers")
    assert not left_in(tmp_path / "tmp")
