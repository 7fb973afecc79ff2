"""The driver of the experiments: what is run in which order, what is passed over, who is let save."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from driver import Driver, Run, counted, experiment_parser, shared_file

from janus_ds.errors import PREEMPTED_EXIT_CODE, DataError, MissingDependencyError, UsageError

pytestmark = pytest.mark.usefixtures("handlers_put_back")


class Made:
    """Runs that do nothing but leave a line in a file, or fail: one trained, three that start from it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.reports = folder, 0
        self.fault: DataError | None = None
        self.code: dict[str, str] = {}

    def driver(self, *names: str, jobs: int = 1, steps: int = 10) -> Driver:
        runs = {name: self._run(name, steps) for name in names}
        return Driver(self.folder, runs, jobs, self._report)

    def _report(self) -> None:
        self.reports += 1
        if self.fault is not None:
            raise self.fault

    def _run(self, name: str, steps: int) -> Run:
        def command(stage: str) -> list[str]:
            does = self.code.get(f"{name} {stage}", "")
            line = f"open({str(self.folder / 'done')!r}, 'a').write('{name} {stage}\\n')"
            return [sys.executable, "-S", "-c", f"{line}\n{does}"]

        start = "pre" if name in ("one", "two") else None
        return Run(command("train"), steps, start, None if name == "pre" else command("evaluate"))

    def done(self) -> list[str]:
        log = self.folder / "done"
        return log.read_text().splitlines() if log.is_file() else []


def test_a_driver_runs_stages_in_order_and_passes_over_what_is_done(tmp_path, capsys):
    plan = Made(tmp_path)
    assert plan.driver("pre", "one", "alone").run() == 0
    both = ["one train", "one evaluate", "alone train", "alone evaluate"]
    assert plan.done() == ["pre train", *both]
    assert plan.reports == 3
    assert json.loads((tmp_path / "one" / "finished.json").read_text()) == {"steps": 10}
    attempts = [json.loads(line) for line in (tmp_path / "one" / "attempts.jsonl").read_text().splitlines()]
    assert [(a["stage"], a["exit"]) for a in attempts] == [("train", 0), ("evaluate", 0)]

    assert plan.driver("pre", "one", "alone").run() == 0
    assert "to do: nothing" in capsys.readouterr().out
    assert len(plan.done()) == 5

    (tmp_path / "one" / "finished.json").unlink()
    assert plan.driver("pre", "one", "alone").run() == 0
    assert plan.done()[5:] == ["one evaluate"]

    assert plan.driver("alone", steps=20).run() == 0
    assert plan.done()[6:] == ["alone train", "alone evaluate"]


def test_what_starts_from_a_failed_run_is_not_run(tmp_path, capsys):
    plan = Made(tmp_path)
    plan.code["pre train"] = "raise SystemExit(3)"
    assert plan.driver("pre", "one", "two", "alone", jobs=2).run() == 1
    assert sorted(plan.done()) == ["alone evaluate", "alone train", "pre train"]
    assert "what they start from is missing: one, two" in capsys.readouterr().out
    assert not (tmp_path / "pre" / "trained.json").exists()


def test_tables_that_cannot_be_made_stop_no_run(tmp_path, capsys):
    plan = Made(tmp_path)
    plan.fault = DataError("two files differ", "here", "look")
    assert plan.driver("alone", "pre").run() == 1
    assert plan.done() == ["alone train", "alone evaluate", "pre train"]
    assert "error: two files differ" in capsys.readouterr().out


def test_an_evaluation_of_some_lines_is_none_of_all(tmp_path):
    def driver(lines: int) -> Driver:
        command = [sys.executable, "-S", "-c", ""]
        return Driver(tmp_path, {"one": Run(command, 10, evaluate=command, lines=lines)})

    mark = tmp_path / "one" / "finished.json"
    for lines, made in ((100, 100), (1000, 1000), (100, 1000)):
        assert driver(lines).run() == 0
        assert json.loads(mark.read_text()) == {"steps": 10, "lines": made}
    mark.write_text('{"steps": 10}')
    driver(1000).run()
    assert json.loads(mark.read_text()) == {"steps": 10}, "as earlier versions marked all"


def test_what_was_done_with_other_settings_is_done_again(tmp_path):
    done = tmp_path / "done"

    def stages(seed: int, average: int) -> list[str]:
        def command(stage: str) -> list[str]:
            return [sys.executable, "-S", "-c", f"open({str(done)!r}, 'a').write('{stage} ')", "--set"]

        train = [*command("train"), f"train.seed={seed}", "train.max_steps=10"]
        run = Run(train, 10, evaluate=command("evaluate"), how={"average": average})
        assert Driver(tmp_path, {"one": run}).run() == 0
        made = done.read_text().split() if done.is_file() else []
        done.unlink(missing_ok=True)
        return made

    assert stages(1, 5) == ["train", "evaluate"]
    assert stages(1, 5) == []
    assert stages(1, 3) == ["evaluate"]
    assert stages(2, 3) == ["train", "evaluate"], "training itself refuses what it cannot go on with"
    for name in ("trained", "finished"):
        (tmp_path / "one" / f"{name}.json").write_text('{"steps": 10}')
    assert stages(3, 8) == [], "earlier versions did not tell"


def test_text_that_was_made_with_other_options_is_refused(tmp_path):
    path = tmp_path / "text" / "counts.json"
    assert counted(path, lambda: {"pairs": 3}, megabytes=24) == {"pairs": 3}
    with pytest.raises(UsageError, match="'megabytes': 48"):
        counted(path, dict, megabytes=48)
    path.write_text('{"pairs": 4}')
    assert counted(path, dict, megabytes=48) == {"pairs": 4}


def test_options_of_all_experiments(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = experiment_parser("", "trial", ["one"])
    options = parser.parse_args(["--root=~/runs", "--results=~/pages"])
    assert (options.root, options.results) == (tmp_path / "runs", tmp_path / "pages")
    for given in (["--jobs", "0"], ["--limit", "-1"]):
        with pytest.raises(SystemExit):
            parser.parse_args(given)
        assert "is no whole number from" in capsys.readouterr().err


def test_a_file_that_is_missing_is_named(tmp_path):
    (tmp_path / "val.de.xz").touch()
    assert shared_file(tmp_path, "val.de") == tmp_path / "val.de.xz"
    with pytest.raises(MissingDependencyError, match=r"no train\.de"):
        shared_file(tmp_path, "train.de")


def test_a_driver_that_is_asked_to_stop_lets_the_run_save(tmp_path):
    plan = Made(tmp_path)
    plan.code["pre train"] = (
        "import os, signal, sys, time\n"
        f"def save(*a):\n    open({str(tmp_path / 'saved')!r}, 'w').close()\n"
        f"    os._exit({PREEMPTED_EXIT_CODE})\n"
        "signal.signal(signal.SIGTERM, save)\nos.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(600)"
    )
    assert plan.driver("pre", "one").run() == PREEMPTED_EXIT_CODE
    assert (tmp_path / "saved").exists()
    assert plan.done() == ["pre train"]
    assert not (tmp_path / "pre" / "trained.json").exists()
