"""Experiments of many runs: their stages started, resumed, and reported when they are done.

A run is a folder; each of its stages is one command, and leaves a mark there when it ended well. A driver
that is started again passes over what is marked and goes on with the rest. Training resumes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from janus_ds.errors import PREEMPTED_EXIT_CODE, MissingDependencyError

TRAINED, FINISHED = "trained.json", "finished.json"
"""Stand in the folder of a run that has been trained, and of one that has been evaluated too."""
TRAIN, EVALUATE = "train", "evaluate"
"""The stages, in their order; each has its log and its mark."""
MARKS = {TRAIN: TRAINED, EVALUATE: FINISHED}
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
    add = parser.add_argument
    add(
        "--root",
        type=lambda text: Path(text).resolve(),
        default=f"runs/{root}",
        help="where runs lie [%(default)s]",
    )
    add("--limit", type=int, default=0, help="test sentences, for a trial; 0: all")
    add("--set", dest="overrides", nargs="+", action="extend", default=[], help="further overrides, all runs")
    if runs:
        add("--results", type=Path, default=ROOT / "docs" / "results", help="where tables go")
        add("--report", action="store_true", help="only make the tables of what is there")
        add("--only", default=",".join(runs), help="runs, with what they start from [%(default)s]")
        add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time [%(default)s]")
    return parser


@dataclass(frozen=True)
class Run:
    """A run of an experiment.

    Attributes:
        train: the command of its training.
        steps: updates asked for; a training that was ended at fewer goes on.
        start: the run whose weights it starts from.
        evaluate: the command of its evaluation; None: it is trained only.
        lines: test lines asked for, where evaluations differ in them.
    """

    train: list[str]
    steps: int
    start: str | None = None
    evaluate: list[str] | None = None
    lines: int = 0

    def goal(self, stage: str) -> dict[str, int]:
        """What the mark of a stage says was done; where it says less, the stage is done again."""
        lines = {"lines": self.lines} if stage == EVALUATE and self.lines else {}
        return {"steps": self.steps, **lines}


def run_experiment(
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace], int],
    runs: Callable[[argparse.Namespace], Mapping[str, Run]],
    report: Callable[[argparse.Namespace], object],
) -> int:
    """Make the tables alone, or prepare the data (which gives an exit code) and run; the exit code."""
    if options.report:
        report(options)
        return 0
    options.root.mkdir(parents=True, exist_ok=True)
    return (
        prepare(options) or Driver(options.root, runs(options), options.jobs, lambda: report(options)).run()
    )


def product(program: str, *options: object) -> list[str]:
    """The command of a program of this repository, such as eval/nmt.py."""
    return [sys.executable, str(ROOT / program), *map(str, options)]


def environment() -> dict[str, str]:
    """One thread a run, so that runs do not fight for cores."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return {"OMP_NUM_THREADS": "1", **env}


def training_command(program: str, recipe: Path, data: Path, run: Path, *options: object) -> list[str]:
    """The command of one training on one rank; its DeepSpeed file beside the run, partitions nothing."""
    engine = run.parent / "deepspeed.json"
    if not engine.is_file():
        engine.write_text('{"zero_optimization": {"stage": 0}}\n', encoding="utf-8")
    given = ("--recipe", recipe, "--deepspeed_config", engine, "--data", data, "--output", run)
    return product(f"launch/{program}.py", *given, *options)


def shared_text(name: str, what: str, holds: str) -> Path:
    """The folder of a text collection that lies outside the repository.

    Raises:
        MissingDependencyError: JANUS_SHARED_DATA does not lead to it.
    """
    given = os.environ.get("JANUS_SHARED_DATA")
    if not given or not (Path(given) / name).is_dir():
        raise MissingDependencyError(
            f"{what} is not here" if given else f"the environment does not say where {what} is",
            f"JANUS_SHARED_DATA={given or ''}",
            f"set JANUS_SHARED_DATA to a folder with {name}/ ({holds})",
        )
    return Path(given) / name


def prepare_pairs_command(languages: tuple[str, str], output: Path, *options: str) -> list[str]:
    """The command that makes a data directory of pairs."""
    sides = ("--source-lang", languages[0], "--target-lang", languages[1])
    return product("launch/prepare_data.py", "--task", "nmt", *sides, *options, "--output", output)


def run_logged(folder: Path, name: str, command: Sequence[str]) -> int:
    """Run one command to its end, its output in FOLDER/NAME.log; the exit code."""
    log_path = folder / f"{name}.log"
    print(f"{time.strftime('%H:%M:%S')} {name}, log in {log_path}", flush=True)
    with log_path.open("ab") as log:
        code = subprocess.run(
            list(command), env=environment(), stdout=log, stderr=log, check=False
        ).returncode
    print(f"{time.strftime('%H:%M:%S')} {name} ended with {code}", flush=True)
    return code


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
        self._failed: list[str] = []
        self._stopped = False

    def run(self) -> int:
        """All runs that are not finished; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        print(f"to do: {', '.join(self._waiting) or 'nothing'}", flush=True)
        while self._jobs or (self._waiting and not self._stopped):
            self._fill()
            time.sleep(_PAUSE)
            for job in [job for job in self._jobs if job.process.poll() is not None]:
                self._jobs.remove(job)
                self._ended(job)
        return PREEMPTED_EXIT_CODE if self._stopped else len(self._failed) > 0

    def _fill(self) -> None:
        while self._waiting and len(self._jobs) < self._slots and not self._stopped:
            ready = [name for name in self._waiting if self._can_start(name)]
            if not ready and self._jobs:
                return
            if not ready:
                # What they wait for has failed, or is not to be run.
                print(
                    f"not run, since what they start from is missing: {', '.join(self._waiting)}", flush=True
                )
                self._failed += self._waiting
                self._waiting = []
                return
            self._waiting.remove(ready[0])
            stage = self._next_stage(ready[0])
            if stage is not None:
                self._start(ready[0], stage)

    def _can_start(self, name: str) -> bool:
        start = self._runs[name].start
        return start is None or self._reached(start, TRAIN)

    def _next_stage(self, name: str) -> str | None:
        """The first stage that is not done, unless the last one is."""
        last = EVALUATE if self._runs[name].evaluate else TRAIN
        if self._reached(name, last):
            return None
        return last if self._reached(name, TRAIN) else TRAIN

    def _reached(self, name: str, stage: str) -> bool:
        """Whether a stage was done for as much as is asked for now; a longer run goes on."""
        mark = self._folder / name / MARKS[stage]
        if not mark.is_file():
            return False
        done, goal = json.loads(mark.read_text(encoding="utf-8")), {}
        if name in self._runs:
            goal = self._runs[name].goal(stage)
        return all(int(done.get(key, 0)) >= value for key, value in goal.items())

    def _start(self, name: str, stage: str) -> None:
        run, command = self._folder / name, self._runs[name].train
        if stage == EVALUATE:
            command = self._runs[name].evaluate or []
        run.mkdir(parents=True, exist_ok=True)
        with (run / f"{stage}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        print(f"{time.strftime('%H:%M:%S')} {name}: {stage}, log in {run / f'{stage}.log'}", flush=True)
        self._jobs.append(Job(name, stage, process, time.time()))

    def _ended(self, job: Job) -> None:
        code, run = job.process.returncode, self._folder / job.name
        attempt = {"stage": job.stage, "seconds": round(time.time() - job.started, 1), "exit": code}
        with (run / "attempts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(attempt) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {job.name}: {job.stage} ended with {code}", flush=True)
        if code:
            if not self._stopped:
                self._failed.append(job.name)
            return
        mark = json.dumps(self._runs[job.name].goal(job.stage)) + "\n"
        (run / MARKS[job.stage]).write_text(mark, encoding="utf-8")
        following = self._next_stage(job.name)
        if following is None:
            self._report()
        elif not self._stopped:
            self._start(job.name, following)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        for job in self._jobs:
            # Training saves and leaves with 75; an evaluation is simply made again.
            job.process.send_signal(signal.SIGTERM)
