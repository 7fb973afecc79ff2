"""The driver of the experiments: what is run in which order, what is passed over, who is let save."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from driver import Driver

from janus_ds.errors import PREEMPTED_EXIT_CODE


@pytest.fixture(autouse=True)
def _pytests_handlers() -> Iterator[None]:
    """Signal handlers stay pytest's."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Made:
    """A plan of runs that do nothing but leave a file, or fail."""

    def __init__(self, folder: Path, needs: dict[str, Sequence[str]], steps: int = 10) -> None:
        self.folder = folder
        self.steps = steps
        self.reports = 0
        self.code: dict[tuple[str, str], str] = {}
        self._needs = needs

    def stages(self, name: str) -> Sequence[str]:
        return ("train",) if name.startswith("pre") else ("train", "evaluate")

    def needs(self, name: str) -> Sequence[str]:
        return self._needs[name]

    def goal(self, name: str, stage: str) -> dict[str, int]:
        return {"steps": self.steps}

    def command(self, name: str, stage: str) -> list[str]:
        log = self.folder / "done"
        does = self.code.get((name, stage), "")
        return [sys.executable, "-S", "-c", f"open({str(log)!r}, 'a').write('{name} {stage}\\n')\n{does}"]

    def report(self) -> None:
        self.reports += 1

    def done(self) -> list[str]:
        log = self.folder / "done"
        return log.read_text().splitlines() if log.is_file() else []


NEEDS: dict[str, Sequence[str]] = {"pre": (), "one": ("pre",), "two": ("pre",), "alone": ()}


def test_a_driver_runs_stages_in_order_and_passes_over_what_is_done(tmp_path, capsys):
    plan = Made(tmp_path, NEEDS)
    assert Driver(plan, ["pre", "one", "pre", "alone"], 1).run() == 0
    both = ["one train", "one evaluate", "alone train", "alone evaluate"]
    assert plan.done() == ["pre train", *both]
    assert plan.reports == 3
    assert json.loads((tmp_path / "one" / "finished.json").read_text()) == {"steps": 10}
    attempts = [json.loads(line) for line in (tmp_path / "one" / "attempts.jsonl").read_text().splitlines()]
    assert [(a["stage"], a["exit"]) for a in attempts] == [("train", 0), ("evaluate", 0)]

    assert Driver(plan, ["pre", "one", "alone"], 1).run() == 0
    assert "to do: nothing" in capsys.readouterr().out
    assert len(plan.done()) == 5

    (tmp_path / "one" / "finished.json").unlink()
    assert Driver(plan, ["pre", "one", "alone"], 1).run() == 0
    assert plan.done()[5:] == ["one evaluate"]

    plan.steps = 20
    assert Driver(plan, ["alone"], 1).run() == 0
    assert plan.done()[6:] == ["alone train", "alone evaluate"]


def test_what_starts_from_a_failed_run_is_not_run(tmp_path, capsys):
    plan = Made(tmp_path, NEEDS)
    plan.code["pre", "train"] = "raise SystemExit(3)"
    assert Driver(plan, ["pre", "one", "two", "alone"], 2).run() == 1
    assert sorted(plan.done()) == ["alone evaluate", "alone train", "pre train"]
    assert "what they start from is missing: one, two" in capsys.readouterr().out
    assert not (tmp_path / "pre" / "trained.json").exists()


def test_a_driver_that_is_asked_to_stop_lets_the_run_save(tmp_path):
    plan = Made(tmp_path, NEEDS)
    plan.code["pre", "train"] = (
        "import os, signal, sys, time\n"
        f"def save(*a):\n    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
        f"    os._exit({PREEMPTED_EXIT_CODE})\n"
        "signal.signal(signal.SIGTERM, save)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)"
    )
    assert Driver(plan, ["pre", "one"], 1).run() == PREEMPTED_EXIT_CODE
    assert (tmp_path / "saved").exists()
    assert plan.done() == ["pre train"]
    assert not (tmp_path / "pre" / "trained.json").exists()
