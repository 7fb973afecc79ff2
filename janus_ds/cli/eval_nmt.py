"""Translate with a checkpoint and score, or score translations that are there.

    python eval/nmt.py --checkpoint RUN [--average 5] [--modes ar,nar] [--iterations 0,1,4,10] [--split test]
    python eval/nmt.py --predictions FILE --references FILE [--baseline FILE] [--output scores.json]

The first writes hypotheses and scores to RUN/eval/SPLIT (or --output DIR) and prints one table. Files have
one sentence a line; lines of subword-nmt ("@@ ") are joined. Without arguments: help and an example.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from janus_ds.cli.arguments import (
    ProgressBars,
    add_checkpoint_arguments,
    add_score_arguments,
    checkpoint_request,
    help_text,
)
from janus_ds.errors import UsageError
from janus_ds.metrics.files import read_lines
from janus_ds.metrics.scores import Scores, render, save_json
from janus_ds.metrics.translation import compare_translations, score_translations

SAMPLES = Path(__file__).parents[2] / "eval" / "samples" / "nmt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Score what was asked for; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        sides = {"predictions": "system", "references": "reference", "baseline": "baseline"}
        files = [part for side, name in sides.items() for part in (f"--{side}", SAMPLES / f"{name}.en")]
        print(help_text(__doc__, SAMPLES.parents[1] / "nmt.py", files))
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
    add_score_arguments(parser, "translations to score, one a line", "reference translations, one for each")
    baseline = "another system's translations: paired bootstrap"
    parser.add_argument("--baseline", type=Path, metavar="FILE", help=baseline)
    group = add_checkpoint_arguments(parser)
    data = "data directory (default: where it lay in training)"
    group.add_argument("--data", type=Path, metavar="DIR", help=data)
    return parser


def _evaluate_checkpoint(parsed: argparse.Namespace) -> int:
    """Checkpoint mode: what is imported for it takes seconds, which scoring files need not pay."""
    from janus_ds.evaluate.tasks import evaluate, results_table

    request = replace(checkpoint_request(parsed), baseline=parsed.baseline)
    results = evaluate(request, ProgressBars())
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
