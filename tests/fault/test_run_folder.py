"""The run folder: one start at a time, side files that are damaged, and no secrets in what is written."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from janus_ds.errors import BusyError, ResourceError
from janus_ds.io import disk_faults, folder_lock
from tests.conftest import Tally
from tests.support.bad_server import serve
from tests.support.hostile import note
from tests.support.program import STEPS, Program, assert_as_unbroken, wait_for, wait_for_halt

SECRET = "pl4nted-s3cret"
SHORT = ("train.max_steps=4", "train.save_every=2", "train.valid_every=2", "data.workers=0")


@dataclass(frozen=True)
class Distant(Program):
    """The program with its data at an address."""

    address: str = ""

    @property
    def words(self) -> list[str]:
        words = super().words
        words[words.index("--data") + 1] = self.address
        return words


def test_a_second_start_in_a_run_folder_is_refused_in_words(
    inputs: Path, unbroken: Path, tally: Tally
) -> None:
    program = Program(inputs, inputs / "two")
    with program.halting(2, 6).running() as first:
        wait_for_halt(program, first, 2)
        assert program.finish() == BusyError.exit_code
        assert "error: another process is at work in the folder" in program.said
        assert f"{program.run}: process {first.pid} on " in program.said
        assert "Traceback" not in program.said
        first.send_signal(signal.SIGCONT)
        wait_for_halt(program, first, 6)
    # Killed: the next start needs not wait for anything.
    assert program.finish() == 0, program.said[-3000:]
    assert_as_unbroken(program.run, unbroken)
    tally("a second start in the same run folder is refused, the first is unharmed", "1 of 1")


def test_a_link_in_place_of_the_lock_empties_no_file(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    refused = pytest.raises(ResourceError, match="cannot be written")
    with refused, disk_faults(tmp_path), folder_lock(tmp_path, 0.0):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_damaged_side_files_never_keep_a_run_from_going_on(
    inputs: Path, unbroken: Path, tally: Tally
) -> None:
    """All of them at once: metrics, TensorBoard, run.json, quarantine list, the newest manifest."""
    program = Program(inputs, inputs / "damaged")
    run, root = program.run, program.run / "checkpoints"
    with program.running() as process:
        wait_for(lambda: len(list(root.glob("step-*"))) == 2, process, program.log)
    newest = sorted(root.glob("step-*"))[-1]
    (newest / "complete.json").write_text("[]")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    for path in (run / "tensorboard").iterdir():
        path.write_bytes(b"\xff" * 64 + path.read_bytes())
    (run / "run.json").write_bytes(b"\xff[")
    (run / "quarantine.jsonl").write_bytes(b"\xff\n[]\n")
    (run / ".lock").write_bytes(b"\xff\xff")
    assert program.finish() == 0, program.said[-3000:]
    assert "Traceback" not in program.said
    for name in ("metrics.jsonl", "run.json", "events.out.records"):
        assert f"was set aside as damaged-1.{name}" in program.said
    for name in ("weights.safetensors", "optimizer.safetensors"):
        path = f"checkpoints/step-{STEPS:08d}/{name}"
        assert (run / path).read_bytes() == (unbroken / path).read_bytes()
    tally("damaged side files (metrics, events, run.json, quarantine, manifest): the run goes on", "6 of 6")


def test_no_secret_of_an_address_is_written_or_printed(inputs: Path, tally: Tally) -> None:
    with serve(inputs) as server:
        host = server.address.removeprefix("http://")
        address = f"http://me:{SECRET}@{host}/data?sig={SECRET}&x=1"
        settings = (*SHORT, f"data.cache_dir={inputs / 'cache'}")
        program = Distant(inputs, inputs / "secret", settings=settings, address=address)
        assert program.finish() == 0, program.said[-3000:]
        assert program.finish() == 0
        # A fault that names the data must not tell either.
        shutil.rmtree(inputs / "cache")
    program.finish()
    files = [path for path in program.run.rglob("*") if path.is_file()]
    assert len(files) > 8
    telling = [path for path in (*files, program.log) if SECRET.encode() in path.read_bytes()]
    note("files that hold a planted secret", len(files) + 1, len(telling))
    assert not telling
    tally("files of a run without the secret of its data's address", f"{len(files) + 1} of {len(files) + 1}")
