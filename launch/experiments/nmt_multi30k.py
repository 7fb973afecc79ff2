"""The Multi30k experiment: every training objective of the paper's Tables 1 and 6, on a CPU.

    JANUS_SHARED_DATA=... python launch/experiments/nmt_multi30k.py            (or: make results-nmt)
    python launch/experiments/nmt_multi30k.py --report                         the tables alone
    python launch/experiments/nmt_multi30k.py --only ar-s1,janus-s1 --steps 2000 --root runs/try

One run a core, in the order below. Started again, it skips what is finished and resumes what is not; asked to
stop (SIGTERM, Ctrl-C), it lets the runs save first. After each run the tables are made anew from what is
there. All runs have the same data, batches, masking law, number of updates and seed of their order.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from janus_ds.config.load import load_run_config
from janus_ds.errors import PREEMPTED_EXIT_CODE, MissingDependencyError, UsageError, exit_on_error
from janus_ds.tools.nmt_results import FINISHED, Experiment, write_results

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "launch" / "recipes" / "nmt_multi30k.yaml"
TRAINED = "trained.json"

NO_KL = ("objective.weight_kl_ar_nar=0", "objective.weight_kl_ar_aux=0", "objective.weight_kl_nar_aux=0")
VARIANTS: dict[str, tuple[str, ...]] = {
    "ar": ("objective.preset=ar", "train.valid_bleu=ar", "train.keep_best=ar", "decode.mode=ar"),
    "cmlm": ("objective.preset=cmlm", "train.valid_bleu=nar"),
    "janus": ("objective.preset=paper",),
    "released": ("objective.preset=released",),
    "joint": ("objective.preset=paper", "objective.weight_aux=0", *NO_KL),
    "aux": ("objective.preset=paper", "objective.weight_ar=0", "objective.weight_nar=0", *NO_KL),
}
"""Overrides of the recipe; all get the same masking besides."""
RUNS = ("ar-s1", "cmlm-s1", "janus-s1", "released-s1", "joint-s1", "aux-s1", "ar-s2", "janus-s2")
"""The most telling first."""


@dataclass
class Job:
    """A run that is under way."""

    name: str
    stage: str
    process: subprocess.Popen[bytes]
    started: float


class Driver:
    """Starts runs, waits for them, and makes the tables.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._folder = options.root / options.direction
        self._waiting = [name for name in options.only if not self._finished(name)]
        self._jobs: list[Job] = []
        self._failed: list[str] = []
        self._stopped = False

    def run(self) -> int:
        """All runs that are not finished; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        print(f"to do: {', '.join(self._waiting) or 'nothing'}", flush=True)
        while self._jobs or (self._waiting and not self._stopped):
            while self._waiting and len(self._jobs) < self._options.jobs and not self._stopped:
                name = self._waiting.pop(0)
                self._start(name, "evaluate" if self._trained(name) else "train")
            time.sleep(0.2)
            for job in [job for job in self._jobs if job.process.poll() is not None]:
                self._jobs.remove(job)
                self._ended(job)
        return PREEMPTED_EXIT_CODE if self._stopped else len(self._failed) > 0

    def report(self) -> None:
        """Make JSON and Markdown of what is there."""
        experiment = Experiment(self._folder, RUNS, self._options.direction, self._options.results)
        print(f"wrote {write_results(experiment)}", flush=True)

    def _finished(self, name: str) -> bool:
        return self._reached(self._folder / name / FINISHED)

    def _trained(self, name: str) -> bool:
        return self._reached(self._folder / name / TRAINED)

    def _reached(self, mark: Path) -> bool:
        """Whether a stage was done for as many updates as are asked for now; a longer run goes on."""
        if not mark.is_file():
            return False
        return int(json.loads(mark.read_text(encoding="utf-8"))["steps"]) >= self._options.steps

    def _start(self, name: str, stage: str) -> None:
        run = self._folder / name
        run.mkdir(parents=True, exist_ok=True)
        command = self._training(name, run) if stage == "train" else self._evaluation(run)
        with (run / f"{stage}.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=environment(), stdout=log, stderr=log, start_new_session=True
            )
        print(f"{time.strftime('%H:%M:%S')} {name}: {stage}, log in {run / f'{stage}.log'}", flush=True)
        self._jobs.append(Job(name, stage, process, time.time()))

    def _training(self, name: str, run: Path) -> list[str]:
        variant, seed = name.rsplit("-s", 1)
        options = self._options
        overrides = [
            f"name={name}",
            f"train.seed={seed}",
            f"train.max_steps={options.steps}",
            f"masking.target={options.masking}",
            f"masking.target_share={options.share}",
            *VARIANTS[variant],
            *options.overrides,
        ]
        return [
            sys.executable,
            str(ROOT / "launch" / "finetune.py"),
            *("--recipe", str(RECIPE), "--deepspeed_config", str(engine_config(self._folder))),
            *("--data", str(self._folder / "data"), "--output", str(run), "--set", *overrides),
        ]

    def _evaluation(self, run: Path) -> list[str]:
        options = self._options
        return [
            sys.executable,
            str(ROOT / "eval" / "nmt.py"),
            *("--checkpoint", str(run), "--average", str(options.average), "--split", "test"),
            *("--limit", str(options.limit), "--latency-sentences", str(min(50, options.limit or 50))),
        ]

    def _ended(self, job: Job) -> None:
        code, run = job.process.returncode, self._folder / job.name
        seconds, mark = time.time() - job.started, json.dumps({"steps": self._options.steps}) + "\n"
        with (run / "attempts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": job.stage, "seconds": round(seconds, 1), "exit": code}) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {job.name}: {job.stage} ended with {code}", flush=True)
        if code == 0 and job.stage == "train":
            (run / TRAINED).write_text(mark, encoding="utf-8")
            if not self._stopped:
                self._start(job.name, "evaluate")
        elif code == 0:
            (run / FINISHED).write_text(mark, encoding="utf-8")
            self.report()
        elif not self._stopped:
            self._failed.append(job.name)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        for job in self._jobs:
            # Training saves and leaves with 75; an evaluation is simply made again.
            job.process.send_signal(signal.SIGTERM)


def environment() -> dict[str, str]:
    """One thread a run, so that runs do not fight for cores."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return {"OMP_NUM_THREADS": "1", **env}


def engine_config(folder: Path) -> Path:
    """A DeepSpeed file for one rank: nothing is partitioned."""
    path = folder / "deepspeed.json"
    if not path.is_file():
        path.write_text('{"zero_optimization": {"stage": 0}}\n', encoding="utf-8")
    return path


def prepare(options: argparse.Namespace) -> None:
    """The data directory, unless it is there."""
    given = os.environ.get("JANUS_SHARED_DATA")
    if not given or not (Path(given) / "multi30k").is_dir():
        raise MissingDependencyError(
            "Multi30k is not here" if given else "the environment does not say where Multi30k is",
            f"JANUS_SHARED_DATA={given or ''}",
            "set JANUS_SHARED_DATA to a folder with multi30k/ (train, val and test_2016_flickr, .de and .en)",
        )
    text = Path(given) / "multi30k"
    source, target = options.direction.split("-")

    def pair(stem: str) -> list[str]:
        found = [sorted(text.glob(f"{stem}.{language}*")) for language in (source, target)]
        return [str(paths[0]) for paths in found if paths]

    folder = options.root / options.direction
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "launch" / "prepare_data.py"),
        *("--task", "nmt", "--source-lang", source, "--target-lang", target, "--lowercase"),
        *("--vocab-size", "4000", "--max-tokens", "126", "--tokenizer", "sentencepiece-bpe"),
        *("--train", *pair("train"), "--valid", *pair("val"), "--test", *pair("test_2016_flickr")),
        *("--output", str(folder / "data")),
    ]
    subprocess.run(command, env=environment(), check=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--root", type=Path, default=Path("runs", "results-nmt"), help="where runs lie [%(default)s]")
    add("--results", type=Path, default=ROOT / "docs" / "results", help="where tables go")
    add("--direction", choices=("de-en", "en-de"), default="de-en", help="[%(default)s]")
    add("--only", default=",".join(RUNS), help="runs, in this order [%(default)s]")
    add("--steps", type=int, default=16_000, help="updates of each run [%(default)s]")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time [%(default)s]")
    add("--masking", default="span_union", help="masking law of all runs [%(default)s]")
    add("--share", type=float, default=0.7, help="masked share of the target [%(default)s]")
    add("--average", type=int, default=5, help="checkpoints averaged for the scores [%(default)s]")
    add("--limit", type=int, default=0, help="test sentences, for a trial; 0: all")
    add("--set", dest="overrides", nargs="+", action="extend", default=[], help="further overrides, all runs")
    add("--report", action="store_true", help="only make the tables of what is there")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    for name in options.only:
        variant, _, seed = name.rpartition("-s")
        if variant not in VARIANTS or not seed.isdigit():
            raise UsageError(
                f"there is no run {name!r}", "--only", f"give VARIANT-sSEED, VARIANT of {', '.join(VARIANTS)}"
            )
    return options


def main() -> int:
    """Prepare, run, report."""
    options = parse()
    # Before an hour is spent: overrides that cannot be meant are refused here.
    load_run_config(RECIPE, options.overrides)
    driver = Driver(options)
    if options.report:
        driver.report()
        return 0
    prepare(options)
    return driver.run()


if __name__ == "__main__":
    exit_on_error(main)
