"""Trains the demonstration model that the package ships: German to English, true-cased plain text.

    JANUS_SHARED_DATA=... python launch/experiments/demo_de_en.py              train, AR first, then JANUS
    JANUS_SHARED_DATA=... python launch/experiments/demo_de_en.py --ship       make the asset of what there is

Trained on Tatoeba sentences (CC BY 2.0 FR) and nothing else. Held-out parts share no sentence with training,
on either side. Started again, it resumes; asked to stop (SIGTERM, Ctrl-C), it lets the run save first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from demo_asset import add_asset_arguments, folder_bytes, ship, training_minutes
from demo_scores import score_all, write_page
from demo_text import split_pairs, write_splits
from driver import (
    ROOT,
    Driver,
    Run,
    experiment_parser,
    prepare_pairs_command,
    run_logged,
    shared_text,
    training_command,
)

from janus_ds.checkpoint.manifest import step_of
from janus_ds.config.load import load_run_config
from janus_ds.config.packaged import DEMO, model_path
from janus_ds.data.prepare.pair_files import PairFiles
from janus_ds.errors import exit_on_error

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


def prepare(options: argparse.Namespace) -> int:
    """Text, tokenizer and shards, unless they are there; the exit code."""
    root: Path = options.root
    text, made = root / "text", root / "text" / "counts.json"
    if not made.is_file():
        given = shared_text("tatoeba_de-en", "Tatoeba", "manythings2018.de.xz and manythings2018.en.xz")
        sides = [given / f"manythings2018.{language}.xz" for language in LANGUAGES]
        pairs = list(PairFiles(sides[0], sides[1]).read())
        splits = split_pairs(pairs, options.valid, options.test, options.joined, options.short_copies)
        write_splits(splits, text, LANGUAGES)
        counts = {"read": len(pairs), "train": len(splits.train), "joined": len(splits.joined)}
        counts |= {
            "short": len(splits.short),
            "valid": options.valid,
            "test": options.test,
            "left_out": splits.left_out,
        }
        made.write_text(json.dumps(counts) + "\n", encoding="utf-8")
    print(f"pairs: {made.read_text(encoding='utf-8').strip()}", flush=True)
    tokenizer = options.start / "tokenizer" if options.start else "sentencepiece-unigram"
    files = {split: [str(text / f"{split}.{side}") for side in LANGUAGES] for split in SPLITS}
    command = prepare_pairs_command(
        LANGUAGES,
        root / "data",
        *("--vocab-size", str(options.vocab), "--max-tokens", "94", "--tokenizer", str(tokenizer)),
        *("--train", *files["train"], "--valid", *files["valid"], "--test", *files["test"]),
    )
    return run_logged(root, "data", command)


SPLITS = ("train", "valid", "test")


def runs_of(options: argparse.Namespace) -> dict[str, Run]:
    """Both runs, the second from the first; with `--start` JANUS alone, from that model."""
    root, found = options.root, {}
    both = (("ar", options.ar_steps, AR), ("janus", options.janus_steps, ()))
    for name, steps, own in both[1:] if options.start else both:
        start = "ar" if name == "janus" and not options.start else None
        init = ("--init", root / start if start else options.start) if name == "janus" else ()
        given = ("--set", f"train.max_steps={steps}", f"name=demo-de-en-{name}", *own, *options.overrides)
        train = training_command("finetune", RECIPE, root / "data", root / name, *init, *given)
        found[name] = Run(train, steps, start)
    return found


def make_asset(options: argparse.Namespace) -> int:
    """The folder that the package ships, and its scores; the exit code."""
    counts = json.loads((options.root / "text" / "counts.json").read_text(encoding="utf-8"))
    about = {
        "driver": "launch/experiments/demo_de_en.py",
        "data": "Tatoeba sentence pairs by way of www.manythings.org/anki, CC BY 2.0 FR; see README.md",
        "pairs": counts,
        "minutes": {name: training_minutes(options.root / name) for name in runs_of(options)},
    }
    if options.start:
        # Of the model before; its mean of checkpoints was the start.
        record = json.loads((options.start / "run.json").read_text(encoding="utf-8"))
        about["started_from"] = record["training"]
        about["overrides"] = options.overrides
    else:
        about["ar_steps"] = _ar_steps(options.root / "ar")
    shipped = ship(options.root / "janus", options.asset, options.average, about)
    print(f"averaged steps {shipped['training']['averaged_steps']}", flush=True)
    code = score_all(options.asset, options.root, options.limit)
    if not code:
        write_page(options.asset, options.page)
    print(f"{options.asset}: {folder_bytes(options.asset):,} bytes", flush=True)
    return code


def _ar_steps(run: Path) -> int:
    return max((step_of(path) or 0 for path in run.glob("checkpoints/step-*")), default=0)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = experiment_parser(__doc__, "demo-de-en")
    add = parser.add_argument
    add("--ar-steps", type=int, default=5_000, help="updates of the first run [%(default)s]")
    add("--janus-steps", type=int, default=7_000, help="updates of the second run [%(default)s]")
    add("--start", type=Path, help="no AR run: JANUS goes on from this model, with its tokenizer")
    add("--vocab", type=int, default=5_000, help="symbols of the joint vocabulary [%(default)s]")
    add("--valid", type=int, default=1_000, help="held-out pairs for validation [%(default)s]")
    add("--test", type=int, default=2_000, help="held-out pairs for the test [%(default)s]")
    add("--joined", type=float, default=0.1, help="share of training pairs made of several [%(default)s]")
    add("--short-copies", type=int, default=2, help="copies of pairs of up to three words [%(default)s]")
    add_asset_arguments(parser, model_path(DEMO), "demo_de_en.md")
    return parser.parse_args(arguments)


def main() -> int:
    """Prepare and train, or ship."""
    options = parse()
    # Before an hour is spent: overrides that cannot be meant are refused here.
    load_run_config(RECIPE, options.overrides)
    options.root.mkdir(parents=True, exist_ok=True)
    if options.ship:
        return make_asset(options)
    return prepare(options) or Driver(options.root, runs_of(options)).run()


if __name__ == "__main__":
    exit_on_error(main)
