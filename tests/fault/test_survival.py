"""Long runs that are killed again and again: bitwise the unbroken run, and no memory that grows.

The kills are SIGKILLs of real processes; a forked start spares them the imports (tests/support/warm.py).
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from janus_ds.observe import read_metrics
from tests.conftest import Tally
from tests.support.processes import in_session, resident, wait_until
from tests.support.program import Program, assert_as_unbroken, wait_for
from tests.support.warm import WarmProcess

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(2400)]

KILLS, STEPS = 20, 200
SETTINGS = (f"train.max_steps={STEPS}", "train.save_every=7", "train.valid_every=50", "data.workers=1")
LONG, EVERY = 2000, 100
LONG_SETTINGS = (
    f"train.max_steps={LONG}",
    "train.save_every=20",
    "train.valid_every=500",
    "data.workers=1",
)
PATIENCE = 1200.0


def test_twenty_kills_of_random_ranks_at_random_moments(inputs: Path, tally: Tally) -> None:
    """Rank 0, rank 1 or both at once: what is left ends by itself, and the next start goes on."""
    unbroken = Program(inputs, inputs / "unbroken", 2, SETTINGS)
    assert unbroken.finish(patience=PATIENCE) == 0, unbroken.said[-3000:]
    program = replace(unbroken, run=inputs / "killed")
    draw, slowest, named = random.Random(2022), 0.0, 0
    for number in range(KILLS):
        last = (STEPS - 5) * (number + 1) // KILLS
        # Beyond what earlier starts have logged, so that the ranks have met: a death before that is the
        # launcher's to see, and without one is said after 10 minutes.
        step = max(draw.randint(last - STEPS // KILLS, last), program.steps + 1)
        victims = draw.choice(((0,), (1,), (0, 1)))
        with program.running_ranks() as ranks:
            wait_for(lambda step=step: program.steps >= step, ranks[0], program.log)
            time.sleep(draw.uniform(0, 0.1))
            for victim in victims:
                os.kill(ranks[victim].pid, signal.SIGKILL)
            slowest = max(slowest, seconds_to_end(program, ranks))
            codes = [rank.wait(PATIENCE) for rank in ranks]
        assert all(codes[victim] == -signal.SIGKILL for victim in victims)
        assert 0 not in codes
        assert program.steps < STEPS
        named += len(victims) == 1
    assert program.finish(patience=PATIENCE) == 0, program.said[-3000:]
    assert_as_unbroken(program.run, unbroken.run, STEPS)
    # Where both were killed, the first one's death may have been told before the second kill.
    assert 5 < named <= program.said.count("error: another rank was lost") <= KILLS
    tally(f"random SIGKILLs in one run of {STEPS} steps on 2 ranks, then bitwise", f"{KILLS} of {KILLS}")
    tally("  the other rank gone, the dead one named", f"{named} of {named}")
    tally("  slowest end of the other rank", f"{slowest:.1f} s")


def seconds_to_end(program: Program, ranks: list[WarmProcess]) -> float:
    """Wait until all processes of the ranks are gone; those that stay must show where they stand."""
    try:
        return wait_until(lambda: not sessions(ranks), PATIENCE, "the end of all processes")
    except AssertionError as error:
        left = sessions(ranks)
        for pid in left:
            os.kill(pid, signal.SIGABRT)
        time.sleep(3)
        raise AssertionError(f"{error}: {left} of {[r.pid for r in ranks]}\n{program.said[-8000:]}") from None


def sessions(ranks: list[WarmProcess]) -> list[int]:
    """Every process that the ranks have started, themselves included."""
    return [pid for rank in ranks for pid in in_session(rank.pid)]


def test_memory_does_not_grow_in_2000_steps_with_a_kill_every_100(inputs: Path, tally: Tally) -> None:
    """At equal distances from their start, late processes of a run are as large as early ones.

    A process that is never killed must not grow either, from its 500th step to its last.
    """
    unbroken = Program(inputs, inputs / "unbroken-2000", settings=LONG_SETTINGS)
    with unbroken.running() as process:
        early = memory_between(unbroken, process, 500, 520)
        late = memory_between(unbroken, process, LONG - 60, LONG - 40)
        assert process.wait(PATIENCE) == 0
    program = replace(unbroken, run=inputs / "killed-2000")
    sizes = []
    for number in range(1, LONG // EVERY):
        start = program.checkpoint
        with program.running() as process:
            sizes.append(memory_between(program, process, start + 50, start + 70))
            wait_for(lambda n=number: program.steps >= n * EVERY, process, program.log, PATIENCE)
    assert program.finish(patience=PATIENCE) == 0, program.said[-3000:]
    assert_as_unbroken(program.run, unbroken.run, LONG)
    assert [line["step"] for line in read_metrics(program.run / "metrics.jsonl")] == list(range(1, LONG + 1))
    # The first start has nothing to resume from, so it is smaller.
    first, last = mean(sizes[1:5]), mean(sizes[-4:])
    tally(f"{LONG:,} steps with a SIGKILL every {EVERY}, then bitwise", f"{len(sizes)} kills")
    size = f"of {first / 1e6:.0f} MB"
    tally(f"  growth of resident memory, {size}, from starts 2-5 to the last 4", growth(first, last))
    tally("  growth in one process of 2,000 steps from step 500 on", growth(early, late))
    assert last < 1.01 * first
    assert late < 1.01 * early


def growth(before: float, after: float) -> str:
    return f"{after / before - 1:+.2%}"


def memory_between(program: Program, process: WarmProcess, first: int, last: int) -> float:
    """The mean size of the process while it does some steps, a sample a step."""
    sizes: list[int] = []
    for step in range(first, last + 1):
        reached: Callable[[], bool] = lambda step=step: program.steps >= step  # noqa: E731
        wait_for(reached, process, program.log, PATIENCE)
        sizes.append(resident(process.pid))
    return mean(sizes)
