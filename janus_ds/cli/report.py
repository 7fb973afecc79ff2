"""One page about runs: tables, curves, quality against time, sample outputs side by side.

    janus-ds report runs/ar runs/cmlm runs/janus [--output report/] [--split test]

Reads run.json and metrics.jsonl of each run, and what eval/nmt.py wrote to RUN/eval/SPLIT (scores.json and
the outputs; a scores.json of eval/glge.py does as well). Writes report/index.html, which needs no other file
and no network, and its pictures as PNGs. What is missing is named on the page. Pictures need matplotlib.
Without arguments: this help.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from janus_ds.cli.arguments import program_parser
from janus_ds.report.page import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        print(f"{(__doc__ or '').strip()}\n\nAll options: --help")
        return 0
    parsed = _parser().parse_args(given)
    command = ["janus-ds", "report", *given]
    written = write_report(parsed.runs, parsed.output, parsed.split, parsed.samples, command)
    print(f"wrote {written[0]} and {len(written) - 1} pictures beside it")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = program_parser(__doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="*", metavar="RUN", help="run folders")
    add("--output", type=Path, default=Path("report"), metavar="DIR", help="where to write [%(default)s]")
    add("--split", default="test", help="whose scores [%(default)s]")
    add("--samples", type=int, default=6, metavar="N", help="test sentences shown; 0: none [%(default)s]")
    return parser
