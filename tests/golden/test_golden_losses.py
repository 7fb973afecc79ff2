"""Losses of training runs against those committed: a change of numbers is never silent.

The values were written by commit 5c5119c through `launch/pretrain.py`, on the data directories in `frozen/`.
`make golden` writes them anew; do so only with a change that means to alter them, and say so in the
commit. The tolerance allows for another CPU's order of additions, not for another computation; dropout is
off, since random streams differ between CPUs. JANUS_GOLDEN_EXACT=1 compares seven digits, for work on the
machine that wrote the values.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from janus_ds.observe import read_metrics
from tests.support.launch import ROOT
from tests.support.warm import warm_starter

GOLDEN = Path(__file__).with_name("losses.json")
FROZEN = "tests/golden/frozen"
STEPS = 200
QUICK = 20
TERM_STEPS = 40
"""The parts of the loss are kept for so many steps, the loss itself for all."""
TERMS = (
    "loss",
    "ar",
    "nar",
    "aux",
    "length",
    "kl_ar_nar",
    "kl_ar_aux",
    "kl_nar_aux",
    "grad_norm",
    "valid/loss",
)
SMALL = ("model.d_model=32", "model.ffn_dim=64", "train.keep_last=1", "optim.lr=2e-3", "optim.warmup_steps=5")

Key = tuple[str, str, str]
RUNS: list[Key] = [
    *((task, preset, "fp32") for task in ("denoise", "pair") for preset in ("paper", "released")),
    *(("denoise", preset, "fp32") for preset in ("ar", "cmlm")),
    *(("denoise", preset, "bf16") for preset in ("paper", "released", "ar", "cmlm")),
]
"""Task, preset of the objective, precision."""
QUICK_RUNS: list[Key] = [
    ("denoise", "paper", "fp32"),
    ("denoise", "released", "fp32"),
    ("denoise", "ar", "fp32"),
    ("denoise", "cmlm", "fp32"),
    ("denoise", "cmlm", "bf16"),
    ("pair", "paper", "fp32"),
]
DOCUMENTED = set(
    re.findall(r"`(\w+)", (ROOT / "docs/faults.md").read_text().partition("## The figures of a run")[2])
)


def losses(folder: Path, runs: list[Key], steps: int) -> dict[str, dict[str, list[float]]]:
    """Terms of each run over its first steps; a term that a step does not have is left out."""
    engine = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    for precision in ("fp32", "bf16"):
        extra = {"bf16": {"enabled": True}} if precision == "bf16" else {}
        (folder / f"{precision}.json").write_text(json.dumps({**engine, **extra}))
    names = ["-".join([*key, "padded"]) for key in runs]
    starts = [
        (_words(folder, name, key, steps), folder / f"{name}.log")
        for name, key in zip(names, runs, strict=True)
    ]
    for name, code in zip(names, warm_starter().finish(starts), strict=True):
        assert code == 0, (folder / f"{name}.log").read_text()[-3000:]
    found = {}
    for name in names:
        lines = read_metrics(folder / name / "metrics.jsonl")
        assert len(lines) == steps
        assert {key.partition("/")[0] for line in lines for key in line} <= DOCUMENTED
        series = {term: [float(f"{line[term]:.7g}") for line in lines if term in line] for term in TERMS}
        found[name] = {
            term: values if term in ("loss", "valid/loss") else values[:TERM_STEPS]
            for term, values in series.items()
            if values
        }
    return found


def _words(folder: Path, name: str, key: Key, steps: int) -> list[str]:
    task, preset, precision = key
    recipe, data = ("pair_recipe", "pairs") if task == "pair" else ("recipe", "data")
    files = [
        "--recipe",
        f"{FROZEN}/{recipe}.yaml",
        "--data",
        f"{FROZEN}/{data}",
        "--output",
        str(folder / name),
    ]
    values = [f"objective.preset={preset}", f"train.max_steps={steps}"]
    values += ["train.valid_every=20", f"train.save_every={STEPS * 5}"]
    values += SMALL if task == "denoise" else ()
    return [
        "launch/pretrain.py",
        "--deepspeed_config",
        str(folder / f"{precision}.json"),
        *files,
        "--set",
        *values,
    ]


def compare(found: dict[str, dict[str, list[float]]], golden: dict[str, dict[str, list[float]]]) -> None:
    """Each value found against the committed one of its step."""
    exact = bool(os.environ.get("JANUS_GOLDEN_EXACT"))
    for name, terms in found.items():
        # bfloat16 has three digits, and a step's rounding comes back in the ones after it.
        relative, absolute = (2e-2, 2e-3) if "bf16" in name else (2e-4, 1e-5)
        limits = {"rel": 1e-6, "abs": 1e-12} if exact else {"rel": relative, "abs": absolute}
        assert terms.keys() == golden[name].keys()
        for term, values in terms.items():
            assert values == pytest.approx(golden[name][term][: len(values)], **limits), f"{name}: {term}"


def test_the_first_losses_are_the_committed_ones(tmp_path: Path) -> None:
    compare(losses(tmp_path, QUICK_RUNS, QUICK), json.loads(GOLDEN.read_text()))


@pytest.mark.heavy
def test_two_hundred_losses_are_the_committed_ones(tmp_path: Path) -> None:
    found = losses(tmp_path, RUNS, STEPS)
    if os.environ.get("JANUS_UPDATE_GOLDEN"):
        rows = [
            f'"{name}": {{\n'
            + ",\n".join(f' "{term}": {json.dumps(values)}' for term, values in terms.items())
            + "\n}"
            for name, terms in found.items()
        ]
        GOLDEN.write_text("{\n" + ",\n".join(rows) + "\n}\n")
        pytest.skip(f"written anew: {GOLDEN}")
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    compare(found, golden)
