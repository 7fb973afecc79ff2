"""Losses of a short run against those committed: a change of numbers is never silent.

`make golden` writes them anew; do so only with a change that means to alter them, and say so in the
commit. The tolerance allows for another CPU's order of additions, not for another computation; dropout is
off, since random streams differ between CPUs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from janus_ds.parallel.topology import init_topology
from tests.support.launch import run_ranks
from tests.support.tiny_training import NO_DROPOUT, Run, make_inputs, train

GOLDEN = Path(__file__).with_name("losses.json")
TERMS = ("loss", "ar", "nar", "aux", "length", "kl_ar_aux", "kl_nar_aux", "grad_norm")
STEPS = 40
PRESETS = ("paper", "released", "ar", "cmlm")


def losses(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Losses of each preset's run by term."""
    topology = init_topology(1, process_group=True)
    found = {}
    for preset in PRESETS:
        steps = (f"train.max_steps={STEPS}", "train.valid_every=0")
        overrides = (f"objective.preset={preset}", *steps, *NO_DROPOUT)
        lines = train(folder, topology, Run(preset, stage=1, overrides=overrides)).lines
        found[preset] = {
            term: [float(f"{line[term]:.7g}") for line in lines] for term in TERMS if term in lines[0]
        }
    return found


def test_losses_are_the_committed_ones(tmp_path: Path) -> None:
    found = run_ranks(losses, 1, make_inputs(tmp_path))[0]
    if os.environ.get("JANUS_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        pytest.skip(f"written anew: {GOLDEN}")
    golden = json.loads(GOLDEN.read_text())
    assert found.keys() == golden.keys()
    for preset, terms in golden.items():
        for term, values in terms.items():
            assert len(values) == STEPS
            assert found[preset][term] == pytest.approx(values, rel=2e-4, abs=1e-5), f"{preset}: {term}"
