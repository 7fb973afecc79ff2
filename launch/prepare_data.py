"""Make a data directory of text files: tokenizer, shards, index, manifest.

    python launch/prepare_data.py --input TEXT... --output DIR

Started again after an interruption with the same arguments, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from janus_ds.data.prepare import (
    DOCUMENT_RULES,
    INPUT_FORMATS,
    TOKENIZER_KINDS,
    DocumentRule,
    Execution,
    PrepareProgress,
    PrepareReport,
    PrepareSettings,
    prepare,
)
from janus_ds.errors import exit_on_error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    default = PrepareSettings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders; .gz .xz .zst .bz2 too",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="the data directory to make")
    add(
        "--tokenizer",
        default=default.tokenizer,
        metavar="NAME|DIR",
        help=f"{', '.join(TOKENIZER_KINDS)}, or a folder with a tokenizer or with vocab.json and merges.txt",
    )
    add("--vocab-size", type=int, default=default.vocab_size, help="of a trained tokenizer [%(default)s]")
    add(
        "--tokenizer-sample-mb",
        type=int,
        default=default.tokenizer_sample_mb,
        help="text to train it on [%(default)s]",
    )
    add("--block-tokens", type=int, default=default.block_tokens, help="without bos and eos [%(default)s]")
    add("--valid-share", type=float, default=default.valid_share, help="of the documents [%(default)s]")
    add("--test-share", type=float, default=default.test_share, help="of the documents [%(default)s]")
    add("--format", choices=INPUT_FORMATS, default=default.rule.format, help="of the input [%(default)s]")
    add(
        "--document",
        choices=DOCUMENT_RULES,
        default=default.rule.document,
        help="what ends a document of text: a blank line, a line end, the end of the file [%(default)s]",
    )
    add("--field", default=default.rule.field, help="JSON field with the text [%(default)s]")
    add("--samples-per-member", type=int, default=default.samples_per_member, help="[%(default)s]")
    add("--members-per-shard", type=int, default=default.members_per_shard, help="[%(default)s]")
    add("--processes", type=int, default=os.cpu_count() or 1, help="that tokenise [%(default)s]")
    return parser.parse_args(arguments)


class ProgressLine:
    """Shows progress: one line that is written over on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._interval = 0.2 if self._terminal else 10.0
        self._last = time.monotonic()
        self._stage = ""

    def show(self, progress: PrepareProgress) -> None:
        """Print the line if it is time to."""
        now = time.monotonic()
        if now - self._last < self._interval and progress.stage == self._stage:
            return
        self._last, self._stage = now, progress.stage
        text = f"{progress.stage}: {progress.share:6.1%}"
        if progress.text_bytes:
            text += (
                f"  {progress.documents:,} documents  {progress.text_bytes / 1e6:,.1f} MB"
                f"  {progress.megabytes_per_second:.1f} MB/s"
            )
        end = "\r" if self._terminal else "\n"
        print(f"{text:<90}", end=end, file=sys.stderr, flush=True)


def print_report(report: PrepareReport) -> None:
    """What was made, for people."""
    if report.already_whole:
        print(f"{report.output} is whole already, nothing to do")
    for name, totals in report.manifest.splits.items():
        print(
            f"{name:<6} {totals.samples:>12,} blocks {totals.tokens:>15,} tokens {totals.shards:>6,} shards"
        )
    for name, count in report.counts.items():
        print(f"{name.replace('_', ' '):<32} {count:>15,}")
    done = report.done
    if done.seconds:
        print(
            f"{done.text_bytes / 1e6:,.1f} MB, {done.documents:,} documents in {done.seconds:.1f} s: "
            f"{done.megabytes_per_second:.1f} MB/s, {done.documents / done.seconds:,.0f} documents/s"
        )


def main() -> int:
    """Parse, prepare, report."""
    options = parse()
    settings = PrepareSettings(
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        tokenizer_sample_mb=options.tokenizer_sample_mb,
        block_tokens=options.block_tokens,
        valid_share=options.valid_share,
        test_share=options.test_share,
        rule=DocumentRule(options.format, options.document, options.field),
        samples_per_member=options.samples_per_member,
        members_per_shard=options.members_per_shard,
    )
    execution = Execution(processes=options.processes)
    report = prepare(options.input, options.output, settings, execution, ProgressLine().show)
    if report.resumed:
        print("went on with an interrupted preparation")
    print_report(report)
    return 0


if __name__ == "__main__":
    exit_on_error(main)
