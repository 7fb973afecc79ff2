"""Make a data directory of one GLGE task for fine-tuning: pairs, cut to the task's limits.

    python launch/prepare_glge.py --task xsum --input glge/easy/xsum_data \\
        --tokenizer runs/bart-base/tokenizer --output data/xsum

The input is the official layout, org_data/{train,dev,test}.{src,tgt}; the tokenizer that of the run to
start from. Test sets may come without .tgt.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from janus_ds.data.prepare.pair_files import GLGE_LIMITS, task_limits
from janus_ds.data.prepare.pairs import PairReport, prepare_glge
from janus_ds.data.prepare.settings import GlgeSettings, Limits
from janus_ds.errors import exit_on_error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--task", required=True, metavar="TASK", help=", ".join(GLGE_LIMITS))
    add("--input", type=Path, required=True, metavar="DIR", help="the task's folder")
    add("--tokenizer", type=Path, required=True, metavar="DIR", help="folder of the tokenizer")
    add("--output", type=Path, required=True, metavar="DIR", help="the data directory to make")
    add("--source-tokens", type=int, metavar="N", help="cut sources to N tokens, bos and eos not counted")
    add("--target-tokens", type=int, metavar="N", help="the same for targets [both: as the task's recipe]")
    add("--samples-per-member", type=int, default=256, help="[%(default)s]")
    add("--members-per-shard", type=int, default=128, help="[%(default)s]")
    add("--processes", type=int, default=os.cpu_count() or 1, help="that tokenise [%(default)s]")
    return parser.parse_args(arguments)


def print_report(report: PairReport) -> None:
    """What was made and what was cut."""
    if report.already_whole:
        print(f"{report.output} is whole already, nothing to do")
    for name, totals in report.manifest.splits.items():
        print(f"{name:<6} {totals.samples:>12,} pairs {totals.tokens:>15,} tokens {totals.shards:>6,} shards")
        for what, count in sorted(report.counts[name].items()):
            print(f"  {what.replace('_', ' '):<34} {count:>12,}")


def show(split: str, pairs: int) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"{split}: {pairs:,} pairs".ljust(79), end="\r", file=sys.stderr, flush=True)


def main() -> int:
    """Parse, prepare, report."""
    options = parse()
    default = task_limits(options.task)
    limits = Limits(
        default.source if options.source_tokens is None else options.source_tokens,
        default.target if options.target_tokens is None else options.target_tokens,
    )
    settings = GlgeSettings(
        options.task, options.tokenizer, limits, options.samples_per_member, options.members_per_shard
    )
    print_report(prepare_glge(options.input, options.output, settings, options.processes, show))
    return 0


if __name__ == "__main__":
    exit_on_error(main)
