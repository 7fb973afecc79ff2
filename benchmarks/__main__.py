"""`python -m benchmarks KIND`: measurements, each in the module of its name; needs a checkout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from janus_ds.cli.arguments import new_parser
from janus_ds.errors import exit_on_error

_KINDS = {
    "train": "a JANUS step against a plain AR step at the same tokens, other objectives, the authors' way",
    "head": "the fused head against the plain losses: time and memory",
    "attention": "the back ends of self-attention against each other",
    "decode": "both ways of decoding against plain AR, transformers and CTranslate2",
    "packing": "a training step without padding between sentences against a padded one",
    "save": "how long training waits for a checkpoint, and how long one takes",
    "gpu": "what to run first on a GPU: is all right there, then the tables of the others",
    "data": "documents a second and core that the loader makes batches of",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one measurement; its own options follow its name."""
    parser = new_parser("bench", "; ".join(f"{name}: {text}" for name, text in _KINDS.items()))
    parser.add_argument("kind", choices=sorted(_KINDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="see `bench KIND --help`")
    parsed = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    code: int | None = import_module(f"benchmarks.{parsed.kind}").main(parsed.arguments)
    return code or 0


if __name__ == "__main__":
    exit_on_error(main)
