"""Kills, signals and a full disk: nothing is lost, and the resumed run is the unbroken one bit for bit.

`make fault-test` runs the long form as well (marked heavy).
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from janus_ds.errors import PREEMPTED_EXIT_CODE, ResourceError, TrainingError
from janus_ds.observe import processor_title, read_run_record
from janus_ds.report.runs import read_runs
from tests.conftest import Tally
from tests.support.processes import find_ranks
from tests.support.program import (
    PATIENCE,
    SETTINGS,
    STEPS,
    Program,
    assert_as_unbroken,
    wait_for,
    wait_for_halt,
)


def kill_at_step(program: Program, step: int) -> None:
    """Kill behind the line of this step."""
    with program.halting(step).running() as process:
        wait_for_halt(program, process, step)


def kill_in_save(program: Program, file: int) -> None:
    """Kill before a start writes so many a file of tensors, of which a save has two; it leaves a torn one."""
    start = program.checkpoint
    with program.halting(file=file).running() as process:
        wait_for_halt(program, process)
    assert program.saving
    assert program.checkpoint >= start


def kill_near_save(program: Program, delay: float) -> bool:
    """Kill so many seconds after a stop within a save; returns whether it left a torn one."""
    start = program.checkpoint
    with program.running() as process:
        # Mostly the first save of this start: later ones would let the run end before the next kill.
        while True:
            wait_for(lambda: program.saving, process, program.log, pause=0.002)
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(0.01)
            if program.saving:
                break
            os.killpg(process.pid, signal.SIGCONT)
        os.killpg(process.pid, signal.SIGCONT)
        time.sleep(delay)
    torn = program.saving
    assert program.checkpoint >= start
    return torn


def kill_and_resume(program: Program, step_kills: int, save_kills: int) -> None:
    """Kills at random steps and in the first two saves of a start, in random order; then the run finishes."""
    draw = random.Random(step_kills * 100 + save_kills)
    kinds = ["step"] * step_kills + ["save"] * save_kills
    draw.shuffle(kinds)
    for number, kind in enumerate(kinds):
        if kind == "save":
            kill_in_save(program, draw.randint(1, 4))
        else:
            last = (STEPS - 6) * (number + 1) // len(kinds)
            first = max(program.checkpoint + 1, 1)
            kill_at_step(program, draw.randint(first, max(first, last)))
        assert program.steps < STEPS
    assert program.finish() == 0, program.log.read_text()[-3000:]


def test_killed_runs_end_as_the_unbroken_one(inputs: Path, unbroken: Path, tally: Tally) -> None:
    program = Program(inputs, inputs / "killed")
    kill_and_resume(program, step_kills=2, save_kills=2)
    assert_as_unbroken(program.run, unbroken)
    tally("SIGKILLs at steps and in saves, then bitwise the unbroken run", "4 of 4")


@pytest.mark.heavy
def test_killed_five_times_at_random_steps(inputs: Path, unbroken: Path, tally: Tally) -> None:
    program = Program(inputs, inputs / "killed-5")
    kill_and_resume(program, step_kills=5, save_kills=0)
    assert_as_unbroken(program.run, unbroken)
    tally("metrics.jsonl and TensorBoard have one value a step after 5 kills", f"{STEPS} of {STEPS} steps")


@pytest.mark.heavy
@pytest.mark.timeout(1800)
def test_killed_in_fifty_saves(inputs: Path, tally: Tally) -> None:
    """A whole checkpoint after each of 50 kills over the save window, and the same end."""
    steps = 220
    settings = (*SETTINGS, f"train.max_steps={steps}")
    unbroken = Program(inputs, inputs / "unbroken-220", settings=settings)
    assert unbroken.finish(patience=900) == 0, unbroken.said[-3000:]
    program = Program(inputs, inputs / "killed-50", settings=settings)
    draw, torn = random.Random(50), 0
    for _ in range(50):
        torn += kill_near_save(program, draw.uniform(0, 0.03))
    assert program.finish(patience=900) == 0, program.said[-3000:]
    assert torn >= 25
    assert_as_unbroken(program.run, unbroken.run, steps)
    tally(
        "whole checkpoint after SIGKILLs over the save window, then bitwise", f"50 of 50, {torn} saves torn"
    )


@pytest.mark.heavy
def test_two_ranks_under_the_launcher_killed_and_resumed(inputs: Path, tally: Tally) -> None:
    unbroken = Program(inputs, inputs / "unbroken-2", ranks=2, forked=False)
    assert unbroken.finish() == 0, unbroken.log.read_text()[-3000:]
    program = Program(inputs, inputs / "killed-2", ranks=2, forked=False)
    kill_and_resume(program, step_kills=2, save_kills=2)
    assert_as_unbroken(program.run, unbroken.run)
    tally("the same on two ranks under the deepspeed launcher", "4 of 4")


def test_a_signal_saves_and_asks_to_be_started_again(inputs: Path, unbroken: Path, tally: Tally) -> None:
    program = Program(inputs, inputs / "stopped", forked=False)
    with program.halting(6).running() as process:
        wait_for_halt(program, process, 6)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGCONT)
        assert process.wait(PATIENCE) == PREEMPTED_EXIT_CODE
    assert program.checkpoint == program.steps < STEPS
    assert f"not complete: step {program.steps} of {STEPS} is saved" in program.said.splitlines()[-1]
    program = replace(program, forked=True)
    kill_at_step(program, program.steps + 1)
    (run,) = read_runs([program.run], "test")
    assert run.notes[0].startswith("not complete: under way, killed or failed: ")
    assert program.finish() == 0
    assert "the start before was killed or failed; this one goes on from step" in program.said
    record = read_run_record(program.run) or {}
    assert record["hardware"]["machine"] == processor_title()
    assert [start["ended"] for start in record["attempts"]] == ["stopped: SIGUSR1", None, "complete"]
    assert_as_unbroken(program.run, unbroken)
    before = {path: path.stat().st_mtime_ns for path in program.run.rglob("*") if path.is_file()}
    assert program.finish() == 0
    assert f"is complete at step {STEPS}" in program.log.read_text()
    assert before == {path: path.stat().st_mtime_ns for path in program.run.rglob("*") if path.is_file()}
    full_disk(program)
    tally("SIGUSR1 saved, code 75, then bitwise the unbroken run", "1 of 1")
    tally("files that cannot grow: saves skipped, training on, last checkpoint whole", "2 of 2 saves")


def full_disk(program: Program) -> None:
    """Continues a finished run for longer where files cannot grow beyond 300 kB."""
    longer = replace(program, settings=(*SETTINGS, f"train.max_steps={STEPS + 8}"))
    with longer.halting(STEPS + 1).running() as process:
        wait_for_halt(longer, process, STEPS + 1)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
        process.send_signal(signal.SIGCONT)
        assert process.wait(PATIENCE) == ResourceError.exit_code
    text = program.said
    assert f"no checkpoint of step {STEPS + 4}: " in text
    assert "training goes on" in text
    assert "error: 2 checkpoints in a row could not be written (" in text
    assert "to do: free disk space" in text
    assert "Traceback" not in text
    assert longer.steps == STEPS + 8
    assert program.checkpoint == STEPS
    assert not program.saving


@contextmanager
def small_disk(place: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, which only root can make."""
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "janus-test", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_costs_saves_and_no_training(inputs: Path, unbroken: Path, tally: Tally) -> None:
    """A real small disk: saves are skipped while it is full, and made again when there is room."""
    with small_disk(inputs / "disk", 4) as disk:
        program = Program(inputs, disk / "run", settings=(*SETTINGS, "train.max_failed_saves=99"))
        ballast = disk / "ballast"
        # The save of step 4 ends before that of 8 begins, and that of 12, which fails, before that of 16.
        with program.halting(9, 18).running() as process:
            wait_for_halt(program, process, 9)
            ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 300_000))
            process.send_signal(signal.SIGCONT)
            wait_for_halt(program, process, 18)
            assert "no checkpoint of step" in program.said
            assert 4 <= program.checkpoint <= program.steps
            ballast.unlink()
            process.send_signal(signal.SIGCONT)
            assert process.wait(PATIENCE) == 0, program.said[-3000:]
        assert "MB left; training goes on" in program.said
        assert_as_unbroken(program.run, unbroken)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert Program(inputs, program.run, settings=(*SETTINGS, "train.max_steps=48")).finish() == (
            ResourceError.exit_code
        )
        assert "error: the file or folder cannot be written" in program.said
    tally("small disk full in saves: training on, then bitwise the unbroken run", "1 of 1")
    tally("run folder that cannot be written, refused at the start", "1 of 1")


def test_a_lost_rank_ends_the_others_in_words(inputs: Path, tally: Tally) -> None:
    """SIGKILL to one of two ranks: no hang, an exit code, a whole checkpoint."""
    program = Program(inputs, inputs / "lost", 2, (*SETTINGS, "train.max_steps=1000000"), forked=False)
    with program.running() as process:
        wait_for(lambda: program.steps >= 7, process, program.log)
        os.kill(find_ranks(program.run)[1], signal.SIGKILL)
        assert process.wait(PATIENCE) != 0
    text = program.log.read_text()
    assert TrainingError.__name__ not in text
    assert "error: another rank was lost" in text
    assert f"where: rank 1 on {socket.gethostname()} (process " in text
    assert program.checkpoint >= 4
    tally("SIGKILL of rank 1 of 2: named, the launcher ends the other", "1 of 1")
