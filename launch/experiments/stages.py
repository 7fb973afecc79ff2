"""What the experiments' drivers share: the environment and engine of a run, and one stage after another."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from janus_ds.errors import PREEMPTED_EXIT_CODE, MissingDependencyError

__all__ = [
    "ROOT",
    "Stages",
    "engine_config",
    "environment",
    "experiment_parser",
    "prepare_pairs_command",
    "shared_text",
]

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""


def experiment_parser(description: str | None, root: str) -> argparse.ArgumentParser:
    """A command line with what all experiments take: where runs lie, where tables go, tables alone.

    Args:
        description: the driver's docstring.
        root: name of the default folder below runs/.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--root", type=Path, default=Path("runs", root), help="where runs lie [%(default)s]")
    add("--results", type=Path, default=ROOT / "docs" / "results", help="where tables go")
    add("--report", action="store_true", help="only make the tables of what is there")
    return parser


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
    source, target = languages
    return [
        sys.executable,
        str(ROOT / "launch" / "prepare_data.py"),
        *("--task", "nmt", "--source-lang", source, "--target-lang", target),
        *options,
        *("--output", str(output)),
    ]


class Stages:
    """Runs commands one after another, each with a log; asked to stop, lets the one at work save first.

    Args:
        folder: where the logs and `attempts.jsonl` go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self.stopped = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def run(self, name: str, command: Sequence[str]) -> int:
        """Run one stage; its exit code (75 where it was asked to stop)."""
        if self.stopped:
            return PREEMPTED_EXIT_CODE
        log_path, started = self._folder / f"{name}.log", time.time()
        print(f"{time.strftime('%H:%M:%S')} {name}, log in {log_path}", flush=True)
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                list(command), env=environment(), stdout=log, stderr=log, start_new_session=True
            )
            code = self._process.wait()
        self._process = None
        seconds = round(time.time() - started, 1)
        with (self._folder / "attempts.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": name, "seconds": seconds, "exit": code}) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {name} ended with {code}", flush=True)
        return code

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
