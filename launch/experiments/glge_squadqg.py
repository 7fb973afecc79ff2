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
    EVALUATE,
    ROOT,
    TRAIN,
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
class Run:
    """One training: where its weights come from and what it is."""

    start: str | None
    """The run it starts from."""
    mode: str | None = None
    """Mode of the fine-tuning; None: pretraining."""
    overrides: tuple[str, ...] = ()


def _second(preset: str) -> Run:
    return Run("base", None, (f"objective.preset={preset}", *SECOND_STAGE))


RUNS: dict[str, Run] = {
    "base": Run(None),
    "pre-janus": _second("paper"),
    "pre-ar": _second("ar"),
    "janus-nar": Run("pre-janus", "nar"),
    "ar-nar": Run("pre-ar", "nar"),
    # What the query stream has learned is kept; `ar` would throw it away.
    "janus-ar": Run("pre-janus", "ar_query"),
    "ar-ar": Run("pre-ar", "ar"),
    "pre-cmlm": _second("cmlm"),
    "cmlm-nar": Run("pre-cmlm", "nar"),
    "cmlm-ar": Run("pre-cmlm", "ar"),
    "none-nar": Run(None, "nar"),
    "none-ar": Run(None, "ar"),
    # The released fine-tuning from the same weights: two dropout draws, NAR and AUX in random order.
    "janus-nar_released": Run("pre-janus", "nar_released"),
}
"""The most telling first, each after what it starts from."""
_WORDS = "released against plain NAR fine-tuning of the same weights"
COMPARISONS = tuple(
    ("janus-nar_released", f"nar-{n}", "janus-nar", f"nar-{n}", f"{_WORDS}, NAR {n}") for n in (0, 10)
)
SAMPLES = (0, 400, 1200)
"""Test lines that are shown."""


class SquadQuestions:
    """The runs of this experiment, as `driver.Plan` asks for them.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.folder: Path = options.root

    def stages(self, name: str) -> tuple[str, ...]:
        """Pretraining is not evaluated."""
        return (TRAIN, EVALUATE) if RUNS[name].mode else (TRAIN,)

    def needs(self, name: str) -> tuple[str, ...]:
        """The run whose weights it starts from."""
        start = RUNS[name].start
        return (start,) if start else ()

    def goal(self, name: str, stage: str) -> dict[str, int]:
        """The updates asked for, and the test lines."""
        steps = {"steps": self._steps(name)}
        return steps if stage == TRAIN else {**steps, "lines": self._options.limit or self._test_lines()}

    def command(self, name: str, stage: str) -> list[str]:
        """The product's own programs."""
        return self._training(name) if stage == TRAIN else self._evaluation(name)

    def report(self) -> None:
        """Make JSON and Markdown of what is there."""
        content = collect(self.folder, list(RUNS), "runs/results-glge")
        for name, run in content["runs"].items():
            run["start"] = RUNS[name].start
        content["significance"] = significance(self.folder, content["runs"], COMPARISONS)
        content["data"] = _text_facts(self.folder)
        content["samples"] = list(_samples(self.folder, content["runs"]))
        stem: Path = self._options.results / "glge_squadqg"
        print(f"wrote {write_results(stem, content, render_page(content))}", flush=True)

    def _test_lines(self) -> int:
        counts = json.loads((self.folder / "text" / "counts.json").read_text(encoding="utf-8"))
        return int(counts["test"])

    def _steps(self, name: str) -> int:
        options, run = self._options, RUNS[name]
        steps: int = (
            options.tune_steps if run.mode else options.second_steps if run.start else options.base_steps
        )
        return steps

    def _training(self, name: str) -> list[str]:
        options, run = self._options, RUNS[name]
        kind = ("finetune", FINE_TUNING, "squadqg") if run.mode else ("pretrain", PRETRAINING, "wikipedia")
        program, recipe, data = kind
        return training_command(
            *(program, recipe, self.folder / data, self.folder / name),
            *(("--mode", run.mode) if run.mode else ()),
            *(("--init", self.folder / run.start) if run.start else ()),
            *("--set", f"name={name}", f"train.seed={options.seed}", f"train.max_steps={self._steps(name)}"),
            *(*run.overrides, *options.overrides),
        )

    def _evaluation(self, name: str) -> list[str]:
        mode = "nar" if (RUNS[name].mode or "").startswith("nar") else "ar"
        given = ("--task", "squadqg", "--checkpoint", self.folder / name, "--mode", mode)
        given += ("--iterations", "0,1,4,10", "--split", "test", "--limit", self._options.limit)
        return product("eval/glge.py", *given, "--latency-samples", self._options.latency)


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
    return run_experiment(options, SquadQuestions(options), prepare)


if __name__ == "__main__":
    exit_on_error(main)
