"""Signals to launchers, and ranks that die under them: saved, named, and no process left."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from janus_ds.errors import PREEMPTED_EXIT_CODE
from tests.conftest import Tally
from tests.support.processes import find_ranks, in_session, parent, takes, wait_until
from tests.support.program import (
    PATIENCE,
    Program,
    assert_as_unbroken,
    deepspeed,
    figures_of,
    gone,
    launched,
    reach,
    torchrun,
    wait_for,
)

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2400)]

ENDLESS = ("train.max_steps=1000000", "train.save_every=1000000", "train.valid_every=0", "data.workers=1")
OFTEN = ("train.max_steps=1000000", "train.save_every=7", "train.valid_every=11", "data.workers=1")
SHORT = ("train.max_steps=30", "train.save_every=4", "train.valid_every=15", "data.workers=1")


@pytest.mark.parametrize(
    ("launcher", "target", "number"),
    [
        ("deepspeed", "command", signal.SIGTERM),
        ("deepspeed", "command", signal.SIGUSR1),
        ("deepspeed", "starter", signal.SIGTERM),
        ("deepspeed", "starter", signal.SIGKILL),
        ("torchrun", "command", signal.SIGTERM),
        ("torchrun", "command", signal.SIGUSR1),
        ("torchrun", "command", signal.SIGKILL),
    ],
)
def test_a_signal_to_the_launcher_saves_and_leaves_nothing(
    inputs: Path, launcher: str, target: str, number: signal.Signals, tally: Tally
) -> None:
    ranks = Program(inputs, inputs / f"{launcher}-{target}-{number.name}", 2, ENDLESS)
    command = {"deepspeed": deepspeed, "torchrun": torchrun}[launcher]()
    with launched(ranks, command) as (process,):
        reach(ranks, 3)
        starter = parent(find_ranks(ranks.run)[0])
        os.kill(process.pid if target == "command" else starter, number)
        process.wait(PATIENCE)
        gone(ranks)
    assert ranks.checkpoint == ranks.steps >= 3
    assert "asked to stop (" in ranks.said
    # deepspeed's own 0 for an unfinished run (docs/faults.md): the log and the record tell otherwise.
    assert (process.returncode == 0) == (target == "starter" and number == signal.SIGKILL)
    assert "not complete: step" in ranks.said
    assert json.loads((ranks.run / "run.json").read_text())["attempts"][-1]["ended"].startswith("stopped: ")
    assert "Traceback" not in ranks.said or launcher == "torchrun"  # torchrun shows its own
    where = {"command": launcher, "starter": "deepspeed.launcher.launch"}[target]
    tally(f"{number.name} to {where}: saved at the last step, no orphan", "2 of 2 ranks")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_is_named_and_the_launcher_ends_all(inputs: Path, victim: int, tally: Tally) -> None:
    """Collectives have no limit: without the news of the death they would never end."""
    ranks = Program(inputs, inputs / f"dead-{victim}", 2, ENDLESS)
    with launched(ranks, deepspeed()) as (process,):
        reach(ranks, 3)
        pid = find_ranks(ranks.run)[victim]
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        assert process.wait(PATIENCE) != 0
        gone(ranks)
        seconds = time.monotonic() - begin
    assert "error: another rank was lost" in ranks.said
    assert f"where: rank {victim} on {socket.gethostname()} (process {pid})" in ranks.said
    tally(f"SIGKILL of rank {victim} under deepspeed: named, all gone", f"{seconds:.1f} s")


def test_torchrun_restarts_after_the_death_of_a_rank(inputs: Path, tally: Tally) -> None:
    unbroken, restarted = (Program(inputs, inputs / name, 2, SHORT) for name in ("unbroken-30", "restarted"))
    with launched(unbroken, torchrun()) as (process,):
        assert process.wait(PATIENCE) == 0
    again = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=2")
    with launched(restarted, again) as (process,):
        for step in (5, 12):
            reach(restarted, step)
            os.kill(find_ranks(restarted.run)[1], signal.SIGKILL)
        assert process.wait(PATIENCE) == 0
        gone(restarted)
    assert figures_of(restarted.run) == figures_of(unbroken.run)
    assert restarted.said.count("where: rank 1 on") == 2
    tally("torchrun --max-restarts: restarted after SIGKILL of a rank, then the same figures", "2 of 2")


def test_twenty_signals_at_random_moments(inputs: Path, tally: Tally) -> None:
    """SIGTERM or SIGUSR1: 5 in real starts, 15 in steps, saves and validations of forked ones.

    Each of them: exit code 75, the checkpoint is the last step that was logged, no process is left,
    and the next start goes on from there. A signal counts from where Python has set its handlers,
    before the first import.
    """
    real = Program(inputs, inputs / "stopped", settings=OFTEN, forked=False)
    forked = replace(real, forked=True)
    draw = random.Random(20)
    seconds = [stop_in_start(real, draw.uniform(0, 9), draw) for _ in range(5)]
    seconds += [stop_in_steps(forked, draw) for _ in range(15)]
    end = forked.steps + 5
    settings = (*OFTEN, f"train.max_steps={end}")
    unbroken = replace(forked, run=inputs / "never-stopped", settings=settings)
    assert replace(forked, settings=settings).finish(PATIENCE) == 0
    assert unbroken.finish(PATIENCE) == 0
    assert_as_unbroken(forked.run, unbroken.run, end)
    tally("signals at random moments: saved at the last step, code 75, no process left", "20 of 20")
    tally("  slowest way from signal to end", f"{max(seconds):.1f} s")


def stop_in_start(program: Program, delay: float, draw: random.Random) -> float:
    with program.running() as process:
        wait_until(lambda: takes(process.pid, signal.SIGUSR1), PATIENCE, "handlers")
        time.sleep(delay)
        return stop(program, process, draw)


def stop_in_steps(program: Program, draw: random.Random) -> float:
    before = program.steps
    with program.running() as process:
        more = draw.randint(1, 12)
        wait_for(lambda: program.steps >= before + more, process, program.log)
        time.sleep(draw.uniform(0, 0.3))
        return stop(program, process, draw)


def stop(program: Program, process: Any, draw: random.Random) -> float:
    """Send a signal; returns the seconds to the end."""
    begin = time.monotonic()
    process.send_signal(draw.choice((signal.SIGTERM, signal.SIGUSR1)))
    assert process.wait(PATIENCE) == PREEMPTED_EXIT_CODE, program.said[-3000:]
    seconds = time.monotonic() - begin
    assert in_session(process.pid) == []
    # A stop in a validation leaves the line of its step to the next start.
    assert program.checkpoint - program.steps in (0, 1)
    return seconds
