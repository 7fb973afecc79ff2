"""Experiments of many runs: their text made, their stages started, resumed, and reported when they are done.

A run is a folder; each of its stages is one command, and leaves a mark there when it ended well. A driver
that is started again passes over what is marked and goes on with the rest. Training resumes by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from janus_ds.cli.arguments import at_least
from janus_ds.config.load import load_run_config
from janus_ds.config.locations import user_path
from janus_ds.errors import PREEMPTED_EXIT_CODE, JanusError, MissingDependencyError, UsageError
from janus_ds.io import make_folder, write_atomic

MARKS = {"train": "trained.json", "evaluate": "finished.json"}
"""The stages in their order, and what stands in the folder of a run that has passed them."""
_PAUSE = 0.2
ROOT = Path(__file__).resolve().parents[2]
"""The repository."""


def experiment_parser(
    description: str | None, root: str, runs: Sequence[str] = ()
) -> argparse.ArgumentParser:
    """A command line with what all experiments take.

    Args:
        description: the driver's docstring.
        root: name of the default folder below runs/.
        runs: their names, where some can be chosen, run at the same time, and put into tables.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add, lie = parser.add_argument, f"runs/{root}"
    add("--root", type=_folder, default=lie, help="where runs lie [%(default)s]")
    add("--limit", type=at_least(0), default=0, help="test sentences, for a trial; 0: all")
    add("--set", dest="overrides", nargs="+", action="extend", default=[], help="further overrides, all runs")
    if runs:
        add("--results", type=user_path, default=ROOT / "docs" / "results", help="where tables go")
        add("--report", action="store_true", help="only make the tables of what is there")
        add("--only", default=",".join(runs), help="runs, with what they start from [%(default)s]")
        cores = len(os.sched_getaffinity(0))
        add("--jobs", type=at_least(1), default=cores, help="runs at the same time [%(default)s]")
    return parser


def _folder(text: str) -> Path:
    return user_path(text).resolve()


@dataclass(frozen=True)
class Run:
    """A run of an experiment.

    Attributes:
        train: the command of its training.
        steps: updates asked for; a training that was ended at fewer goes on.
        start: the run whose weights it starts from.
        evaluate: the command of its evaluation; None: it is trained only.
        lines: test lines asked for, where evaluations differ in them.
        how: what else evaluations differ in.
    """

    train: list[str]
    steps: int
    start: str | None = None
    evaluate: list[str] | None = None
    lines: int = 0
    how: Mapping[str, Any] = field(default_factory=dict)

    def goal(self, stage: str) -> dict[str, Any]:
        """What the mark of a stage says was done; where it says less, or others, the stage is done again:
        training refuses what it cannot go on with."""
        given = self.train[self.train.index("--set") + 1 :] if "--set" in self.train else []
        settings = [word for word in given if not word.startswith("train.max_steps=")]
        lines = {"lines": self.lines} if self.lines else {}
        more = {**lines, **self.how} if stage == "evaluate" else {}
        return {"steps": self.steps, **more, **({"settings": settings} if settings else {})}


def run_experiment(
    options: argparse.Namespace,
    recipes: Mapping[Path, str | None],
    prepare: Callable[[argparse.Namespace], Iterable[list[str]]],
    runs: Callable[[argparse.Namespace], Mapping[str, Run]],
    report: Callable[[argparse.Namespace], object] = lambda options: None,
) -> int:
    """Prepare the data and run all stages that are left; the exit code.

    Args:
        options: of `experiment_parser`.
        recipes: and their mode. Overrides that no run can mean are refused before an hour is spent.
        prepare: makes text; gives the commands that make data of it.
        runs: gives them by name, each after what it starts from.
        report: makes the tables of what is there; all that is done with `--report`.
    """
    for recipe, mode in recipes.items():
        load_run_config(recipe, options.overrides, mode=mode)
    if getattr(options, "report", False):
        report(options)
        return 0
    make_folder(options.root)
    for command in prepare(options):
        run_logged(options.root, "data", command)
    return Driver(options.root, runs(options), getattr(options, "jobs", 1), lambda: report(options)).run()


def counted(path: Path, make: Callable[[], Mapping[str, Any]], **asked: object) -> dict[str, Any]:
    """What was counted when text was made, from a JSON file that is written when all of it is there.

    Args:
        path: the file; where it is, nothing is made again.
        make: writes the text into the file's folder and counts.
        asked: options that the text depends on.

    Raises:
        UsageError: the text was made with others.
    """
    if not path.is_file():
        make_folder(path.parent)
        write_atomic(path, (json.dumps({**make(), "asked": asked}) + "\n").encode())
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if found.pop("asked", asked) != asked:
        what = f"the text that is there was not made with {asked}"
        raise UsageError(what, str(path), "give the options that it was made with, or another --root")
    print(f"text: {found}", flush=True)
    return found


def product(program: str, *options: object) -> list[str]:
    """The command of a program of this repository, such as eval/nmt.py."""
    return [sys.executable, str(ROOT / program), *map(str, options)]


def training_command(program: str, recipe: Path, data: Path, run: Path, *options: object) -> list[str]:
    """The command of one training on one rank; its DeepSpeed file beside the run, partitions nothing."""
    engine = run.parent / "deepspeed.json"
    if not engine.is_file():
        engine.write_text('{"zero_optimization": {"stage": 0}}\n', encoding="utf-8")
    given = ("--recipe", recipe, "--deepspeed_config", engine, "--data", data, "--output", run)
    return product(f"launch/{program}.py", *given, *options)


def prepare_pairs_command(languages: tuple[str, str], output: Path, *options: object) -> list[str]:
    """The command that makes a data directory of pairs."""
    sides = ("--source-lang", languages[0], "--target-lang", languages[1])
    return product("launch/prepare_data.py", "--task", "nmt", *sides, *options, "--output", output)


def shared_text(name: str, what: str, holds: str) -> Path:
    """The folder of a text collection that lies outside the repository.

    Raises:
        MissingDependencyError: JANUS_SHARED_DATA does not lead to it.
    """
    given = os.environ.get("JANUS_SHARED_DATA")
    if not given or not (user_path(given) / name).is_dir():
        raise MissingDependencyError(
            f"{what} is not here" if given else f"the environment does not say where {what} is",
            f"JANUS_SHARED_DATA={given or ''}",
            f"set JANUS_SHARED_DATA to a folder with {name}/ ({holds})",
        )
    return user_path(given) / name


def shared_file(folder: Path, name: str) -> Path:
    """A file of such a folder, packed (`NAME.xz`) or not.

    Raises:
        MissingDependencyError: it is not there.
    """
    found = sorted(folder.glob(f"{name}*"))
    if not found:
        raise MissingDependencyError(f"there is no {name}", str(folder), "put that file there")
    return found[0]


def _started(log: Path, command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """A process whose output goes to the end of a file; one thread, so that runs do not fight for cores."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    _tell(f"{log.stem}, log in {log}")
    with log.open("ab") as file:
        return subprocess.Popen(list(command), env=env, stdout=file, stderr=file, **options)


def _tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class CommandError(JanusError):
    """A command of an experiment has failed; the experiment leaves with its exit code."""

    def __init__(self, log: Path, code: int) -> None:
        super().__init__(f"{log.stem} ended with {code}", str(log), "see the end of that file")
        self.exit_code = code  # type: ignore[misc]


def run_logged(folder: Path, name: str, command: Sequence[str]) -> None:
    """Run one command to its end, its output in FOLDER/NAME.log.

    Raises:
        CommandError: it failed.
    """
    log = folder / f"{name}.log"
    with _started(log, command) as process:
        code = process.wait()
    if code:
        raise CommandError(log, code)
    _tell(f"{name} ended with 0")


@dataclass
class Job:
    """A stage that is under way."""

    name: str
    stage: str
    process: subprocess.Popen[bytes]
    started: float


class Driver:
    """Starts stages, waits for them, and has the tables made.

    Args:
        folder: holds one folder a run.
        runs: by name, in this order; what they start from and is not trained must be among them, earlier.
        jobs: stages at the same time.
        report: makes the tables of what is there.
    """

    def __init__(
        self,
        folder: Path,
        runs: Mapping[str, Run],
        jobs: int = 1,
        report: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder, self._runs, self._slots, self._report = folder, runs, jobs, report
        self._waiting = [name for name in runs if self._next_stage(name) is not None]
        self._jobs: list[Job] = []
        self._failed = self._stopped = False

    def run(self) -> int:
        """All runs that are not finished; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        print(f"to do: {', '.join(self._waiting) or 'nothing'}", flush=True)
        while self._jobs or (self._waiting and not self._stopped):
            ready = [name for name in self._waiting if self._can_start(name)]
            if not ready and not self._jobs:
                # What they wait for has failed, or is not to be run.
                _tell(f"not run, since what they start from is missing: {', '.join(self._waiting)}")
                return 1
            if ready and len(self._jobs) < self._slots and not self._stopped:
                self._start(ready[0])
                continue
            time.sleep(_PAUSE)
            for job in [job for job in self._jobs if job.process.poll() is not None]:
                self._ended(job)
        return PREEMPTED_EXIT_CODE if self._stopped else int(self._failed)

    def _can_start(self, name: str) -> bool:
        start = self._runs[name].start
        return start is None or self._reached(start, "train")

    def _next_stage(self, name: str) -> str | None:
        """The first stage that is not done, unless the last one is."""
        last = "evaluate" if self._runs[name].evaluate else "train"
        if self._reached(name, last):
            return None
        return last if self._reached(name, "train") else "train"

    def _reached(self, name: str, stage: str) -> bool:
        """Whether a stage was done for as much as is asked for now; a longer run goes on."""
        mark = self._folder / name / MARKS[stage]
        if not mark.is_file():
            return False
        done, goal = json.loads(mark.read_text(encoding="utf-8")), {}
        if name in self._runs:
            goal = self._runs[name].goal(stage)
        # A mark without lines is of an evaluation of all; earlier versions told nothing but the numbers.
        numbers = {"steps", "lines"}
        enough = all(done.get(key, math.inf) >= goal.get(key, 0) for key in numbers)
        return enough and all(done[key] == goal[key] for key in goal.keys() & done.keys() - numbers)

    def _start(self, name: str) -> None:
        self._waiting.remove(name)
        run, stage = self._runs[name], self._next_stage(name) or "train"
        log = self._folder / name / f"{stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = run.train if stage == "train" else run.evaluate or []
        # A group of its own: Ctrl-C reaches the driver alone, which lets the runs save.
        process = _started(log, command, start_new_session=True)
        self._jobs.append(Job(name, stage, process, time.time()))

    def _ended(self, job: Job) -> None:
        self._jobs.remove(job)
        code, run = job.process.returncode, self._folder / job.name
        attempt = {"stage": job.stage, "seconds": round(time.time() - job.started, 1), "exit": code}
        with (run / "attempts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(attempt) + "\n")
        _tell(f"{job.name}: {job.stage} ended with {code}")
        if code:
            self._failed = True
            return
        mark = json.dumps(self._runs[job.name].goal(job.stage)) + "\n"
        write_atomic(run / MARKS[job.stage], mark.encode())
        if self._next_stage(job.name) is None:
            try:
                self._report()
            except JanusError as error:
                # The other runs go on; `--report` makes the tables when that is mended.
                self._failed = True
                _tell(str(error))
        else:
            self._waiting.insert(0, job.name)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        for job in self._jobs:
            # Training saves and leaves with 75; an evaluation is simply made again.
            job.process.send_signal(signal.SIGTERM)
