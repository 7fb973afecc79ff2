"""Question generation from a small model pretrained here: the paper's Tables 7 and 8 in small, on a CPU.

    JANUS_SHARED_DATA=... python launch/experiments/glge_squadqg.py            (or: make results-glge)
    python launch/experiments/glge_squadqg.py --report                         the tables alone
    python launch/experiments/glge_squadqg.py --only janus-nar,ar-nar --root runs/try --limit 500

A BART-like model is pretrained on Wikipedia text (`base`), goes on from there with equal updates as BART, as
CMLM and as JANUS (`pre-*`), and each is fine-tuned on SQuAD for AR and for NAR; `none-*` are fine-tuned from
random weights. Started again, it skips what is finished and resumes what is not; asked to stop (SIGTERM,
Ctrl-C), it lets the runs save first. After each run the tables are made anew from what is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driver import (
    ROOT,
    Run,
    experiment_parser,
    product,
    run_experiment,
    run_logged,
    shared_text,
    training_command,
)
from glge_page import render_page
from results import collect, significance, write_results
from squadqg_text import write_squadqg, write_wikipedia

from janus_ds.config.load import load_run_config
from janus_ds.errors import UsageError, exit_on_error
from janus_ds.io import write_atomic

PRETRAINING = ROOT / "launch" / "recipes" / "small_wikipedia.yaml"
FINE_TUNING = ROOT / "launch" / "recipes" / "glge_squadqg_small.yaml"
SECOND_STAGE = ("optim.lr=1.0e-3",)
"""Half of the first stage's learning rate, for all three."""


@dataclass(frozen=True)
class Training:
    """Where the weights of a run come from and what it is."""

    start: str | None
    """The run it starts from."""
    mode: str | None = None
    """Mode of the fine-tuning; None: pretraining."""
    overrides: tuple[str, ...] = ()


def _second(preset: str) -> Training:
    return Training("base", None, (f"objective.preset={preset}", *SECOND_STAGE))


RUNS: dict[str, Training] = {
    "base": Training(None),
    "pre-janus": _second("paper"),
    "pre-ar": _second("ar"),
    "janus-nar": Training("pre-janus", "nar"),
    "ar-nar": Training("pre-ar", "nar"),
    # What the query stream has learned is kept; `ar` would throw it away.
    "janus-ar": Training("pre-janus", "ar_query"),
    "ar-ar": Training("pre-ar", "ar"),
    "pre-cmlm": _second("cmlm"),
    "cmlm-nar": Training("pre-cmlm", "nar"),
    "cmlm-ar": Training("pre-cmlm", "ar"),
    "none-nar": Training(None, "nar"),
    "none-ar": Training(None, "ar"),
    # The released fine-tuning from the same weights: two dropout draws, NAR and AUX in random order.
    "janus-nar_released": Training("pre-janus", "nar_released"),
}
"""The most telling first, each after what it starts from."""
_WORDS = "released against plain NAR fine-tuning of the same weights"
COMPARISONS = tuple(
    ("janus-nar_released", f"nar-{n}", "janus-nar", f"nar-{n}", f"{_WORDS}, NAR {n}") for n in (0, 10)
)
SAMPLES = (0, 400, 1200)
"""Test lines that are shown."""


def runs_of(options: argparse.Namespace) -> dict[str, Run]:
    """The runs that are asked for."""
    counts = options.root / "text" / "counts.json"
    lines = options.limit or json.loads(counts.read_text(encoding="utf-8"))["test"]
    return {name: _run(options, name, lines) for name in options.only}


def _run(options: argparse.Namespace, name: str, lines: int) -> Run:
    run, folder = RUNS[name], options.root / name
    kind = ("finetune", FINE_TUNING, "squadqg") if run.mode else ("pretrain", PRETRAINING, "wikipedia")
    steps = options.tune_steps if run.mode else options.second_steps if run.start else options.base_steps
    train = training_command(
        *(*kind[:2], options.root / kind[2], folder),
        *(("--mode", run.mode) if run.mode else ()),
        *(("--init", options.root / run.start) if run.start else ()),
        *("--set", f"name={name}", f"train.seed={options.seed}", f"train.max_steps={steps}"),
        *(*run.overrides, *options.overrides),
    )
    if run.mode is None:
        return Run(train, steps, run.start)
    mode = "nar" if run.mode.startswith("nar") else "ar"
    evaluate = product(
        *("eval/glge.py", "--task", "squadqg", "--checkpoint", folder, "--mode", mode),
        *("--split", "test", "--limit", options.limit),
        *("--latency-samples", options.latency),
    )
    return Run(train, steps, run.start, evaluate, lines)


def report(options: argparse.Namespace) -> None:
    """Make JSON and Markdown of what is there."""
    content = collect(options.root, list(RUNS), "runs/results-glge")
    for name, run in content["runs"].items():
        run["start"] = RUNS[name].start
    content["significance"] = significance(options.root, content["runs"], COMPARISONS)
    content["data"] = _text_facts(options.root)
    content["samples"] = list(_samples(options.root, content["runs"]))
    page = write_results(options.results / "glge_squadqg", content, render_page(content))
    print(f"wrote {page}", flush=True)


def _text_facts(folder: Path) -> dict[str, Any]:
    """What is known of the text: pairs, articles, tokens and what was cut."""
    found: dict[str, Any] = {}
    counts = folder / "text" / "counts.json"
    if counts.is_file():
        found["text"] = json.loads(counts.read_text(encoding="utf-8"))
    for name in ("wikipedia", "squadqg"):
        manifest = folder / name / "manifest.json"
        if manifest.is_file():
            content = json.loads(manifest.read_text(encoding="utf-8"))
            found[name] = {"splits": content["splits"], "counts": content["settings"].get("counts")}
    return found


def _samples(folder: Path, runs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    files = {
        "sentence": folder / "squadqg" / "raw" / "test.src",
        "reference": folder / "squadqg" / "raw" / "test.tgt",
    }
    for name, run in runs.items():
        for system in ("ar", "nar-0", "nar-10"):
            if system in run["systems"]:
                files[f"{name}, {system}"] = folder / name / "eval" / "test" / f"{system}.txt"
    if len(files) == 2:
        return
    texts = {
        what: path.read_text(encoding="utf-8").split("\n") for what, path in files.items() if path.is_file()
    }
    for number in SAMPLES:
        shown = {what: lines[number] for what, lines in texts.items() if number < len(lines) - 1}
        if shown:
            yield {"line": number + 1, **shown}


def prepare(options: argparse.Namespace) -> int:
    """Text and data directories, unless they are there; the exit code."""
    shared = shared_text("squadqg", "SQuAD question generation", "du2017.dev, du2017.test, reqa_train").parent
    shared_text("pretrain_wikipedia_en", "Wikipedia text", "wiki.txt.xz")
    text, made = options.root / "text", options.root / "text" / "counts.json"
    if not made.is_file():
        counts = write_squadqg(shared, text / "squadqg_data")
        counts["articles"] = write_wikipedia(shared, text / "wikipedia.txt", options.megabytes)
        write_atomic(made, f"{json.dumps({**counts, 'megabytes': options.megabytes})}\n".encode())
    length, target = (load_run_config(recipe).data.block_tokens for recipe in (PRETRAINING, FINE_TUNING))
    data = options.root / "wikipedia"
    wikipedia = product(
        *("launch/prepare_data.py", "--input", text / "wikipedia.txt", "--output", data),
        *("--tokenizer", "sentencepiece-bpe", "--vocab-size", 4000, "--tokenizer-sample-mb", 8),
        *("--block-tokens", length, "--processes", 1),
    )
    questions = product(
        *("launch/prepare_glge.py", "--task", "squadqg", "--input", text / "squadqg_data"),
        *("--tokenizer", data / "tokenizer", "--output", options.root / "squadqg"),
        *("--source-tokens", length, "--target-tokens", target, "--processes", 1),
    )
    return run_logged(options.root, "data", wikipedia) or run_logged(options.root, "data", questions)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = experiment_parser(__doc__, "results-glge", list(RUNS))
    add = parser.add_argument
    add("--megabytes", type=int, default=24, help="of Wikipedia text [%(default)s]")
    add("--base-steps", type=int, default=2_500, help="updates of the first pretraining [%(default)s]")
    add("--second-steps", type=int, default=1_000, help="updates of each second stage [%(default)s]")
    add("--tune-steps", type=int, default=1_500, help="updates of each fine-tuning [%(default)s]")
    add("--seed", type=int, default=1, help="of all runs [%(default)s]")
    add("--latency", type=int, default=0, help="test lines decoded one by one for ms/sample [%(default)s]")
    options = parser.parse_args(arguments)
    options.only = with_starts([name for name in options.only.split(",") if name])
    return options


def with_starts(names: list[str]) -> list[str]:
    """The runs with those that they start from before them.

    Raises:
        UsageError: there is no such run.
    """
    found: dict[str, None] = {}
    for name in names:
        chain: list[str] = []
        following: str | None = name
        while following is not None:
            if following not in RUNS:
                raise UsageError(
                    f"there is no run {following!r}", "--only", f"give some of {', '.join(RUNS)}"
                )
            chain.insert(0, following)
            following = RUNS[following].start
        found.update(dict.fromkeys(chain))
    return list(found)


def main() -> int:
    """Prepare, run, report."""
    options = parse()
    # Before an hour is spent: overrides that cannot be meant are refused here.
    load_run_config(PRETRAINING, options.overrides)
    load_run_config(FINE_TUNING, options.overrides, mode="nar")
    return run_experiment(options, prepare, runs_of, report)


if __name__ == "__main__":
    exit_on_error(main)
