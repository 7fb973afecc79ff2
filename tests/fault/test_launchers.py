"""Signals to launchers, and ranks that die under them: saved, named, and no process left."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest

from janus_ds.errors import PREEMPTED_EXIT_CODE
from tests.fault.test_kill_resume import STEPS, Program, assert_as_unbroken
from tests.support.launchers import TwoRanks, deepspeed, torchrun
from tests.support.processes import find_ranks, parent
from tests.support.tiny_training import make_inputs

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1200)]

ENDLESS = ("train.max_steps=1000000", "train.save_every=1000000", "train.valid_every=0", "data.workers=1")
SHORT = ("train.max_steps=30", "train.save_every=4", "train.valid_every=15", "data.workers=1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("launchers"))


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
    inputs: Path, launcher: str, target: str, number: signal.Signals
) -> None:
    ranks = TwoRanks(inputs, f"{launcher}-{target}-{number.name}", ENDLESS)
    command = {"deepspeed": deepspeed, "torchrun": torchrun}[launcher]()
    with ranks.started(command) as (process,):
        ranks.reach(3)
        starter = parent(find_ranks(ranks.run)[0])
        os.kill(process.pid if target == "command" else starter, number)
        process.wait(90)
        ranks.gone()
    assert ranks.saved == ranks.step >= 3
    assert "asked to stop (" in ranks.text()
    assert "Traceback" not in ranks.text() or launcher == "torchrun"  # torchrun shows its own


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_is_named_and_the_launcher_ends_all(inputs: Path, victim: int) -> None:
    ranks = TwoRanks(inputs, f"dead-{victim}", ENDLESS)
    with ranks.started(deepspeed()) as (process,):
        ranks.reach(3)
        pid = find_ranks(ranks.run)[victim]
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        assert process.wait(90) != 0
        ranks.gone()
        assert time.monotonic() - begin < 60
    assert "error: another rank was lost" in ranks.text()
    assert f"where: rank {victim} on {socket.gethostname()} (process {pid})" in ranks.text()


def test_torchrun_restarts_after_the_death_of_a_rank(inputs: Path) -> None:
    unbroken, restarted = TwoRanks(inputs, "unbroken-30", SHORT), TwoRanks(inputs, "restarted", SHORT)
    with unbroken.started(torchrun()) as (process,):
        assert process.wait(300) == 0
    again = torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=2")
    with restarted.started(again) as (process,):
        for step in (5, 12):
            restarted.reach(step)
            os.kill(find_ranks(restarted.run)[1], signal.SIGKILL)
        assert process.wait(300) == 0
        restarted.gone(10)
    assert restarted.figures == unbroken.figures
    assert restarted.text().count("where: rank 1 on") == 2


def test_twenty_signals_at_random_moments(inputs: Path) -> None:
    """At 20 random moments, in imports too, where the signal simply ends the program: nothing is lost."""
    unbroken, stopped = Program(inputs, inputs / "unbroken"), Program(inputs, inputs / "stopped-20")
    begin = time.monotonic()
    assert unbroken.finish() == 0
    whole = time.monotonic() - begin
    draw = random.Random(20)
    codes = []
    for _ in range(20):
        with stopped.running() as process:
            # The first moments belong to Python itself.
            time.sleep(0.5 + draw.uniform(0, 0.9 * whole))
            process.send_signal(draw.choice((signal.SIGTERM, signal.SIGUSR1)))
            codes.append(process.wait(200))
    assert set(codes) <= {PREEMPTED_EXIT_CODE, 0, -signal.SIGTERM, -signal.SIGUSR1}
    assert codes.count(PREEMPTED_EXIT_CODE) >= 3
    assert stopped.finish() == 0
    assert stopped.steps == STEPS
    assert_as_unbroken(stopped.run, unbroken.run)
