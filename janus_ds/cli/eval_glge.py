"""Decode and score GLGE's tasks as the official scripts do, or score prediction files that are there.

    python eval/glge.py --task xsum --checkpoint RUN [--mode ar,nar] [--iterations 0,1,4,10] [--data FOLDER]
    python eval/glge.py --task xsum --predictions FILE --references FILE [--sources FILE] [--output JSON]
    python eval/glge.py --task xsum --predictions FILE --data glge/easy
    python eval/glge.py --task all  --predictions FOLDER --data glge/easy

Tasks: cnndm, gigaword, xsum, msnews, squadqg, msqg, coqa, personachat. The first form writes hypotheses and
scores.json to RUN/eval/SPLIT (or --output DIR), takes the best checkpoint where training kept one, and
measures milliseconds a sample one by one; its --data is a prepared directory or a folder in the official
layout (default: where the data lay in training). In the others --data is the folder of one level in the
official layout (xsum_data/org_data/test.tgt); the files of a folder are named as in submissions
(xsum.easy.test). Question generation needs the sources, or else every line counts as an item. METEOR needs
Java and pycocoevalcap. Without arguments: help and an example.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from janus_ds.cli.arguments import (
    ProgressBars,
    add_checkpoint_arguments,
    add_score_arguments,
    checkpoint_request,
    help_text,
)
from janus_ds.errors import UsageError
from janus_ds.metrics.files import check_same_length, read_lines
from janus_ds.metrics.glge import Task, combine, find_predictions, read_texts, score_task, task_named
from janus_ds.metrics.glge_metrics import Meteor, TaskTexts, choose_meteor
from janus_ds.metrics.scores import Scores, render, save_json

SAMPLES = Path(__file__).parents[2] / "eval" / "samples"
ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Score what was asked for; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        files = ["--predictions", SAMPLES / "submission", "--data", SAMPLES / "glge"]
        print(help_text(__doc__, SAMPLES.parent / "glge.py", ["--task", ALL, *files]))
        return 0
    parsed = _parser().parse_args(given)
    if parsed.checkpoint is not None:
        return _evaluate_checkpoint(parsed)
    found = score_folder(parsed) if parsed.task == ALL else [score_files(parsed)]
    scores = combine(found, parsed.split) if parsed.task == ALL else found[0]
    print("\n\n".join(render(part) for part in ([*found, scores] if parsed.task == ALL else found)))
    if parsed.output is not None:
        save_json(parsed.output, scores.as_dict())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--task", help="a task's name, or all")
    add_score_arguments(
        parser, "one prediction a line; a folder for --task all", "one reference for each prediction"
    )
    add("--sources", type=Path, metavar="FILE", help="the inputs, which question generation groups by")
    add("--data", type=Path, metavar="FOLDER", help="references and sources; see above")
    add(
        "--meteor",
        choices=("auto", "require", "skip"),
        default="auto",
        help="what to do about METEOR: take it if it can be run (default), stop if not, or leave it out",
    )
    group = add_checkpoint_arguments(parser)
    ar = "run whose AR is the 1.0x of the speed-ups (default: this run, if it was trained for AR)"
    group.add_argument("--ar-checkpoint", type=Path, metavar="RUN", help=ar)
    return parser


def _task(parsed: argparse.Namespace) -> Task:
    if parsed.task is None:
        raise UsageError("--task is missing", "the command line", "give --task xsum, or another task, or all")
    return task_named(parsed.task)


def _evaluate_checkpoint(parsed: argparse.Namespace) -> int:
    """Checkpoint mode: what is imported for it takes seconds, which scoring files need not pay."""
    task = _task(parsed)
    if parsed.predictions is not None or parsed.references is not None:
        raise UsageError(
            "predictions are made with --checkpoint, not given",
            "--checkpoint, --predictions, --references",
            "leave --predictions and --references out, or --checkpoint",
        )
    request = checkpoint_request(parsed)
    meteor = _meteor([task], parsed)

    from janus_ds.evaluate.tasks import GlgeRequest, evaluate_glge, glge_table, with_best
    from janus_ds.evaluate.timing import LatencyPlan

    request = replace(request, checkpoint=with_best(parsed.checkpoint, parsed.average))
    plan = LatencyPlan(parsed.latency) if parsed.latency else None
    found = evaluate_glge(GlgeRequest(task, request, meteor, plan, parsed.ar_checkpoint), ProgressBars())
    if not found.results:
        print("nothing to decode")
        return 0
    scores = found.results[0].scores
    print(f"{task.name}, {scores.split}, {scores.n} lines, weights {found.checkpoint}")
    print(glge_table(task, found.results))
    print("\n".join(f"  {name}: {how}" for name, how in scores.signatures.items()))
    warnings = dict.fromkeys(text for result in found.results for text in result.scores.warnings)
    for text in warnings:
        print(f"warning: {text}")
    if found.latency is not None:
        print("\n".join(["", *found.latency.lines()]))
    print(f"hypotheses and scores are in {found.results[0].file.parent}")
    return 0


def score_files(parsed: argparse.Namespace) -> Scores:
    """Score-only mode for one task: files in, scores out."""
    task = _task(parsed)
    if parsed.predictions is None:
        raise UsageError(
            "--predictions is missing", "the command line", "give --predictions FILE, or --checkpoint RUN"
        )
    texts = _read(task, parsed)
    return score_task(task, texts, parsed.split, _meteor([task], parsed))


def _read(task: Task, parsed: argparse.Namespace) -> TaskTexts:
    if parsed.references is None and parsed.data is None:
        raise UsageError(
            "the references are missing", "the command line", "give --references FILE, or --data glge/easy"
        )
    if parsed.references is not None and parsed.data is not None:
        raise UsageError("two places for the references", "--references, --data", "give one of the two")
    if parsed.references is None:
        return read_texts(task, parsed.predictions, parsed.data, parsed.split)
    sources = read_lines(parsed.sources) if parsed.sources is not None else None
    return TaskTexts(read_lines(parsed.predictions), read_lines(parsed.references), sources)


def score_folder(parsed: argparse.Namespace) -> list[Scores]:
    """Score-only mode for all tasks that a folder has predictions for."""
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
        check_same_length(found.predictions, found.references)
    meteor = _meteor(list(tasks), parsed)
    return [score_task(task, texts[task.name], parsed.split, meteor) for task in tasks]


def _meteor(tasks: Sequence[Task], parsed: argparse.Namespace) -> Meteor:
    """METEOR if a task needs it; that it is missing is told at once, not only beside the scores."""
    if not any("meteor" in task.columns for task in tasks):
        return Meteor(None)
    meteor = choose_meteor(parsed.meteor)
    if meteor.program is None:
        print(f"note: METEOR will be missing: {meteor.why_not}", file=sys.stderr, flush=True)
    return meteor
