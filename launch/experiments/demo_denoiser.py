"""Trains the small denoiser that the package ships, to start second-stage pretraining from.

    JANUS_SHARED_DATA=... python launch/experiments/demo_denoiser.py      train
    python launch/experiments/demo_denoiser.py --ship                     make the asset of what is trained
    python launch/experiments/demo_denoiser.py --quickstart RUN           the page, about such a run

Trained on English novels published by 1925 and on articles of Wikipedia. A novel of which one paragraph
stands in the bundled corpus is left out whole, so all of that corpus is new to the denoiser.
Two runs, the second from the first and with twice the batch. Started again, it resumes; asked to stop
(SIGTERM, Ctrl-C), it lets the run save first.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from demo_asset import packaged_parser, ship_stages
from demo_text import digest
from driver import (
    ROOT,
    Run,
    counted,
    product,
    run_experiment,
    run_logged,
    shared_text,
    training_command,
)
from results import render, write_page
from safetensors.torch import save
from torch.nn import functional

from janus_ds.checkpoint.manifest import WEIGHTS_FILE
from janus_ds.checkpoint.tensors import read_weights
from janus_ds.cli.blanks import WAYS, rare_words
from janus_ds.config.load import load_run_config
from janus_ds.config.locations import DENOISER, model_path, user_path
from janus_ds.data.text.documents import DocumentReader, DocumentRule
from janus_ds.decode.load import load_run
from janus_ds.errors import UsageError, exit_on_error
from janus_ds.io import make_folder, write_atomic
from janus_ds.observe import read_metrics

FIRST, LONGER = "denoiser", "longer"
LONGER_SETTINGS = ("train.global_batch=32", "optim.lr=2.0e-3", "train.valid_every=1000")
"""Overrides of the second run."""
RECIPE = ROOT / "launch" / "recipes" / "denoiser.yaml"
BUNDLED = ROOT / "janus_ds" / "assets" / "corpus" / "novels.txt.xz"
SOURCES = {
    "novels": ("pretrain_novels_en", "novels.txt.xz"),
    "wikipedia": ("pretrain_wikipedia_en", "wiki.txt.xz"),
}
POSITIONS = 128
"""Of the asset; those that its own blocks did not reach are zero."""
PIECE = 12_000
"""Characters of a novel that make a document, at most."""
_TELLING = 80
"""Characters of a paragraph that two books do not share by chance."""


def documents(path: Path) -> Iterator[list[str]]:
    """Paragraphs of each document; a blank line ends one."""
    for text, _ in DocumentReader([path], DocumentRule("text")).read():
        yield [line.strip() for line in text.split("\n")]


def without_bundled(novels: Iterable[list[str]]) -> Iterator[list[str]]:
    """Novels of which no paragraph stands in the bundled corpus."""
    bundled = {text for document in documents(BUNDLED) for text in document if len(text) > _TELLING}
    return (novel for novel in novels if bundled.isdisjoint(novel))


def pieces(paragraphs: list[str]) -> Iterator[str]:
    """A long document as several of up to PIECE characters; a longer paragraph is a document of its own."""
    taken: list[str] = []
    for paragraph in paragraphs:
        if taken and sum(map(len, taken)) + len(paragraph) > PIECE:
            yield "\n".join(taken)
            taken = []
        taken.append(paragraph)
    yield "\n".join(taken)


def draw(texts: Iterable[str], megabytes: float) -> list[str]:
    """So many megabytes of documents, chosen by hash."""
    ordered = sorted(texts, key=digest)
    sizes = accumulate(len(text.encode()) for text in ordered)
    return [text for text, size in zip(ordered, sizes, strict=True) if size <= megabytes * 1e6]


def write_text(path: Path, novels_mb: float, wikipedia_mb: float) -> dict[str, int]:
    """Write the training text, one paragraph a line; what it holds."""
    files = {name: shared_text(folder, name, file) / file for name, (folder, file) in SOURCES.items()}
    books = list(documents(files["novels"]))
    new = list(without_bundled(books))
    novels = draw((piece for book in new for piece in pieces(book)), novels_mb)
    articles = draw(map("\n".join, documents(files["wikipedia"])), wikipedia_mb)
    text = "\n\n".join(sorted([*novels, *articles], key=digest)) + "\n"
    write_atomic(path, text.encode())
    return {
        "novels": len(new),
        "novels_left_out": len(books) - len(new),
        "documents_of_novels": len(novels),
        "articles": len(articles),
        "bytes": len(text.encode()),
    }


def prepare(options: argparse.Namespace) -> Iterator[list[str]]:
    """The text, and the command of the data directory."""
    text = options.root / "text.txt"
    sizes = {"novels_mb": options.novels_mb, "wikipedia_mb": options.wikipedia_mb}
    counted(options.root / "counts.json", lambda: write_text(text, **sizes), **sizes)
    yield product(
        *("launch/prepare_data.py", "--input", text, "--output", options.root / "data", "--processes", 1),
        *("--tokenizer", "sentencepiece-unigram", "--vocab-size", options.vocab, "--tokenizer-sample-mb", 8),
        *("--block-tokens", load_run_config(RECIPE).data.block_tokens, "--valid-share", 0.01),
    )


def runs_of(options: argparse.Namespace) -> dict[str, Run]:
    """Both runs, the second from the first."""
    root, runs = options.root, {}
    for name, steps, own in ((FIRST, options.steps, ()), (LONGER, options.longer_steps, LONGER_SETTINGS)):
        start = FIRST if name == LONGER else None
        init = ("--init", root / start) if start else ()
        given = (*init, "--set", f"train.max_steps={steps}", *own, *options.overrides)
        runs[name] = Run(
            training_command("pretrain", RECIPE, root / "data", root / name, *given), steps, start
        )
    return runs


def make_asset(options: argparse.Namespace) -> None:
    """The folder that the package ships."""
    stages = (FIRST, LONGER)
    about = {
        "driver": "launch/experiments/demo_denoiser.py",
        "data": "English novels published by 1925, public domain; Wikipedia, CC BY-SA 3.0; see README.md",
        "held_out": {name: _held_out(options.root / name) for name in stages},
    }
    counts = options.root / "counts.json"
    ship_stages(options, stages, lambda: {**about, "text": json.loads(counts.read_text(encoding="utf-8"))})
    widen(options.asset, POSITIONS)


def widen(asset: Path, positions: int) -> None:
    """Give the asset further positions and lengths, all zero: room for longer blocks in later training."""
    weights = read_weights(asset / WEIGHTS_FILE)
    for name in ("encoder.positions.weight", "decoder.positions.weight", "length_head.weight"):
        weights[name] = functional.pad(weights[name], (0, 0, 0, positions - len(weights[name])))
    record = json.loads((asset / "run.json").read_text(encoding="utf-8"))
    sizes = dict.fromkeys(("max_source_positions", "max_target_positions", "length_classes"), positions)
    record["recipe"]["model"] |= sizes
    write_atomic(asset / WEIGHTS_FILE, save(weights, metadata={"format": "pt"}))
    write_atomic(asset / "run.json", (json.dumps(record, indent=1) + "\n").encode())
    load_run(asset)


def _held_out(run: Path) -> dict[str, float]:
    """Negative log-likelihood a token, in nats, of passages from the same sources, by step."""
    lines = read_metrics(run / "metrics.jsonl")
    return {str(line["step"]): round(line["valid/ar_nll"], 3) for line in lines if "valid/ar_nll" in line}


def make_page(options: argparse.Namespace) -> None:
    """The results page and its JSON, of the asset and of a run of `make pretrain`."""
    make_folder(options.root)
    figures = options.root / "blanks.json"
    measured = [sys.executable, "-m", "janus_ds", "blanks", str(options.quickstart), "--json", str(figures)]
    run_logged(options.root, "blanks", measured)
    training = json.loads((options.asset / "run.json").read_text(encoding="utf-8"))["training"]
    found = json.loads(figures.read_text(encoding="utf-8"))
    if "before" not in found:
        what = "what the run began with was not measured, which the page compares with"
        fix = f"see {options.root / 'blanks.log'}, or give a run of `make pretrain`"
        raise UsageError(what, f"--quickstart {options.quickstart}", fix)
    write_page(options.page, page(training, found), found)


def page(training: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The results page.

    Args:
        training: what `run.json` of the asset says of it.
        found: what `janus-ds blanks --json` wrote.
    """
    facts = {"training": training, "ways": WAYS, "rare_words": rare_words(found["rare"])}
    return render("demo_denoiser", found, **facts, longer_settings=LONGER_SETTINGS)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = packaged_parser(__doc__, "denoiser", model_path(DENOISER), "demo_denoiser.md")
    add = parser.add_argument
    add("--steps", type=int, default=8_000, help="updates of the first run [%(default)s]")
    add("--longer-steps", type=int, default=14_750, help="updates of the second run [%(default)s]")
    add("--vocab", type=int, default=4_000, help="symbols of the vocabulary [%(default)s]")
    add("--novels-mb", type=float, default=24, help="megabytes of novels [%(default)s]")
    add("--wikipedia-mb", type=float, default=8, help="megabytes of Wikipedia [%(default)s]")
    add(
        "--quickstart",
        type=user_path,
        metavar="RUN",
        help="only write the page, about this run of make pretrain",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Prepare and train, make the asset, or write the page."""
    options = parse()
    if options.quickstart:
        make_page(options)
    elif options.ship:
        make_asset(options)
    else:
        return run_experiment(options, {RECIPE: None}, prepare, runs_of)
    return 0


if __name__ == "__main__":
    exit_on_error(main)
