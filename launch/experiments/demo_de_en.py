"""Trains the demonstration model that the package ships: German to English, true-cased plain text.

    JANUS_SHARED_DATA=... python launch/experiments/demo_de_en.py              train, AR first, then JANUS
    JANUS_SHARED_DATA=... python launch/experiments/demo_de_en.py --ship       make the asset of what there is

Trained on Tatoeba sentences (CC BY 2.0 FR) and nothing else. Held-out parts share no sentence with training,
on either side. Started again, it resumes; asked to stop (SIGTERM, Ctrl-C), it lets the run save first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_asset import packaged_parser, ship_stages
from demo_scores import page, score_all
from demo_text import split_pairs, write_splits
from driver import (
    ROOT,
    Run,
    counted,
    prepare_pairs_command,
    run_experiment,
    shared_text,
    training_command,
)
from results import write_page

from janus_ds.checkpoint.manifest import step_of
from janus_ds.config.locations import DEMO, model_path
from janus_ds.data.prepare.pair_files import PairFiles
from janus_ds.errors import UsageError, exit_on_error
from janus_ds.observe import read_run_record

LANGUAGES = ("de", "en")
RECIPE = ROOT / "launch" / "recipes" / "nmt_demo.yaml"
AR = (
    "objective.preset=ar_query",
    "objective.ramp_kl_steps=0",
    "train.valid_bleu=ar",
    "train.keep_best=ar",
    "decode.mode=ar",
    "optim.lr=2.5e-3",
    "optim.warmup_steps=1000",
)
"""Overrides of the first run: the AR term of JANUS alone, so that its weights fit the second run."""


def prepare(options: argparse.Namespace) -> Iterator[list[str]]:
    """The text, and the command of the data directory."""
    text = options.root / "text"
    asked = {name: getattr(options, name) for name in ("valid", "test", "joined", "short_copies")}
    counted(text / "counts.json", lambda: write_text(options, text), **asked)
    trained = ("sentencepiece-unigram", "--vocab-size", options.vocab)
    tokenizer = (options.start / "tokenizer",) if options.start else trained
    splits = ("train", "valid", "test")
    files = [x for split in splits for x in (f"--{split}", *(text / f"{split}.{side}" for side in LANGUAGES))]
    how = ("--max-tokens", 94, "--tokenizer", *tokenizer)
    yield prepare_pairs_command(LANGUAGES, options.root / "data", *how, *files)


def write_text(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """Write the splits; what they hold."""
    given = shared_text("tatoeba_de-en", "Tatoeba", "manythings2018.de.xz and manythings2018.en.xz")
    sides = [given / f"manythings2018.{language}.xz" for language in LANGUAGES]
    pairs = list(PairFiles(sides[0], sides[1]).read())
    splits = split_pairs(pairs, options.valid, options.test, options.joined, options.short_copies)
    write_splits(splits, folder, LANGUAGES)
    parts = {name: len(getattr(splits, name)) for name in ("train", "joined", "short", "valid", "test")}
    return {"read": len(pairs), **parts, "left_out": splits.left_out}


def runs_of(options: argparse.Namespace) -> dict[str, Run]:
    """Both runs, the second from the first; with `--start` JANUS alone, from that model."""
    root, found = options.root, {}
    both = {"ar": (options.ar_steps, AR, None), "janus": (options.janus_steps, (), "ar")}
    if options.start:
        both = {"janus": (options.janus_steps, (), None)}
    for name, (steps, own, start) in both.items():
        init = ("--init", options.start or root / "ar") if name == "janus" else ()
        given = ("--set", f"train.max_steps={steps}", f"name=demo-de-en-{name}", *own, *options.overrides)
        train = training_command("finetune", RECIPE, root / "data", root / name, *init, *given)
        found[name] = Run(train, steps, start)
    return found


def make_asset(options: argparse.Namespace) -> None:
    """The folder that the package ships, its scores and their page."""
    ship_stages(options, ("janus",) if options.start else ("ar", "janus"), lambda: facts(options))
    score_all(options.asset, options.root, options.limit)
    write_page(options.page, page(options.asset))


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What the asset tells of its text and its training."""
    about: dict[str, Any] = {
        "driver": "launch/experiments/demo_de_en.py",
        "data": "Tatoeba sentence pairs by way of www.manythings.org/anki, CC BY 2.0 FR; see README.md",
        "pairs": json.loads((options.root / "text" / "counts.json").read_text(encoding="utf-8")),
    }
    if options.start:
        # Of the model before; its mean of checkpoints was the start.
        record = read_run_record(options.start) or {}
        about |= {"started_from": record["training"], "overrides": options.overrides}
    else:
        steps = [step_of(path) or 0 for path in (options.root / "ar").glob("checkpoints/step-*")]
        about["ar_steps"] = max(steps, default=0)
    return about


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = packaged_parser(__doc__, "demo-de-en", model_path(DEMO), "demo_de_en.md")
    add = parser.add_argument
    add("--ar-steps", type=int, default=5_000, help="updates of the first run [%(default)s]")
    add("--janus-steps", type=int, default=7_000, help="updates of the second run [%(default)s]")
    add(
        "--start",
        type=model_path,
        help="no AR run: JANUS goes on from this shipped model, with its tokenizer",
    )
    add("--vocab", type=int, default=5_000, help="symbols of the joint vocabulary [%(default)s]")
    add("--valid", type=int, default=1_000, help="held-out pairs for validation [%(default)s]")
    add("--test", type=int, default=2_000, help="held-out pairs for the test [%(default)s]")
    add("--joined", type=float, default=0.1, help="share of training pairs made of several [%(default)s]")
    add("--short-copies", type=int, default=2, help="copies of short pairs, with other ends [%(default)s]")
    options = parser.parse_args(arguments)
    if options.start and "training" not in (read_run_record(options.start) or {}):
        fix = "give a folder that `--ship` has made, or demo"
        raise UsageError("its run.json does not tell how it was trained", f"--start {options.start}", fix)
    return options


def main() -> int:
    """Prepare and train, or ship."""
    options = parse()
    if not options.ship:
        return run_experiment(options, {RECIPE: None}, prepare, runs_of)
    make_asset(options)
    return 0


if __name__ == "__main__":
    exit_on_error(main)
