"""Does JANUS make AR better? Multi30k En-De at budgets of 13, 26 and 77 epochs, against R-Drop and others.

    JANUS_SHARED_DATA=... python launch/experiments/convergence.py        (or: make results-convergence)
    python launch/experiments/convergence.py --report                     the page alone, of what there is
    python launch/experiments/convergence.py --only ar-2k-s1,paper-2k-s1 --root runs/try

The learning rate of a run falls to 0 over its budget of updates, so that each is at its best at its end;
what more updates give is seen from budget to budget. One run a core, in the order below; days of core time.
Started again, it skips what is finished and resumes what is not; asked to stop (SIGTERM, Ctrl-C), it lets
the runs save first. All runs have the same data (NAME@PAIRS: the first pairs of it), batches, masking law and
seed of their order.
`convergence_answers.md` beside the page is what people conclude from it; the page includes it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from itertools import product as pairs
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from driver import (
    ROOT,
    Run,
    experiment_parser,
    prepare_pairs_command,
    product,
    run_experiment,
    shared_file,
    shared_text,
    training_command,
)
from results import collect, fixed, output_of, render, significance, write_page

from janus_ds.cli.arguments import at_least
from janus_ds.config.load import load_run_config
from janus_ds.config.locations import deepspeed_file
from janus_ds.data.prepare.pair_files import read_pairs
from janus_ds.errors import MissingDependencyError, UsageError, exit_on_error
from janus_ds.io import disk_faults, write_atomic
from janus_ds.report.figures import COLOURS, INK, new_figure, png_of, styled

RECIPE = ROOT / "launch" / "recipes" / "nmt_multi30k_en_de.yaml"
ENGINE = ROOT / "ds_configs" / "zero2_bf16.json"
TRAIN_PAIRS, TEST_PAIRS = 29_000, 1_000
NO_KL = ("objective.weight_kl_ar_nar=0", "objective.weight_kl_ar_aux=0", "objective.weight_kl_nar_aux=0")
AR_ALONE = ("train.valid_bleu=ar", "train.keep_best=ar", "decode.mode=ar")
SPANS = ("masking.target=span_union", "masking.target_share=0.7")
TWO_PASSES = "objective.encoder_passes=2"
VARIANTS: dict[str, tuple[str, ...]] = {
    "ar": ("objective.preset=ar", *AR_ALONE),
    "ar_rdrop": ("objective.preset=ar_rdrop", *AR_ALONE),
    "paper": ("objective.preset=paper", *SPANS),
    "paper_2enc": ("objective.preset=paper", TWO_PASSES, *SPANS),
    "joint": ("objective.preset=paper", "objective.weight_aux=0", *NO_KL, *SPANS),
    "cmlm": ("objective.preset=cmlm", "train.valid_bleu=nar", "train.keep_best=nar", *SPANS),
    "released_2enc": ("objective.preset=released", TWO_PASSES, *SPANS),
}
"""Overrides of the recipe. Further ones, for dropout, KL weight and ramps, are given as NAME+KEY=VALUE;
NAME@PAIRS trains on the first PAIRS pairs alone, which are seen more often."""
FIRST = ("paper", "ar", "ar_rdrop", "paper_2enc")
BUDGETS = (2, 4, 12)
"""Thousands of updates: 13, 26 and 77 epochs."""
SEEDS = (1, 2, 3)
FEW_PAIRS = TRAIN_PAIRS // 4
"""A quarter: 2,000 updates are 46 epochs, 4,000 are 92. Does JANUS help where AR learns by heart?"""
RUNS = (
    *(f"{name}-2k-s1" for name in FIRST[:3]),
    *(f"{name}-{budget}k-s1" for budget in BUDGETS[1:] for name in FIRST),
    *(f"{name}-4k-s1" for name in ("joint", "cmlm", "released_2enc")),
    *(f"{name}-4k-s{seed}" for seed in SEEDS[1:] for name in FIRST),
    *(f"{name}@{FEW_PAIRS}-{budget}k-s1" for budget in BUDGETS[:2] for name in FIRST[:3]),
)
"""The most telling first."""
TITLES = {
    "ar": "AR (`ar`)",
    "ar_rdrop": "AR with R-Drop (`ar_rdrop`)",
    "paper": "JANUS (`paper`)",
    "paper_2enc": "JANUS, two encoder draws",
    "joint": "AR + NAR, no KL",
    "cmlm": "CMLM",
    "released_2enc": "JANUS, `released`, two encoder draws",
}
SYSTEMS = ("ar", "nar-0", "nar-1", "nar-4", "nar-10")
QUESTIONS = (
    ("paper", "ar", "ar", "ar", "Is JANUS-AR above AR?"),
    ("ar_rdrop", "ar", "ar", "ar", "Is R-Drop above AR?"),
    ("paper", "ar", "ar_rdrop", "ar", "Is JANUS-AR above R-Drop?"),
    ("paper_2enc", "ar", "paper", "ar", "Does the second encoder draw matter for AR?"),
    ("paper_2enc", "nar-10", "paper", "nar-10", "Does it for NAR, 10 iterations?"),
    ("paper_2enc", "ar", "ar", "ar", "Is JANUS-AR with two encoder draws above AR?"),
    ("paper_2enc", "ar", "ar_rdrop", "ar", "Is it above R-Drop?"),
    ("released_2enc", "ar", "paper_2enc", "ar", "Does `released` in place of `paper` matter for AR?"),
    ("released_2enc", "nar-10", "paper_2enc", "nar-10", "Does `released` matter for NAR, 10 iterations?"),
    ("paper", "nar-10", "cmlm", "nar-10", "Is JANUS-NAR above CMLM, 10 iterations?"),
    ("joint", "nar-10", "cmlm", "nar-10", "Is NAR beside AR, without KL and AUX, above CMLM, 10 iterations?"),
    ("joint", "ar", "ar", "ar", "Is AR beside NAR, without KL and AUX, above AR?"),
    ("paper", "ar", "joint", "ar", "Do KL and AUX help AR?"),
    ("paper", "nar-10", "joint", "nar-10", "Do they help NAR, 10 iterations?"),
    ("paper", "nar-0", "joint", "nar-0", "Do they help NAR, one pass?"),
)
COMPARISONS = tuple(
    (f"{run}{end}", mode, f"{other}{end}", other_mode, f"{question} ({what})")
    for end, what in (
        *((f"-{budget}k-s1", f"{budget},000 updates") for budget in BUDGETS),
        *((f"-4k-s{seed}", f"4,000 updates, seed {seed}") for seed in SEEDS[1:]),
        *((f"@{FEW_PAIRS}-{k}k-s1", f"{k},000 updates, {FEW_PAIRS:,} pairs") for k in BUDGETS[:2]),
    )
    for run, mode, other, other_mode, question in QUESTIONS
)


def runs_of(options: argparse.Namespace) -> dict[str, Run]:
    """The runs that are asked for."""
    found = {}
    for name in options.only:
        run = options.root / name
        own, steps = overrides_of(name)
        own = [f"name={name}", *own, *options.overrides]
        train = training_command("finetune", RECIPE, _data(options.root, pairs_of(name)), run, "--set", *own)
        given = ("--checkpoint", run, "--average", options.average, "--limit", options.limit)
        evaluate = product("eval/nmt.py", *given, "--split", "test", "--output", run / "eval" / "test")
        lines, how = options.limit or TEST_PAIRS, {"average": options.average}
        found[name] = Run(train, steps, evaluate=evaluate, lines=lines, how=how)
    return found


_NAME = re.compile(
    r"(?P<variant>\w+?)(@(?P<pairs>\d+))?(?P<further>(\+[\w.]+=[^+]*)*)-(?P<budget>[\d.]+)k-s(?P<seed>\d+)"
)


def overrides_of(name: str) -> tuple[list[str], int]:
    """Overrides of a run VARIANT[@PAIRS][+KEY=VALUE]-BUDGETk-sSEED, and its updates.

    Raises:
        UsageError: there is no such run.
    """
    found = _NAME.fullmatch(name)
    if found is None or found["variant"] not in VARIANTS or not 0 < pairs_of(name) <= TRAIN_PAIRS:
        raise UsageError(
            f"there is no run {name!r}",
            "--only",
            "give VARIANT[@PAIRS][+KEY=VALUE]-BUDGETk-sSEED, BUDGET in thousands of updates, "
            f"VARIANT of {', '.join(VARIANTS)}",
        )
    steps, further = round(1000 * float(found["budget"])), found["further"].split("+")[1:]
    own = [f"train.seed={found['seed']}", *VARIANTS[found["variant"]], *further, f"train.max_steps={steps}"]
    return own, steps


def pairs_of(name: str) -> int:
    """Training pairs of a run."""
    found = _NAME.fullmatch(name)
    return int(found["pairs"]) if found is not None and found["pairs"] else TRAIN_PAIRS


def _data(root: Path, pairs: int) -> Path:
    """The data directory of so many training pairs."""
    return root / ("data" if pairs == TRAIN_PAIRS else f"data-{pairs}")


def report(options: argparse.Namespace) -> None:
    """Make JSON, page and pictures of what is there."""
    published, outputs = options.results / "convergence.json", options.results / "outputs"
    before = json.loads(published.read_text(encoding="utf-8"))["runs"] if published.is_file() else {}
    begun = sorted(path.parent.name for path in options.root.glob("*/metrics.jsonl"))
    names = list(dict.fromkeys([*RUNS, *filter(_NAME.fullmatch, begun)]))
    content = collect(options.root, names, "runs/convergence/en-de", before)
    publish_outputs(options.root, content["runs"], outputs)
    comparisons = [*COMPARISONS, *_attempts(content["runs"])]
    content["significance"] = significance(partial(_published, outputs), content["runs"], comparisons)
    answers = options.results / "convergence_answers.md"
    content["answers"] = answers.read_text(encoding="utf-8").strip() if answers.is_file() else ""
    try:
        content["pictures"] = draw(content["runs"], options.results / "figures")
    except MissingDependencyError as error:
        content["pictures"], content["no_pictures"] = [], f"{error.what}: {error.fix}"
    write_page(options.results / "convergence.md", page(content), content)


def _attempts(runs: Iterable[str]) -> Iterator[tuple[str, str, str, str, str]]:
    """Comparisons of runs with further overrides with those that have none, and with AR."""
    for name in runs:
        found = _NAME.fullmatch(name)
        if found is not None and found["further"]:
            base = name.replace(found["further"], "", 1)
            ar = base.replace(found["variant"], "ar", 1)
            for other, system in dict.fromkeys(((base, "ar"), (base, "nar-0"), (base, "nar-10"), (ar, "ar"))):
                yield name, system, other, system, f"{name} against {other}: {system}"


def publish_outputs(folder: Path, runs: Mapping[str, Any], outputs: Path) -> None:
    """Copy to the page what runs wrote for the whole test set, so that it can be scored again, and be
    compared with runs of another machine."""
    whole = [name for name, run in runs.items() if _lines(run) == TEST_PAIRS]
    for run, system in pairs(whole, ("ar", "nar-0", "nar-10", "references")):
        source, copy = output_of(folder, run, system), _published(outputs, run, system)
        if source.is_file():
            with disk_faults(copy):
                copy.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(copy, source.read_bytes())


def _lines(run: Mapping[str, Any]) -> int:
    """Test lines that a run was evaluated on; 0 where it was not."""
    return max((system["n"] for system in run["systems"].values()), default=0)


def _published(outputs: Path, run: str, system: str) -> Path:
    return outputs / ("references.txt" if system == "references" else f"{run}.{system}.txt")


def page(content: Mapping[str, Any]) -> str:
    """The page, of what stands in the JSON."""
    facts = {"scores": list(_scores(content["runs"])), "averages": _averages(content["runs"])}
    functions = {"state_of": state_of, "best_of": best_of, "pairs_of": pairs_of}
    return render("convergence", content, **facts, **functions)


def state_of(run: Mapping[str, Any]) -> str:
    """In words: how far a run has come."""
    steps = run["recipe"]["train"]["max_steps"]
    return "at its end" if run["updates"] >= steps else f"under way, of {steps:,}"


def best_of(run: Mapping[str, Any], score: str) -> Mapping[str, Any]:
    """The validation with the highest score; the first of equals."""
    points = [point for point in run["held_out"] if score in point]
    return max(points, key=lambda point: point[score], default={})


def _averages(runs: Mapping[str, Any]) -> list[int]:
    """How many checkpoints were averaged for test scores: one number, unless runs differ."""
    return sorted({system["average"] for run in runs.values() for system in run["systems"].values()})


def _scores(runs: Mapping[str, Any]) -> Iterator[list[str]]:
    """Rows of the test scores: each run's, then means over seeds."""
    done = {name: run["systems"] for name, run in runs.items() if run["systems"]}
    found = {
        (name, metric): [systems.get(s, {}).get("metrics", {}).get(metric) for s in SYSTEMS]
        for name, systems in done.items()
        for metric in ("sacrebleu", "repetition")
    }
    for name in done:
        repeated = [fixed(value) or "-" for value in found[name, "repetition"][1:]]
        shown = "" if set(repeated) == {"-"} else " / ".join(repeated)
        part = "" if _lines(runs[name]) == TEST_PAIRS else f", the first {_lines(runs[name])} lines"
        if len(_averages(runs)) > 1:
            part += f", mean of {_averages({name: runs[name]})[0]}"
        yield [f"{name}{part}", *map(fixed, found[name, "sacrebleu"]), shown]
    for budget, (variant, title) in pairs(BUDGETS, TITLES.items()):
        seeds = [
            found[name, "sacrebleu"]
            for name in done
            if name.rpartition("-s")[0] == f"{variant}-{budget}k" and _lines(runs[name]) == TEST_PAIRS
        ]
        if len(seeds) > 1:
            columns = [
                [value for value in column if value is not None] for column in zip(*seeds, strict=True)
            ]
            cells = [f"{mean(v):.2f} ± {stdev(v):.2f}" if len(v) > 1 else "" for v in columns]
            yield [f"**{title}, {budget},000 updates, {len(seeds)} seeds**", *cells, ""]


def draw(runs: Mapping[str, Any], folder: Path) -> list[dict[str, str]]:
    """Curves against updates and against CPU hours; what the page says of each picture.

    Raises:
        MissingDependencyError: there is no matplotlib.
    """
    folder.mkdir(parents=True, exist_ok=True)
    attempts = {
        name: 1 + number for number, name in enumerate(name for name in runs if re.search("[+@]", name))
    }
    pictures = []
    for file, title, panels in (
        ("convergence_bleu", "Validation BLEU: AR greedy, NAR with 4 iterations", ("bleu_ar", "bleu_nar")),
        ("convergence_losses", "Held-out losses, nats a token", ("ar_nll", "nar_nll", "aux_nll")),
        ("convergence_kl", "KL terms of training, nats a token", ("kl_ar_aux", "kl_nar_aux", "kl_ar_ar")),
    ):
        with styled():
            figure = new_figure(4.2 * len(panels), 6.2 + 0.08 * len(runs))
            axes = figure.subplots(2, len(panels), squeeze=False)
            for row, (along, label, scale) in enumerate(
                (("step", "updates", 1.0), ("cpu_seconds_total", "CPU hours of training", 3600.0))
            ):
                for panel, key in zip(axes[row], panels, strict=True):
                    for name, run in runs.items():
                        points = run["training" if key.startswith("kl_") else "held_out"]
                        shown = [p for p in points if p.get(key) is not None and p.get(along) is not None]
                        if shown:
                            values = [p[along] / scale for p in shown], [p[key] for p in shown]
                            panel.plot(*values, label=name, **_look(name, attempts.get(name, 0)))
                    panel.set_xlabel(label)
                    panel.set_title(key)
                    # The first validations would press all others together.
                    low, high = panel.get_ylim()
                    if key.startswith("bleu_"):
                        panel.set_ylim(bottom=max(low, 0.5 * high))
                    elif key.endswith("_nll"):
                        panel.set_ylim(top=min(high, 2.2 * low))
            labels = {line.get_label(): line for panel in axes.flat for line in panel.lines}
            figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=2, fontsize=7)
            write_atomic(folder / f"{file}.png", png_of(figure, 70))
        pictures.append({"file": f"figures/{file}.png", "title": f"{title}, by updates and by cost."})
    return pictures


def _look(name: str, attempt: int) -> dict[str, Any]:
    """A colour for each variant, a line style for each seed, a width for each budget, marks for the
    first, second, ... run with further overrides or fewer pairs."""
    found = _NAME.fullmatch(name)
    if found is None:
        return {"color": INK}
    colours = dict(zip(VARIANTS, COLOURS, strict=False))
    style, budget = ("-", "--", ":")[(int(found["seed"]) - 1) % 3], float(found["budget"])
    width = 0.8 + 0.8 * sum(budget > known for known in BUDGETS)
    mark = ("", *"ovsDP*X^")[attempt % 9]
    look = {"linestyle": style, "linewidth": width, "marker": mark, "markersize": 3, "markevery": 0.1}
    return {"color": colours.get(found["variant"], INK), **look}


def prepare(options: argparse.Namespace) -> Iterator[list[str]]:
    """The DeepSpeed file of all runs; the command of the data directory, unless it is there."""
    shutil.copyfile(options.deepspeed_config, options.root / "deepspeed.json")
    numbers = dict.fromkeys([TRAIN_PAIRS, *map(pairs_of, options.only)])
    missing = [number for number in numbers if not (_data(options.root, number) / "manifest.json").is_file()]
    if not missing:
        return
    text = shared_text("multi30k", "Multi30k", "train, val and test_2016_flickr, .de and .en")
    train, valid, test = (
        [shared_file(text, f"{stem}.{side}") for side in ("en", "de")]
        for stem in ("train", "val", "test_2016_flickr")
    )
    how = ("--lowercase", "--max-tokens", 126, "--valid", *valid, "--test", *test)
    for number in missing:
        data, given = _data(options.root, number), ["--vocab-size", 5000, "--tokenizer", "sentencepiece-bpe"]
        if number < TRAIN_PAIRS:
            given = ["--tokenizer", _data(options.root, TRAIN_PAIRS) / "tokenizer"]
        files = train if number == TRAIN_PAIRS else _first_pairs(train, number, data)
        yield prepare_pairs_command(("en", "de"), data, *how, *given, "--train", *files)


def _first_pairs(files: Sequence[Path], number: int, data: Path) -> list[Path]:
    """The first lines of both sides, beside the data directory that is made of them."""
    made = [data.with_suffix(f".{path.name.split('.')[1]}") for path in files]
    source, target = files
    for path, side in zip(made, zip(*islice(read_pairs(source, target), number), strict=True), strict=True):
        write_atomic(path, "".join(f"{line}\n" for line in side).encode())
    return made


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = experiment_parser(__doc__, "convergence", RUNS)
    add = parser.add_argument
    add("--average", type=at_least(1), default=5, help="checkpoints averaged for the scores [%(default)s]")
    engine = "of all runs, a file or a name: zero2 (fp32) for a CPU that computes bf16 slowly"
    add("--deepspeed_config", type=deepspeed_file, default=ENGINE, help=f"{engine} [{ENGINE.stem}]")
    options = parser.parse_args(arguments)
    options.root /= "en-de"
    options.only = [name for name in options.only.split(",") if name]
    for name in options.only:
        train = load_run_config(RECIPE, [*overrides_of(name)[0], *options.overrides]).train
        saved = math.ceil(train.max_steps / train.save_every)
        kept = saved if train.keep_every else min(train.keep_last, saved)
        if options.average > kept:
            what = f"{name} will have {kept} checkpoints, and the mean of {options.average} is asked for"
            fix = f"give --average {kept}, or --set train.keep_last={options.average} train.save_every=..."
            raise UsageError(what, "--average", fix)
    return options


if __name__ == "__main__":
    exit_on_error(lambda: run_experiment(parse(), {RECIPE: None}, prepare, runs_of, report))
