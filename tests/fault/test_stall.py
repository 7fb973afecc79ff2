"""A rank that hangs is named by the others' watchdogs, stacks are written, all ranks leave to start again."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from janus_ds.cli.train import train_and_exit
from janus_ds.config.deepspeed import TrainOptions
from janus_ds.data.stream.source import SampleSource
from janus_ds.errors import STALLED_EXIT_CODE
from janus_ds.observe import read_metrics
from janus_ds.train.signals import StopSignals
from tests.support.launch import PATIENCE, ROOT, Ended, let_ranks_end
from tests.support.processes import wait_until
from tests.support.tiny_training import make_inputs

ENDLESS = ("train.max_steps=1000000", "train.save_every=3", "train.valid_every=0")
LIMIT = 0.5
"""Minutes: a step of the tiny model on a machine that is busy with other things must not take so long."""


def hanging(folder: Path, rank: int | None) -> None:
    """Train; the given rank's sixth read of training data never returns."""
    if rank is not None and int(os.environ["RANK"]) == rank:
        SampleSource.read = _sleeping_read()  # type: ignore[method-assign]
    options = TrainOptions(
        deepspeed_config=ROOT / "ds_configs/zero2.json",
        recipe=folder / "recipe.yaml",
        overrides=(f"data.path={folder / 'data'}", *ENDLESS, f"train.stall_minutes={LIMIT}"),
        output=folder / "run",
        tensor_parallel=1,
    )
    raise SystemExit(train_and_exit(options, StopSignals()))


def _sleeping_read() -> Any:
    original, count = SampleSource.read, 0

    def read(self: SampleSource, ids: Any) -> Any:
        nonlocal count
        count += self.name.endswith("train")
        if count == 6:
            never_returns()
        return original(self, ids)

    return read


def never_returns() -> None:
    threading.Event().wait()


def stop_rank(run: Path, rank: int) -> Any:
    """SIGSTOP to one rank, once the run has made three steps."""

    def stop(pids: list[int]) -> None:
        metrics = run / "metrics.jsonl"
        wait_until(lambda: len(read_metrics(metrics)) >= 3, PATIENCE, "three steps")
        os.kill(pids[rank], signal.SIGSTOP)

    return stop


def assert_left(ranks: list[Ended], run: Path) -> str:
    """All have left with the code, none left a process behind, one of them has spoken; what it said."""
    texts = "\n".join(rank.text for rank in ranks)
    assert [rank.code for rank in ranks] == [STALLED_EXIT_CODE] * 2, texts
    assert not any(rank.leftovers for rank in ranks)
    assert texts.count("error: no rank has made progress for ") == 1, texts
    assert "Traceback" not in texts
    assert "another rank was lost" not in texts
    for rank in range(2):
        stacks = (run / f"stacks/rank{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank}, process ")
        # Its own threads among them.
        assert "in _watch" in stacks or "liveness.py" in stacks
        assert "trainer.py" in stacks
    assert "resumes from the last checkpoint" in texts
    return next(line for line in texts.splitlines() if line.startswith("  where: "))


def test_a_read_that_never_returns_is_named_with_its_stack(tmp_path: Path) -> None:
    folder = make_inputs(tmp_path)
    ranks = let_ranks_end(hanging, 2, folder, 1)
    where = assert_left(ranks, folder / "run")
    assert where.startswith("  where: rank 1 on "), where
    assert ": reading the data of step " in where
    assert " s, at never_returns (test_stall.py:" in where
    assert "the others wait, such as rank 0: beginning step " in where
    assert where.split("such as rank 0")[1].count(", at agree (topology.py:") == 1
    assert "never_returns" in (folder / "run/stacks/rank1.txt").read_text()
    assert "agree" in (folder / "run/stacks/rank0.txt").read_text()
    assert list((folder / "run/checkpoints").glob("step-*"))


@pytest.mark.heavy
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_process_is_named_by_the_others(tmp_path: Path, victim: int) -> None:
    """It cannot speak for itself. It is woken, hears that all is over, writes its stacks and leaves too."""
    folder = make_inputs(tmp_path)
    meanwhile = stop_rank(folder / "run", victim)
    ranks = let_ranks_end(hanging, 2, folder, None, meanwhile=meanwhile)
    where = assert_left(ranks, folder / "run")
    assert where.startswith(f"  where: rank {victim} on "), where
    assert ": silent for " in where
    assert f"the others wait, such as rank {1 - victim}: " in where
