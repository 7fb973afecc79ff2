"""The Multi30k experiment: every training objective of the paper's Tables 1 and 6, on a CPU.

    JANUS_SHARED_DATA=... python launch/experiments/nmt_multi30k.py            (or: make results-nmt)
    python launch/experiments/nmt_multi30k.py --report                         the tables alone
    python launch/experiments/nmt_multi30k.py --only ar-s1,janus-s1 --steps 2000 --root runs/try

One run a core, in the order below. Started again, it skips what is finished and resumes what is not; asked to
stop (SIGTERM, Ctrl-C), it lets the runs save first. After each run the tables are made anew from what is
there. All runs have the same data, batches, masking law, number of updates and seed of their order.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from driver import EVALUATE, TRAIN, Driver
from stages import ROOT, engine_config, environment, experiment_parser, shared_text

from janus_ds.config.load import load_run_config
from janus_ds.errors import UsageError, exit_on_error
from janus_ds.tools.nmt_results import Experiment, write_results

RECIPE = ROOT / "launch" / "recipes" / "nmt_multi30k.yaml"

NO_KL = ("objective.weight_kl_ar_nar=0", "objective.weight_kl_ar_aux=0", "objective.weight_kl_nar_aux=0")
AR_ALONE = ("train.valid_bleu=ar", "train.keep_best=ar", "decode.mode=ar")
VARIANTS: dict[str, tuple[str, ...]] = {
    "ar": ("objective.preset=ar", *AR_ALONE),
    "arquery": ("objective.preset=ar_query", *AR_ALONE),
    "cmlm": ("objective.preset=cmlm", "train.valid_bleu=nar"),
    "janus": ("objective.preset=paper",),
    "released": ("objective.preset=released",),
    "joint": ("objective.preset=paper", "objective.weight_aux=0", *NO_KL),
    "aux": ("objective.preset=paper", "objective.weight_ar=0", "objective.weight_nar=0", *NO_KL),
    "armasked": ("objective.preset=paper", "objective.ar_loss=masked"),
    "auxhalf": ("objective.preset=paper", "objective.aux_share=0.5"),
    "fewrows": ("objective.preset=paper", "objective.ar_loss=masked", "objective.aux_share=0.5"),
    "fewest": ("objective.preset=paper", "objective.ar_loss=masked", "objective.aux_share=0.25"),
}
"""Overrides of the recipe; all get the same masking besides. `arquery` is not in the paper: the AR term of
JANUS alone, which tells what its query stream costs from what NAR beside it costs. The last four are JANUS
with the cheaper estimators of its loss (README, "Measured")."""
RUNS = ("ar-s1", "cmlm-s1", "janus-s1", "released-s1", "joint-s1", "aux-s1", "ar-s2", "janus-s2")
"""The most telling first."""


class Multi30k:
    """The runs of this experiment, as `driver.Plan` asks for them.

    Args:
        options: the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self.folder: Path = options.root / options.direction

    def stages(self, name: str) -> tuple[str, ...]:
        """Every run is trained and evaluated."""
        return (TRAIN, EVALUATE)

    def needs(self, name: str) -> tuple[str, ...]:
        """No run starts from another one."""
        return ()

    def goal(self, name: str, stage: str) -> dict[str, int]:
        """The updates asked for."""
        return {"steps": self._options.steps}

    def command(self, name: str, stage: str) -> list[str]:
        """The product's own programs."""
        run = self.folder / name
        return self._training(name, run) if stage == TRAIN else self._evaluation(run)

    def report(self) -> None:
        """Make JSON and Markdown of what is there."""
        experiment = Experiment(self.folder, RUNS, self._options.direction, self._options.results)
        print(f"wrote {write_results(experiment)}", flush=True)

    def _training(self, name: str, run: Path) -> list[str]:
        variant, seed = name.rsplit("-s", 1)
        options = self._options
        overrides = [
            f"name={name}",
            f"train.seed={seed}",
            f"train.max_steps={options.steps}",
            f"masking.target={options.masking}",
            f"masking.target_share={options.share}",
            *VARIANTS[variant],
            *options.overrides,
        ]
        return [
            sys.executable,
            str(ROOT / "launch" / "finetune.py"),
            *("--recipe", str(RECIPE), "--deepspeed_config", str(engine_config(self.folder))),
            *("--data", str(self.folder / "data"), "--output", str(run), "--set", *overrides),
        ]

    def _evaluation(self, run: Path) -> list[str]:
        options = self._options
        return [
            sys.executable,
            str(ROOT / "eval" / "nmt.py"),
            *("--checkpoint", str(run), "--average", str(options.average), "--split", "test"),
            *("--limit", str(options.limit), "--latency-sentences", str(min(50, options.limit or 50))),
        ]


def prepare(options: argparse.Namespace) -> None:
    """The data directory, unless it is there."""
    text = shared_text("multi30k", "Multi30k", "train, val and test_2016_flickr, .de and .en")
    source, target = options.direction.split("-")

    def pair(stem: str) -> list[str]:
        found = [sorted(text.glob(f"{stem}.{language}*")) for language in (source, target)]
        return [str(paths[0]) for paths in found if paths]

    folder = options.root / options.direction
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        str(ROOT / "launch" / "prepare_data.py"),
        *("--task", "nmt", "--source-lang", source, "--target-lang", target, "--lowercase"),
        *("--vocab-size", "4000", "--max-tokens", "126", "--tokenizer", "sentencepiece-bpe"),
        *("--train", *pair("train"), "--valid", *pair("val"), "--test", *pair("test_2016_flickr")),
        *("--output", str(folder / "data")),
    ]
    subprocess.run(command, env=environment(), check=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = experiment_parser(__doc__, "results-nmt")
    add = parser.add_argument
    add("--direction", choices=("de-en", "en-de"), default="de-en", help="[%(default)s]")
    add("--only", default=",".join(RUNS), help="runs, in this order [%(default)s]")
    add("--steps", type=int, default=16_000, help="updates of each run [%(default)s]")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at the same time [%(default)s]")
    add("--masking", default="span_union", help="masking law of all runs [%(default)s]")
    add("--share", type=float, default=0.7, help="masked share of the target [%(default)s]")
    add("--average", type=int, default=5, help="checkpoints averaged for the scores [%(default)s]")
    add("--limit", type=int, default=0, help="test sentences, for a trial; 0: all")
    add("--set", dest="overrides", nargs="+", action="extend", default=[], help="further overrides, all runs")
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    for name in options.only:
        variant, _, seed = name.rpartition("-s")
        if variant not in VARIANTS or not seed.isdigit():
            raise UsageError(
                f"there is no run {name!r}", "--only", f"give VARIANT-sSEED, VARIANT of {', '.join(VARIANTS)}"
            )
    return options


def main() -> int:
    """Prepare, run, report."""
    options = parse()
    # Before an hour is spent: overrides that cannot be meant are refused here.
    load_run_config(RECIPE, options.overrides)
    plan = Multi30k(options)
    if options.report:
        plan.report()
        return 0
    prepare(options)
    return Driver(plan, options.only, options.jobs).run()


if __name__ == "__main__":
    exit_on_error(main)
