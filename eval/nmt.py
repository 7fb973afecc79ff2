"""Score translations.

    python eval/nmt.py --predictions FILE --references FILE [--baseline FILE] [--output scores.json]

One sentence a line. Lines of subword-nmt ("@@ ") are joined. Without arguments: help and an example.
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
    add("--output", type=Path, metavar="FILE", help="write the scores as JSON, too")
    return parser


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
