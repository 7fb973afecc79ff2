"""`python -m benchmarks KIND`: measurements, each in the module of its name; needs a checkout.

Such a module has `SHARED`, which of the options that several have it takes; `ROUNDS`, their default number;
`add_options`, which adds its own; `bench`, which measures; and `describe`, the result in words.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from benchmarks.common import bench_parser, parse
from janus_ds.cli.arguments import new_parser
from janus_ds.errors import exit_on_error
from janus_ds.metrics.scores import save_json

_KINDS = {
    "train": "a JANUS step against a plain AR step at the same tokens, other objectives, the authors' way",
    "head": "the fused head against the plain losses: time and memory",
    "attention": "the back ends of self-attention against each other",
    "decode": "both ways of decoding against plain AR, transformers and CTranslate2",
    "save": "how long training waits for a checkpoint, and how long one takes",
    "gpu": "what to run first on a GPU: is all right there, then the tables of the others",
    "data": "documents a second and core that the loader makes batches of",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one measurement, print it, write its JSON if asked; 1 if it found something wrong."""
    parser = new_parser("bench", "; ".join(f"{name}: {text}" for name, text in _KINDS.items()))
    parser.add_argument("kind", choices=sorted(_KINDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see `bench KIND --help`")
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    module: Any = import_module(f"benchmarks.{given.kind}")
    own = bench_parser(given.kind, _KINDS[given.kind], *module.SHARED, rounds=module.ROUNDS)
    module.add_options(own)
    options = parse(own, given.arguments)
    result = module.bench(options)
    if text := module.describe(result):
        print(text)
    if options.json is not None:
        save_json(options.json, result)
    return int(bool(result.get("wrong")))


if __name__ == "__main__":
    exit_on_error(main)
