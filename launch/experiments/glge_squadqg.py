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
from functools import partial
from pathlib import Path
from typing import Any

from driver import (
    ROOT,
    Run,
    counted,
    experiment_parser,
    product,
    run_experiment,
    shared_text,
    training_command,
)
from results import collect, output_of, render, significance, write_page
from squadqg_text import write_squadqg, write_wikipedia

from janus_ds.cli.arguments import at_least
from janus_ds.config.load import load_run_config
from janus_ds.errors import UsageError, exit_on_error

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
STARTS = {
    "pre-ar": "BART going on (`ar`)",
    "pre-cmlm": "CMLM (`cmlm`)",
    "pre-janus": "JANUS (`paper`)",
    None: "none (random weights)",
}
"""Titles of the weights that fine-tuning starts from."""
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
        *("--split", "test", "--limit", options.limit, "--output", folder / "eval" / "test"),
        *("--latency-samples", options.latency),
    )
    return Run(train, steps, run.start, evaluate, lines, {"latency": options.latency})


def report(options: argparse.Namespace) -> None:
    """Make JSON and page of what is there."""
    content = collect(options.root, list(RUNS), "runs/results-glge")
    for name, run in content["runs"].items():
        run["start"] = RUNS[name].start
    content["significance"] = significance(partial(output_of, options.root), content["runs"], COMPARISONS)
    content["data"] = _text_facts(options.root)
    content["samples"] = list(_samples(options.root, content["runs"]))
    write_page(options.results / "glge_squadqg.md", page(content), content)


def page(content: Mapping[str, Any]) -> str:
    """The page, of what stands in the JSON: finished runs alone."""
    runs = {name: content["runs"][name] for name in content["order"] if content["runs"][name]["finished"]}
    systems = [
        {"run": name, "system": system, "scores": scores, "start": run["start"], "seconds": run["seconds"]}
        for name, run in runs.items()
        for system, scores in run["systems"].items()
    ]
    pretrained = {name: run for name, run in runs.items() if not run["systems"]}
    facts = {"finished": runs, "systems": systems, "pretrained": pretrained, "starts": STARTS}
    return render("glge_squadqg", content, **facts, by_start=list(_by_start(runs)))


def _by_start(runs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tables 7 and 8: scores by decoding, AR and NAR, of what was fine-tuned from the same weights."""
    released = f"{STARTS['pre-janus']}, fine-tuned as released"
    starts = [(title, start, False) for start, title in STARTS.items()] + [(released, "pre-janus", True)]
    for title, start, as_released in starts:
        found: dict[str, Any] = {}
        for run in runs.values():
            preset = run["recipe"]["objective"]["preset"]
            if run["start"] == start and (preset == "released_finetune") == as_released:
                found |= run["systems"]
        if found:
            yield title, found


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


def prepare(options: argparse.Namespace) -> Iterator[list[str]]:
    """The text, and the commands of both data directories."""
    shared = shared_text("squadqg", "SQuAD question generation", "du2017.dev, du2017.test, reqa_train").parent
    shared_text("pretrain_wikipedia_en", "Wikipedia text", "wiki.txt.xz")
    text, data = options.root / "text", options.root / "wikipedia"

    def write() -> dict[str, int]:
        counts = write_squadqg(shared, text / "squadqg_data")
        articles = write_wikipedia(shared, text / "wikipedia.txt", options.megabytes)
        return {**counts, "articles": articles, "megabytes": options.megabytes}

    counted(text / "counts.json", write, megabytes=options.megabytes)
    length, target = (load_run_config(recipe).data.block_tokens for recipe in (PRETRAINING, FINE_TUNING))
    yield product(
        *("launch/prepare_data.py", "--input", text / "wikipedia.txt", "--output", data),
        *("--tokenizer", "sentencepiece-bpe", "--vocab-size", 4000, "--tokenizer-sample-mb", 8),
        *("--block-tokens", length, "--processes", 1),
    )
    yield product(
        *("launch/prepare_glge.py", "--task", "squadqg", "--input", text / "squadqg_data"),
        *("--tokenizer", data / "tokenizer", "--output", options.root / "squadqg"),
        *("--source-tokens", length, "--target-tokens", target, "--processes", 1),
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = experiment_parser(__doc__, "results-glge", list(RUNS))
    add = parser.add_argument
    add("--megabytes", type=at_least(1), default=24, help="of Wikipedia text [%(default)s]")
    add("--base-steps", type=at_least(1), default=2_500, help="updates of first pretraining [%(default)s]")
    add("--second-steps", type=at_least(1), default=1_000, help="of each second stage [%(default)s]")
    add("--tune-steps", type=at_least(1), default=1_500, help="of each fine-tuning [%(default)s]")
    add("--seed", type=int, default=1, help="of all runs [%(default)s]")
    one_by_one = "test lines decoded one by one for ms/sample [%(default)s]"
    add("--latency", type=at_least(0), default=0, help=one_by_one)
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


if __name__ == "__main__":
    recipes = {PRETRAINING: None, FINE_TUNING: "nar"}
    exit_on_error(lambda: run_experiment(parse(), recipes, prepare, runs_of, report))
