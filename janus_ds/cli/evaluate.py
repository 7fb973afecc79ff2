"""`eval nmt` and `eval glge`: decode with a checkpoint and score, or score files that are there; `report`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from janus_ds.cli.arguments import (
    add_checkpoint_arguments,
    add_score_arguments,
    checkpoint_request,
    program_parser,
    refuse_given,
    systems_progress,
)
from janus_ds.config.locations import user_path
from janus_ds.errors import UsageError
from janus_ds.metrics.glge import (
    Meteor,
    Task,
    TaskTexts,
    choose_meteor,
    combine,
    find_predictions,
    read_texts,
    score_task,
    task_named,
)
from janus_ds.metrics.scores import Scores, read_lines, render, save_json
from janus_ds.metrics.translation import compare_translations, score_translations

if TYPE_CHECKING:
    from janus_ds.evaluate.evaluation import Evaluated

_ALL = "all"
_NMT = """\
Translate with a checkpoint and score, or score translations that are there.

    janus-ds eval nmt --checkpoint RUN [--average 5] [--modes ar,nar] [--iterations 0,1,4,10] [--split test]
    janus-ds eval nmt --predictions FILE --references FILE [--baseline FILE] [--output scores.json]

The first writes hypotheses and scores to RUN/eval/SPLIT (or --output DIR) and prints one table. Files have
one sentence a line; lines of subword-nmt ("@@ ") are joined.
"""
_REPORT = """\
One page about runs: tables, curves, quality against time, sample outputs side by side.

    janus-ds report runs/ar runs/cmlm runs/janus [--output report/] [--split test]

Reads run.json and metrics.jsonl of each run, and what eval/nmt.py wrote to RUN/eval/SPLIT (scores.json and
the outputs; a scores.json of eval/glge.py does as well). Writes report/index.html, which needs no other file
and no network, and its pictures as PNGs. What is missing is named on the page. Pictures need matplotlib.
Without arguments: this help.
"""
_GLGE = """\
Decode and score GLGE's tasks as the official scripts do, or score prediction files that are there.

    janus-ds eval glge --task xsum --checkpoint RUN [--mode ar,nar] [--iterations 0,1,4,10] [--data FOLDER]
    janus-ds eval glge --task xsum --predictions FILE --references FILE [--sources FILE] [--output JSON]
    janus-ds eval glge --task xsum --predictions FILE --data glge/easy
    janus-ds eval glge --task all  --predictions FOLDER --data glge/easy

Tasks: cnndm, gigaword, xsum, msnews, squadqg, msqg, coqa, personachat. The first form writes hypotheses and
scores.json to RUN/eval/SPLIT (or --output DIR), takes the best checkpoint where training kept one, and
measures milliseconds a sample one by one; its --data is a prepared directory or a folder in the official
layout (default: where the data lay in training). In the others --data is the folder of one level in the
official layout (xsum_data/org_data/test.tgt); the files of a folder are named as in submissions
(xsum.easy.test). Question generation needs the sources, or else every line counts as an item. METEOR needs
Java and pycocoevalcap.
"""


def evaluate_nmt(arguments: Sequence[str] | None = None) -> int:
    """Translate and score, or score translations that are there; returns the exit code."""
    return _evaluate(arguments, _NMT, _add_nmt_arguments, _decode_nmt, _score_nmt)


def evaluate_glge(arguments: Sequence[str] | None = None) -> int:
    """Decode and score a task of GLGE, or score predictions that are there; returns the exit code."""
    return _evaluate(arguments, _GLGE, _add_glge_arguments, _decode_glge, _score_glge)


def _evaluate(
    arguments: Sequence[str] | None,
    text: str,
    add: Callable[[argparse.ArgumentParser], argparse._ArgumentGroup],
    decode: Callable[[argparse.Namespace], int],
    score: Callable[[argparse.Namespace], tuple[Scores, str]],
) -> int:
    """Decode with a checkpoint, or score files, of which `score` gives the scores and what is told of them.

    `add` adds the program's options, and gives the group of those that need a checkpoint.
    """
    given = _given(arguments, text)
    if not given:
        return 0
    parser = program_parser(text)
    group = add(parser)
    parsed = parser.parse_args(given)
    if parsed.checkpoint is not None:
        return decode(parsed)
    refuse_given(group, parsed, "scoring files", "give --checkpoint RUN")
    scores, told = score(parsed)
    print(told)
    if parsed.output is not None:
        save_json(parsed.output, scores.as_dict())
    return 0


def _given(arguments: Sequence[str] | None, text: str) -> list[str]:
    """The command line; where it is empty, the program tells what it does."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        print(f"{text}\nAll options: --help")
    return given


def _add_nmt_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    add_score_arguments(parser, "translations to score, one a line", "reference translations, one for each")
    baseline = "another system's translations: paired bootstrap"
    parser.add_argument("--baseline", type=user_path, metavar="FILE", help=baseline)
    group = add_checkpoint_arguments(parser)
    data = "data directory (default: where it lay in training)"
    group.add_argument("--data", type=user_path, metavar="DIR", help=data)
    return group


def _decode_nmt(parsed: argparse.Namespace) -> int:
    """With a checkpoint: what is imported for it takes seconds, which scoring files need not pay."""
    _refuse_predictions(parsed)

    from janus_ds.evaluate.evaluation import results_table
    from janus_ds.evaluate.tasks import NMT_COLUMNS, evaluate

    request = replace(checkpoint_request(parsed), baseline=parsed.baseline)
    found = evaluate(request, systems_progress())
    signatures = {result.scores.signatures["sacrebleu"] for result in found.systems}
    lines = [
        results_table(found.systems, NMT_COLUMNS),
        *(f"sacreBLEU: {signature}" for signature in sorted(signatures)),
    ]
    compared = [(result.name, _significance_lines(result.scores)) for result in found.systems]
    return _tell(found, lines, [f"{name} " + "\n".join(told) for name, told in compared if told])


def _tell(found: Evaluated, lines: Iterable[str], further: Iterable[str]) -> int:
    """Print what an evaluation found: of what, lines, warnings, further lines, and where all of it lies."""
    if not found.systems:
        print("nothing to decode")
        return 0
    scores = found.systems[0].scores
    of = f"{scores.task}, {scores.split}, {scores.n:,} lines, weights {found.weights}"
    average = scores.extra["average"]
    of += f" and the {average - 1} before, averaged" if average > 1 else ""
    warned: dict[str, list[str]] = {}
    for result in found.systems:
        for text in dict.fromkeys(result.scores.warnings):
            warned.setdefault(text, []).append(result.name)
    # Which systems a warning is of, unless it is of all.
    named = [(f"{', '.join(s)}: " * (len(s) < len(found.systems)), text) for text, s in warned.items()]
    print("\n".join([of, *lines, *(f"warning: {of_some}{text}" for of_some, text in named), *further]))
    if found.removed:
        what = f"an earlier evaluation of other weights or sentences: {', '.join(found.removed)}"
        print(f"removed: the files of {what}")
    print(f"hypotheses and scores are in {found.systems[0].file.parent}")
    return 0


def _score_nmt(parsed: argparse.Namespace) -> tuple[Scores, str]:
    """Score-only mode: files in, scores out, and their table."""
    if parsed.predictions is None or parsed.references is None:
        missing = "--predictions" if parsed.predictions is None else "--references"
        raise UsageError(
            f"{missing} is missing", "the command line", "give --predictions FILE and --references FILE"
        )
    predictions, references = read_lines(parsed.predictions), read_lines(parsed.references)
    scores = score_translations(predictions, references, parsed.split)
    if parsed.baseline is not None:
        significance = compare_translations(predictions, references, read_lines(parsed.baseline))
        scores = replace(scores, extra={"significance": significance})
    return scores, "\n".join([render(scores), *_significance_lines(scores)])


def _significance_lines(scores: Scores) -> list[str]:
    found: dict[str, Any] = scores.extra.get("significance", {})
    parts = {name: part for name, part in found.items() if isinstance(part, dict)}
    lines = [
        f"  {name:<14}  {part['score']:.2f} against {part['baseline']:.2f}  "
        f"p = {part['p_moses']:.3f} (Moses), {part['p_sacrebleu']:.4f} (sacreBLEU)"
        for name, part in parts.items()
    ]
    if not lines:
        return []
    draws = f"paired bootstrap, {found['samples']} samples, seed {found['seed']}"
    return [f"against {found['baseline']}: {draws}", *lines]


def _add_glge_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    add = parser.add_argument
    add("--task", help="a task's name, or all")
    add_score_arguments(
        parser, "one prediction a line; a folder for --task all", "one reference for each prediction"
    )
    add("--sources", type=user_path, metavar="FILE", help="the inputs, which question generation groups by")
    add("--data", type=user_path, metavar="FOLDER", help="references and sources; see above")
    add(
        "--meteor",
        choices=("auto", "require", "skip"),
        default="auto",
        help="what to do about METEOR: take it if it can be run (default), stop if not, or leave it out",
    )
    group = add_checkpoint_arguments(parser)
    ar = "run whose AR is the 1.0x of the speed-ups (default: this run, if it was trained for AR)"
    group.add_argument("--ar-checkpoint", type=user_path, metavar="RUN", help=ar)
    return group


def _task(parsed: argparse.Namespace) -> Task:
    if parsed.task is None:
        raise UsageError("--task is missing", "the command line", "give --task xsum, or another task, or all")
    return task_named(parsed.task)


def _refuse_predictions(parsed: argparse.Namespace) -> None:
    files = ("predictions", "references", "sources")
    given = [f"--{name}" for name in files if getattr(parsed, name, None) is not None]
    if given:
        raise UsageError(
            "predictions are made with --checkpoint, not given",
            ", ".join(["--checkpoint", *given]),
            f"leave {' and '.join(given)} out, or --checkpoint",
        )


def _decode_glge(parsed: argparse.Namespace) -> int:
    """The same for a task of GLGE."""
    if parsed.task == _ALL:
        fix = "give the task that it was trained for, or --predictions FOLDER without --checkpoint"
        raise UsageError("a checkpoint is decoded for one task", "--task all, --checkpoint", fix)
    task = _task(parsed)
    _refuse_predictions(parsed)
    if parsed.ar_checkpoint is not None and not parsed.latency:
        fix = "leave one of the two out"
        where = "--ar-checkpoint, --latency-samples 0"
        raise UsageError("--ar-checkpoint is for speed-ups, and no latency is measured", where, fix)
    request = checkpoint_request(parsed)
    meteor = _meteor([task], parsed)

    from janus_ds.evaluate.evaluation import results_table
    from janus_ds.evaluate.tasks import evaluate_glge, with_best

    request = replace(request, checkpoint=with_best(parsed.checkpoint, parsed.average))
    found = evaluate_glge(request, task, meteor, parsed.latency, parsed.ar_checkpoint, systems_progress())
    lines = [results_table(found.systems, [*task.columns, "overall"])]
    for result in found.systems[:1]:
        lines += [f"  {name}: {how}" for name, how in result.scores.signatures.items()]
    return _tell(found, lines, [] if found.latency is None else ["", *found.latency.lines()])


def _score_glge(parsed: argparse.Namespace) -> tuple[Scores, str]:
    """Score-only mode, for a task or for all that a folder has predictions for."""
    if parsed.task == _ALL:
        found = _score_folder(parsed)
        scores = combine(found, parsed.split)
        return scores, "\n\n".join(render(part) for part in [*found, scores])
    task = _task(parsed)
    if parsed.predictions is None:
        raise UsageError(
            "--predictions is missing", "the command line", "give --predictions FILE, or --checkpoint RUN"
        )
    scores = score_task(task, _read(task, parsed), parsed.split, _meteor([task], parsed))
    return scores, render(scores)


def _read(task: Task, parsed: argparse.Namespace) -> TaskTexts:
    if parsed.references is None and parsed.data is None:
        raise UsageError(
            "the references are missing", "the command line", "give --references FILE, or --data glge/easy"
        )
    if parsed.references is not None and parsed.data is not None:
        raise UsageError("two places for the references", "--references, --data", "give one of the two")
    if parsed.references is None:
        _refuse_sources(parsed)
        return read_texts(task, parsed.predictions, parsed.data, parsed.split)
    sources = read_lines(parsed.sources) if parsed.sources is not None else None
    return TaskTexts(read_lines(parsed.predictions), read_lines(parsed.references), sources)


def _refuse_sources(parsed: argparse.Namespace) -> None:
    if parsed.sources is not None:
        raise UsageError("--data holds the sources too", "--sources, --data", "leave --sources out")


def _score_folder(parsed: argparse.Namespace) -> list[Scores]:
    _refuse_sources(parsed)
    if parsed.predictions is None or parsed.data is None or parsed.references is not None:
        raise UsageError(
            "--task all takes folders",
            "the command line",
            "give --predictions FOLDER --data FOLDER, and no --references",
        )
    files = find_predictions(parsed.predictions, parsed.split)
    tasks = {task_named(name): path for name, path in files.items()}
    # All files first: one that is missing or cut is told before minutes of scoring.
    texts = {task.name: read_texts(task, path, parsed.data, parsed.split) for task, path in tasks.items()}
    for found in texts.values():
        found.check()
    meteor = _meteor(list(tasks), parsed)
    return [score_task(task, texts[task.name], parsed.split, meteor) for task in tasks]


def _meteor(tasks: Sequence[Task], parsed: argparse.Namespace) -> Meteor:
    """METEOR if a task needs it; that it is missing is told at once, not only beside the scores."""
    if not any("meteor" in task.columns for task in tasks):
        return ""
    meteor = choose_meteor(parsed.meteor)
    if isinstance(meteor, str):
        print(f"note: METEOR will be missing: {meteor}", file=sys.stderr, flush=True)
    return meteor


def report(arguments: Sequence[str] | None = None) -> int:
    """Write a page about several runs; returns the exit code."""
    given = _given(arguments, _REPORT)
    if not given:
        return 0
    parser = program_parser(_REPORT)
    add = parser.add_argument
    add("runs", type=user_path, nargs="*", metavar="RUN", help="run folders")
    place = "where to write [%(default)s]"
    add("--output", type=user_path, default=Path("report"), metavar="DIR", help=place)
    add("--split", default="test", help="whose scores [%(default)s]")
    add("--samples", type=int, default=6, metavar="N", help="test sentences shown; 0: none [%(default)s]")
    parsed = parser.parse_args(given)
    from janus_ds.report.page import write_report

    command = ["janus-ds", "report", *given]
    written = write_report(parsed.runs, parsed.output, parsed.split, parsed.samples, command)
    print(f"wrote {written[0]} and {len(written) - 1} pictures beside it")
    return 0
