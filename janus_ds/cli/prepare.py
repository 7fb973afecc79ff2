"""The commands that make data directories: `launch/prepare_data.py` and `launch/prepare_glge.py`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from janus_ds.cli.arguments import at_least, program_parser, refuse_given
from janus_ds.config.locations import tokenizer_name, user_path
from janus_ds.data.prepare import pairs
from janus_ds.data.prepare.corpus import prepare
from janus_ds.data.prepare.pair_files import GLGE_LIMITS, pair_up, task_limits
from janus_ds.data.prepare.settings import (
    BPE_WORDS,
    NORMALIZATIONS,
    TOKENIZER_KINDS,
    GlgeSettings,
    Languages,
    Limits,
    PairSettings,
    PrepareSettings,
)
from janus_ds.data.prepare.writing import PrepareProgress, PrepareReport
from janus_ds.data.text.documents import DOCUMENT_RULES, INPUT_FORMATS, DocumentRule
from janus_ds.errors import UsageError
from janus_ds.progress import Progress

_SPLITS = ("train", "valid", "test")

_DATA = """\
Make a data directory of text files: tokenizer, shards, index, manifest.

    janus-ds prepare --input TEXT... --output DIR
    janus-ds prepare --task nmt --source-lang de --target-lang en --train train.de train.en \\
        --valid valid.de valid.en --test test.de test.en --output DIR
    janus-ds prepare --task nmt --distill RUN --data DIR --output DIR2

The first makes blocks of text for pretraining. The second makes pairs for translation. The third makes other
targets for such pairs: the translations of a run that decodes autoregressively, from which
non-autoregressive models learn more easily. Started again after an interruption with the same arguments,
the first and the third go on where they stopped.
"""

_GLGE = """\
Make a data directory of one GLGE task for fine-tuning: pairs, cut to the task's limits.

    janus-ds prepare glge --task xsum --input glge/easy/xsum_data \\
        --tokenizer runs/bart-base/tokenizer --output data/xsum

The input is the official layout, org_data/{train,dev,test}.{src,tgt}; the tokenizer that of the run to
start from. Test sets may come without .tgt.
"""


def _parse_data(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line.

    Raises:
        UsageError: an option of another task is given.
    """
    default = PrepareSettings()
    parser = program_parser(_DATA)
    names = ("denoise", "nmt", "nmt --distill")
    groups = {name: parser.add_argument_group(f"--task {name}") for name in names}
    shared = parser.add_argument_group("both tasks, without --distill")
    trained = parser.add_argument_group("both tasks, of a tokenizer that is trained")
    add = parser.add_argument
    add("--task", choices=("denoise", "nmt"), default="denoise", help="[%(default)s]")
    places = (
        "files, folders, patterns such as part-{00..99}.txt, addresses, pipe:COMMAND; .gz .xz .zst .bz2 too"
    )
    add_text, add_shared = groups["denoise"].add_argument, shared.add_argument
    add_text("--input", nargs="+", metavar="PATH", help=places)
    add("--output", type=user_path, required=True, metavar="DIR", help="the data directory to make")
    kinds = (
        f"{', '.join(TOKENIZER_KINDS)}, denoiser, nmt: bpe-words (text that is BPE'd already), or a folder "
    )
    kinds += "with a tokenizer or with vocab.json and merges.txt [%(default)s]"
    add_shared("--tokenizer", type=tokenizer_name, default=default.tokenizer, metavar="NAME|DIR", help=kinds)
    _add_training_options(trained)
    add_text(
        "--block-tokens", type=int, default=default.block_tokens, help="without bos and eos [%(default)s]"
    )
    add_text("--valid-share", type=float, default=default.valid_share, help="of the documents [%(default)s]")
    add_text("--test-share", type=float, default=default.test_share, help="of the documents [%(default)s]")
    rule = default.rule
    add_text("--format", choices=INPUT_FORMATS, default=rule.format, help="of the input [%(default)s]")
    end = "what ends a document of text: a blank line, a line end, the end of the file [%(default)s]"
    add_text("--document", choices=DOCUMENT_RULES, default=rule.document, help=end)
    add_text("--field", default=rule.field, help="JSON field or Parquet column of the text [%(default)s]")
    add_shared("--samples-per-member", type=int, default=default.samples_per_member, help="[%(default)s]")
    add_shared("--members-per-shard", type=int, default=default.members_per_shard, help="[%(default)s]")
    _add_processes(add_shared)
    _add_pair_options(groups["nmt"])
    _add_distill_options(groups["nmt --distill"])
    parsed = parser.parse_args(argv)
    way = "nmt --distill" if parsed.distill is not None else parsed.task
    for name in names:
        if name != way:
            refuse_given(groups[name], parsed, f"--task {way}", f"prepare with --task {name}")
    if parsed.distill is not None:
        for group in (shared, trained):
            refuse_given(group, parsed, "--distill", "prepare text without --distill")
    if parsed.tokenizer == BPE_WORDS or Path(parsed.tokenizer).is_dir():
        fix = f"prepare with --tokenizer {' or '.join(TOKENIZER_KINDS)}"
        refuse_given(trained, parsed, f"--tokenizer {parsed.tokenizer}", fix)
    return parsed


def _add_processes(add: Callable[..., object]) -> None:
    cores = len(os.sched_getaffinity(0))
    add("--processes", type=at_least(1), default=cores, help="that tokenise [%(default)s]")


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, PrepareSettings()
    size = f"symbols [{default.vocab_size}; nmt {PairSettings.vocab_size}]"
    add("--vocab-size", type=int, help=size)
    most = "text to train it on [%(default)s]"
    add("--tokenizer-sample-mb", type=int, default=default.tokenizer_sample_mb, help=most)
    lossless = "identity (lossless) or nfkc [identity for Chinese, Japanese, Korean]"
    add("--normalization", choices=("auto", *NORMALIZATIONS), default="auto", help=lossless)


def _add_pair_options(group: argparse._ArgumentGroup) -> None:
    add, default = group.add_argument, PairSettings(Languages("", ""))
    add("--source-lang", metavar="LANG", help="such as de")
    add("--target-lang", metavar="LANG", help="such as en")
    for split in _SPLITS:
        both = "source and target file, in turn; or files of JSON or Parquet with both"
        add(f"--{split}", type=user_path, nargs="+", metavar="FILE", help=both)
    for side in ("source", "target"):
        named = f"{side}'s field of JSON or column of Parquet (default: named like the language, or {side})"
        add(f"--{side}-field", metavar="NAME", help=named)
    add("--lowercase", action="store_true", help="lower-case all text")
    add("--max-tokens", type=int, default=default.max_tokens, help="longest side of a pair [%(default)s]")
    longer = "leave out training pairs with a side of 10 words or more that is longer by this [%(default)s]"
    add("--max-ratio", type=float, default=default.max_ratio, help=longer)
    keep = "train on a pair as often as it stands there"
    add("--keep-duplicates", dest="duplicates", action="store_const", const="keep", help=keep)


def _add_distill_options(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--distill", type=user_path, metavar="RUN", help="the run or checkpoint that translates the sources")
    add("--data", type=user_path, metavar="DIR", help="the data directory whose training set is translated")
    add("--average", type=int, default=1, metavar="N", help="mean of the run's last N checkpoints")
    add("--beam", type=int, help="(default: as the run's recipe says)")
    add("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")


def _stages(line: Progress) -> Callable[[PrepareProgress], None]:
    """Shows how far a preparation is; each stage begins with a line."""
    stage = ""

    def show(progress: PrepareProgress) -> None:
        nonlocal stage
        # What comes from afar has no size, so that no share of it is known.
        known = progress.share > 0 and (progress.share < 1 or progress.text_bytes)
        text = f"{progress.stage}: {progress.share:.1%}" if known else f"{progress.stage} ..."
        if progress.text_bytes:
            text += f"  {progress.documents:,} documents  {progress.text_bytes / 1e6:,.1f} MB"
            text += f"  {progress.megabytes_per_second:.1f} MB/s"
        if progress.stage != stage:
            line.end()
        line.show(text, now=progress.stage != stage)
        stage = progress.stage

    return show


def _pairs_progress(line: Progress) -> Callable[[str, int], None]:
    """Shows how far a preparation is; a stage whose pairs are not counted is shown at once."""
    return lambda stage, count: line.show(
        f"{stage}: {count:,} pairs" if count else f"{stage} ...", now=not count
    )


def _split_report(report: PrepareReport, unit: str) -> None:
    """What was made, and of pairs what was left out."""
    if report.already_whole:
        print(f"{report.output} is whole already, nothing to do")
    for name, totals in report.manifest.splits.items():
        sizes = f"{totals.samples:>12,} {unit} {totals.tokens:>15,} tokens {totals.shards:>6,} shards"
        print(f"{name:<6} {sizes}")
        if unit == "pairs":
            for what, count in sorted(report.counts[name].items()):
                print(f"  {what.replace('_', ' '):<34} {count:>12,}")


def _block_report(report: PrepareReport) -> None:
    """What was made of text, and how fast."""
    _split_report(report, "blocks")
    for name, count in report.counts.items():
        print(f"{name.replace('_', ' '):<32} {count:>15,}")
    note = None
    if report.counts.get("validation_blocks_of_training_documents"):
        note = "no document was drawn for validation; its blocks are cut from the end of the training text"
    elif "valid" not in report.manifest.splits:
        note = "there is no validation split, which a run needs: give more text or a larger --valid-share"
    if note:
        print(f"note: {note}")
    done = report.done
    if done.seconds:
        print(
            f"{done.text_bytes / 1e6:,.1f} MB, {done.documents:,} documents in {done.seconds:.1f} s: "
            f"{done.megabytes_per_second:.1f} MB/s, {done.documents / done.seconds:,.0f} documents/s"
        )


def _given(kind: type, options: argparse.Namespace) -> dict[str, Any]:
    """Options that are named like fields of the settings; those that are not given keep their defaults."""
    values = {field.name: getattr(options, field.name, None) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def _prepare_text(options: argparse.Namespace) -> None:
    """Blocks of text."""
    if not options.input:
        raise UsageError("no input is given", "--input", "give at least one text file or folder")
    rule = DocumentRule(options.format, options.document, options.field)
    settings = PrepareSettings(rule=rule, **_given(PrepareSettings, options))
    with Progress() as line:
        report = prepare(options.input, options.output, settings, options.processes, _stages(line))
    if report.resumed:
        print("went on with an interrupted preparation")
    _block_report(report)


def _prepare_translation(options: argparse.Namespace) -> None:
    """Pairs of sentences."""
    # With a given tokenizer nothing is learned of the text: test sets alone can be prepared for a model.
    held_out_alone = bool(options.valid or options.test) and Path(options.tokenizer).is_dir()
    for name in ("source_lang", "target_lang", "train"):
        if not getattr(options, name) and not (name == "train" and held_out_alone):
            option = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"--task nmt needs {option}",
                "the command line",
                "give --source-lang de --target-lang en --train train.de train.en, for example",
            )
    languages = Languages(options.source_lang, options.target_lang)
    given = {split: getattr(options, split) for split in _SPLITS}
    fields = (options.source_field, options.target_field)
    files = {s: pair_up(paths, languages, f"--{s}", fields) for s, paths in given.items() if paths}
    settings = PairSettings(languages, **_given(PairSettings, options))
    with Progress() as line:
        show = _pairs_progress(line)
        report = pairs.prepare_pairs(files, options.output, settings, options.processes, show)
    _split_report(report, "pairs")


def _prepare_distilled(options: argparse.Namespace) -> None:
    """Pairs with a model's translations as targets."""
    if options.data is None:
        raise UsageError(
            "--distill takes the pairs of a data directory",
            "the command line",
            "give --data DIR, made by --task nmt before",
        )
    # What follows takes seconds to import, which other preparations need not pay.
    from janus_ds.decode.load import usable_device
    from janus_ds.evaluate.distill import DistillRequest, distill

    request = DistillRequest(
        options.data,
        options.distill,
        options.output,
        average=options.average,
        decode={} if options.beam is None else {"beam": options.beam},
        device=usable_device(options.device),
    )
    with Progress() as line:
        report = distill(request, lambda done, total: line.show(f"translating: {done:,} of {total:,} pairs"))
    _split_report(report, "pairs")


def prepare_data(argv: Sequence[str] | None = None) -> int:
    """Make a data directory of text or of parallel text; see its help."""
    options = _parse_data(argv)
    if options.distill is not None:
        _prepare_distilled(options)
    elif options.task == "nmt":
        _prepare_translation(options)
    else:
        _prepare_text(options)
    return 0


def _parse_glge(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line of GLGE's preparation."""
    parser = program_parser(_GLGE)
    add = parser.add_argument
    add("--task", required=True, metavar="TASK", help=", ".join(GLGE_LIMITS))
    add("--input", type=user_path, required=True, metavar="DIR", help="the task's folder")
    add("--tokenizer", type=user_path, required=True, metavar="DIR", help="folder of the tokenizer")
    add("--output", type=user_path, required=True, metavar="DIR", help="the data directory to make")
    add("--source-tokens", type=int, metavar="N", help="cut sources to N tokens, bos and eos not counted")
    add("--target-tokens", type=int, metavar="N", help="the same for targets [both: as the task's recipe]")
    add("--samples-per-member", type=int, default=GlgeSettings.samples_per_member, help="[%(default)s]")
    add("--members-per-shard", type=int, default=GlgeSettings.members_per_shard, help="[%(default)s]")
    _add_processes(add)
    return parser.parse_args(argv)


def prepare_glge(argv: Sequence[str] | None = None) -> int:
    """Make a data directory of one task of GLGE; see its help."""
    options = _parse_glge(argv)
    default = task_limits(options.task)
    limits = Limits(
        default.source if options.source_tokens is None else options.source_tokens,
        default.target if options.target_tokens is None else options.target_tokens,
    )
    settings = GlgeSettings(limits=limits, **_given(GlgeSettings, options))
    with Progress() as line:
        show = _pairs_progress(line)
        report = pairs.prepare_glge(options.input, options.output, settings, options.processes, show)
    _split_report(report, "pairs")
    return 0
