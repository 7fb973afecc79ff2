"""Score GLGE's tasks as the official scripts do.

    python eval/glge.py --task xsum --predictions FILE --references FILE [--sources FILE] [--output JSON]
    python eval/glge.py --task xsum --predictions FILE --data glge/easy
    python eval/glge.py --task all  --predictions FOLDER --data glge/easy

Tasks: cnndm, gigaword, xsum, msnews, squadqg, msqg, coqa, personachat. --data is the folder of one level in
the official layout (xsum_data/org_data/test.tgt); the files of a folder are named as in submissions
(xsum.easy.test). Question generation needs the sources, or else every line counts as an item. METEOR needs
Java and pycocoevalcap. Without arguments: help and an example.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from janus_ds.errors import UsageError, exit_on_error
from janus_ds.metrics.files import read_lines
from janus_ds.metrics.glge import Task, combine, score_task, task_named
from janus_ds.metrics.glge_files import find_predictions, read_texts
from janus_ds.metrics.glge_metrics import Meteor, TaskTexts, choose_meteor
from janus_ds.metrics.scores import Scores, render, save_json

SAMPLES = Path(__file__).parent / "samples"
ALL = "all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Score what was asked for; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        print(f"{(__doc__ or '').strip()}\n\nTry it:\n    {_example()}\n\nAll options: --help")
        return 0
    parsed = _parser().parse_args(given)
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
    add("--predictions", type=Path, metavar="PATH", help="one prediction a line; a folder for --task all")
    add("--references", type=Path, metavar="FILE", help="one reference for each prediction")
    add("--sources", type=Path, metavar="FILE", help="the inputs, which question generation groups by")
    add("--data", type=Path, metavar="FOLDER", help="references and sources in the official layout")
    add("--split", default="test", help="dev or test (default: test; the official script's is dev)")
    add("--output", type=Path, metavar="FILE", help="write the scores as JSON, too")
    add(
        "--meteor",
        choices=("auto", "require", "skip"),
        default="auto",
        help="what to do about METEOR: take it if it can be run (default), stop if not, or leave it out",
    )
    return parser


def _example() -> str:
    predictions, data = (os.path.relpath(SAMPLES / name) for name in ("submission", "glge"))
    return f"python {os.path.relpath(__file__)} --task all --predictions {predictions} --data {data}"


def score_files(parsed: argparse.Namespace) -> Scores:
    """Score-only mode for one task: files in, scores out."""
    if parsed.task is None:
        raise UsageError("--task is missing", "the command line", "give --task xsum, or another task, or all")
    task = task_named(parsed.task)
    if parsed.predictions is None:
        raise UsageError("--predictions is missing", "the command line", "give --predictions FILE")
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
    # All files first: a missing one is told before minutes of scoring.
    texts = {task.name: read_texts(task, path, parsed.data, parsed.split) for task, path in tasks.items()}
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


if __name__ == "__main__":
    exit_on_error(main)
