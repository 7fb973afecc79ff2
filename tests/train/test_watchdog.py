"""Which rank the others wait for, from what the ranks tell of themselves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from janus_ds.parallel.topology import Topology
from janus_ds.train import watchdog
from janus_ds.train.watchdog import RankStatus, Report, Watchdog, behind, frame_of, stalled

ALONE = Topology(torch.device("cpu"))


def report(number: int, age: float, **values: Any) -> Report:
    heard, silent = values.pop("heard", 0.0), values.pop("silent", False)
    return Report(RankStatus(number, "in the forward pass of step 7", age, 60.0, **values), heard, silent)


def test_the_rank_with_the_earliest_work_is_behind() -> None:
    assert behind({0: report(9, 70, waits=True), 1: report(8, 70), 2: report(9, 70)}) == [1]


def test_at_the_same_place_it_is_the_one_that_waits_for_nobody() -> None:
    waiting = report(9, 70, waits=True)
    assert behind({0: waiting, 1: waiting, 2: report(9, 70)}) == [2]
    assert behind({0: waiting, 1: waiting}) == [0, 1]


def test_a_silent_rank_comes_first_whatever_it_said_before() -> None:
    silent = report(10, 1, heard=70, silent=True)
    assert behind({0: report(9, 70), 1: silent}) == [1]
    assert str(silent).startswith("silent for 70 s (stopped, or its interpreter is held), last seen in the f")


def test_a_run_stalls_only_where_no_rank_makes_progress() -> None:
    assert stalled({0: report(9, 70), 1: report(8, 65)}) == 65
    # One rank scores outputs and the others wait for it: that is progress.
    assert stalled({0: report(9, 700), 1: report(9, 5)}) is None
    # The age of what was heard grows while nothing more comes.
    assert stalled({0: report(9, 70), 1: report(8, 5, heard=58)}) == 63
    slow = Report(RankStatus(9, "saving after step 7", 70, 180.0), 0.0, False)
    assert stalled({0: slow, 1: report(9, 70)}) is None


def test_the_frame_of_a_thread_that_waits() -> None:
    begun, release = threading.Event(), threading.Event()

    def hangs() -> None:
        begun.set()
        release.wait()

    thread = threading.Thread(target=hangs)
    thread.start()
    begun.wait()
    words, waits = frame_of(thread.ident or 0)
    release.set()
    thread.join()
    # Where it is called, not where the library waits.
    assert words.startswith("hangs (test_watchdog.py:")
    assert not waits
    assert frame_of(-1) == ("", False)


def test_without_progress_one_process_leaves_and_with_progress_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The clock is ours, and so is the end of the process."""
    now, codes = [1000.0], []  # type: ignore[var-annotated]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    dog = Watchdog(ALONE, None, tmp_path / "stacks", 60.0)
    dog._heard = {0: (now[0], RankStatus(0, "starting", 0.0, 180.0))}

    def after(seconds: float) -> list[int]:
        for _ in range(int(seconds)):
            now[0] += 1
            dog._looked = now[0]
            dog._look(now[0])
        return codes

    dog.enter("in the forward pass of step 7")
    assert after(59) == []
    dog.touch()
    assert after(59) == []
    written = [0]
    dog.enter("saving after step 7", slow=True, probe=lambda: written[0])
    assert after(170) == []
    written[0] = 8
    assert after(179) == []
    assert after(3) == [76]
    said = capsys.readouterr().err.lstrip()
    assert said.startswith(
        "error: no rank has made progress for 181 seconds\n  where: rank 0: saving after step 7"
    )
    assert f"to do: see {tmp_path}/stacks/rank0.txt for where it hangs" in said
    stacks = (tmp_path / "stacks/rank0.txt").read_text()
    assert "saving after step 7 for 181 s" in stacks
    assert "test_watchdog.py" in stacks


def test_work_that_ends_while_the_thread_looks_at_it_does_not_end_the_thread(tmp_path: Path) -> None:
    """The main thread takes the probe away right after the first look at it."""
    probes: Any = iter([lambda: 8, None])
    taken = property(lambda self: next(probes), lambda self, value: None)
    ending: Any = type("Ending", (Watchdog,), {"_probe": taken})
    assert ending(ALONE, None, tmp_path, 60.0)._status(1000.0).words == "starting"


def test_no_limit_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Watchdog(ALONE, None, tmp_path, 0.0) as dog:
        dog.enter("in the forward pass of step 7")
        assert set(threading.enumerate()) <= before
    # Several ranks without a line between them could only guess.
    with Watchdog(Topology(torch.device("cpu"), 0, 2), None, tmp_path, 60.0):
        assert set(threading.enumerate()) <= before
