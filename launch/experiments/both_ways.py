"""Both ways at once, measured on the models of `make results-nmt`: drafts, rescored NAR, the dial.

    python launch/experiments/both_ways.py                                      (or: make results-both-ways)
    python launch/experiments/both_ways.py --only janus-s1 --limit 0
    python launch/experiments/both_ways.py --report                             the page alone

Runs that are not there, or were not trained for both ways, are left out. What was measured with the same
limits is kept: started again, only what is missing is done.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from stages import experiment_parser

from janus_ds.errors import UsageError, exit_on_error
from janus_ds.io import write_atomic
from janus_ds.tools.bench_common import hardware, versions
from janus_ds.tools.both_ways import BothWaysRequest, measure_run
from janus_ds.tools.both_ways_page import write_page

RUNS = ("janus-s1", "joint-s1", "released-s1")
LIMITS = ("limit", "timed", "rounds", "valid", "average")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = experiment_parser(__doc__, "results-nmt")
    add = parser.add_argument
    add("--direction", choices=("de-en", "en-de"), default="de-en", help="[%(default)s]")
    add("--only", default=",".join(RUNS), help="runs, in this order [%(default)s]")
    add("--limit", type=int, default=250, help="test sentences; 0: all [%(default)s]")
    add("--timed", type=int, default=32, help="sentences that times are taken of [%(default)s]")
    add("--rounds", type=int, default=3, help="how often each time is taken [%(default)s]")
    add(
        "--valid",
        type=int,
        default=250,
        help="validation sentences that settings are chosen on [%(default)s]",
    )
    add("--average", type=int, default=3, help="checkpoints averaged [%(default)s]")
    options = parser.parse_args(arguments)
    for name in LIMITS:
        if getattr(options, name) < (name != "limit"):
            raise UsageError(f"--{name} is {getattr(options, name)}", "the command line", "give 1 or more")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, write the page; the exit code."""
    options = parse(arguments)
    path = options.results / "both_ways.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    limits = {name: getattr(options, name) for name in LIMITS}
    torch.set_num_threads(1)
    runs = content.setdefault("runs", {})
    for name in [] if options.report else [name for name in options.only.split(",") if name]:
        folder = options.root / options.direction / name
        if runs.get(name, {}).get("limits") == limits:
            continue
        if not (folder / "trained.json").is_file():
            print(f"{name}: not trained yet, left out", file=sys.stderr, flush=True)
            continue
        runs[name] = {**measure_run(folder, BothWaysRequest(**limits), _tell), "limits": limits}
        content |= {"hardware": hardware(), "versions": versions(), "direction": options.direction}
        content["command"] = ["python", "launch/experiments/both_ways.py", *_limits(limits)]
        options.results.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    if not runs:
        raise UsageError("no run is trained yet", str(options.root), "make results-nmt first, or give --root")
    print(write_page(content, options.results))
    return 0


def _limits(limits: dict[str, int]) -> list[str]:
    return [word for name, value in limits.items() for word in (f"--{name}", str(value))]


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    exit_on_error(main)
