"""Translate with a checkpoint and score, or score translations that are there.

    python eval/nmt.py --checkpoint RUN [--average 5] [--modes ar,nar] [--iterations 0,1,4,10] [--split test]
    python eval/nmt.py --predictions FILE --references FILE [--baseline FILE] [--output scores.json]

The first writes hypotheses and scores to RUN/eval/SPLIT (or --output DIR) and prints one table. Files have
one sentence a line; lines of subword-nmt ("@@ ") are joined. Without arguments: help and an example.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_ds.errors import UsageError, exit_on_error
from janus_ds.metrics.files import read_lines
from janus_ds.metrics.scores import Scores, render, save_json
from janus_ds.metrics.translation import compare_translations, score_translations

SAMPLES = Path(__file__).parent / "samples" / "nmt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Score what was asked for; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        print(f"{(__doc__ or '').strip()}\n\nTry it:\n    {_example()}\n\nAll options: --help")
        return 0
    parsed = _parser().parse_args(given)
    if parsed.checkpoint is not None:
        return _evaluate_checkpoint(parsed)
    scores = score_files(parsed)
    print("\n".join([render(scores), *_significance_lines(scores)]))
    if parsed.output is not None:
        save_json(parsed.output, scores.as_dict())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--predictions", type=Path, metavar="FILE", help="translations to score, one a line")
    add("--references", type=Path, metavar="FILE", help="reference translations, one for each")
    add("--baseline", type=Path, metavar="FILE", help="another system's translations: paired bootstrap")
    add("--split", default="test", help="name of the split, for the scores (default: test)")
    add(
        "--output",
        type=Path,
        metavar="PATH",
        help="write the scores as JSON, too; with --checkpoint a folder",
    )
    group = parser.add_argument_group("translate with a checkpoint")
    add = group.add_argument
    add("--checkpoint", type=Path, metavar="RUN", help="a run folder, or one of its checkpoints")
    add("--average", type=int, default=1, metavar="N", help="mean of the run's last N checkpoints")
    add("--modes", default="", help="ar, nar, or ar,nar (default: all that the run was trained for)")
    add("--iterations", default="0,1,4,10", help="NAR refinements, one system each (default: 0,1,4,10)")
    add("--data", type=Path, metavar="DIR", help="data directory (default: where it lay in training)")
    add("--beam", type=int, help="AR: beam (default: as the run's recipe says)")
    add("--length-beam", type=int, help="NAR: length candidates (default: as the run's recipe says)")
    add("--limit", type=int, default=0, metavar="N", help="the first N sentences only")
    add("--latency-sentences", type=int, default=50, metavar="N", help="decoded one by one for ms/sentence")
    add("--device", help="cpu, cuda, ... (default: the first GPU, or else the CPU)")
    return parser


def _evaluate_checkpoint(parsed: argparse.Namespace) -> int:
    """Checkpoint mode: what is imported for it takes seconds, which scoring files need not pay."""
    import torch

    from janus_ds.tools.translate_eval import EvalRequest, evaluate, results_table

    decode = {"beam": parsed.beam, "length_beam": parsed.length_beam}
    request = EvalRequest(
        checkpoint=parsed.checkpoint,
        average=parsed.average,
        modes=tuple(dict.fromkeys(mode.strip() for mode in parsed.modes.split(",") if mode.strip())),
        iterations=_numbers(parsed.iterations),
        split=parsed.split,
        data=parsed.data,
        output=parsed.output,
        decode={name: value for name, value in decode.items() if value is not None},
        limit=parsed.limit,
        latency_sentences=parsed.latency_sentences,
        baseline=parsed.baseline,
        device=parsed.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    results = evaluate(request, _show)
    print(results_table(results))
    signatures = {result.scores.signatures["sacrebleu"] for result in results}
    print("\n".join(f"sacreBLEU: {signature}" for signature in sorted(signatures)))
    warnings = dict.fromkeys(text for result in results for text in result.scores.warnings)
    print("\n".join(f"warning: {text}" for text in warnings), end="\n" if warnings else "")
    for result in results:
        lines = _significance_lines(result.scores)
        if lines:
            print("\n".join([f"{result.name} {lines[0]}", *lines[1:]]))
    print(f"hypotheses and scores are in {results[0].file.parent}" if results else "nothing to decode")
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(word) for word in text.split(",") if word.strip()))
    except ValueError:
        raise UsageError(
            f"{text!r} is not a list of numbers", "--iterations", "give 0 or more, such as 0,1,4,10"
        ) from None


def _show(system: str, done: int, total: int) -> None:
    if sys.stderr.isatty() and total > 1:
        end = "\n" if done == total else ""
        print(f"\r{system}: {done} of {total}", end=end, file=sys.stderr, flush=True)


def _example() -> str:
    sides = {"predictions": "system", "references": "reference", "baseline": "baseline"}
    files = [f"--{side} {os.path.relpath(SAMPLES / name)}.en" for side, name in sides.items()]
    return " ".join(["python", os.path.relpath(__file__), *files])


def score_files(parsed: argparse.Namespace) -> Scores:
    """Score-only mode: files in, scores out."""
    if parsed.predictions is None or parsed.references is None:
        missing = "--predictions" if parsed.predictions is None else "--references"
        raise UsageError(
            f"{missing} is missing", "the command line", "give --predictions FILE and --references FILE"
        )
    predictions, references = read_lines(parsed.predictions), read_lines(parsed.references)
    scores = score_translations(predictions, references, parsed.split)
    if parsed.baseline is None:
        return scores
    significance = compare_translations(predictions, references, read_lines(parsed.baseline))
    return replace(scores, extra={"significance": significance})


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


if __name__ == "__main__":
    exit_on_error(main)
