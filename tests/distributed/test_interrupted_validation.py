"""A stop in the midst of a validation: saved at that step, and the next start does the validation."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from janus_ds.parallel.topology import Topology, init_topology
from janus_ds.train.engine import TrainingEngine
from janus_ds.train.trainer import Outcome
from janus_ds.train.validation import OutputDecoder
from tests.support.launch import run_ranks
from tests.support.tiny_pairs import TINY_PAIR_RECIPE
from tests.support.tiny_training import Result, Run, train

SHORT = (
    "train.max_steps=6",
    "train.valid_every=3",
    "train.save_every=5",
    "train.valid_bleu_samples=4",
    "data.batch=samples",
    "train.global_batch=8",
)
FIGURES = (
    "step",
    "loss",
    "ar",
    "grad_norm",
    "tokens_total",
    "valid/loss",
    "valid/bleu_ar",
    "valid/bleu_nar",
)


@contextmanager
def stopping(topology: Topology, rank: int, where: str, call: int) -> Iterator[None]:
    """SIGTERM to one rank alone at a call: of a forward of validation, or of the BLEU of one mode."""
    count = 0

    def strike() -> None:
        nonlocal count
        if topology.rank == rank and count == call:
            os.kill(os.getpid(), signal.SIGTERM)
        count += 1

    forward, score = TrainingEngine.forward, OutputDecoder._score

    def forward_(self: TrainingEngine, *arguments: Any) -> Any:
        if where == "losses" and not self._engine.module.training:
            strike()
        return forward(self, *arguments)

    def score_(self: OutputDecoder, *arguments: Any) -> Any:
        if where == "bleu":
            strike()
        return score(self, *arguments)

    TrainingEngine.forward = forward_  # type: ignore[method-assign]
    OutputDecoder._score = score_  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainingEngine.forward, OutputDecoder._score = forward, score  # type: ignore[method-assign]


def worker(folder: Path) -> dict[str, list[Result]]:
    topology = init_topology(1, process_group=True)
    results = {"unbroken": [train(folder, topology, Run("unbroken", 1, 4, SHORT))]}
    cases = {
        # The second forward of the first validation, on the rank that writes nothing.
        "losses": (1, "losses", 1),
        # The NAR translations of the first validation.
        "bleu": (0, "bleu", 1),
        # The AR translations of the last one: the run is at its last step, but not complete.
        "last": (0, "bleu", 2),
    }
    for name, (rank, where, call) in cases.items():
        run = Run(name, 1, 4, SHORT)
        with stopping(topology, rank, where, call):
            stopped = train(folder, topology, run)
        # Once more in the validation that the next start begins with.
        with stopping(topology, 0, "losses", 0):
            again = train(folder, topology, run)
        results[name] = [stopped, again, train(folder, topology, run)]
        if name == "last":
            results["once more"] = [train(folder, topology, run)]
    return results


@pytest.fixture(scope="module")
def results(tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(tiny_pairs, folder / "data")
    (folder / "recipe.yaml").write_text(TINY_PAIR_RECIPE)
    found: dict[str, list[Result]] = run_ranks(worker, 2, folder)[0]
    return found


def figures(result: Result) -> list[list[Any]]:
    return [[line.get(name) for name in FIGURES] for line in result.lines]


@pytest.mark.parametrize(("name", "step"), [("losses", 3), ("bleu", 3), ("last", 6)])
def test_an_interrupted_validation_is_done_by_the_next_start(
    results: dict[str, list[Result]], name: str, step: int
) -> None:
    unbroken = results["unbroken"][0]
    stopped, again, finished = results[name]
    assert [result.outcome for result in (stopped, again)] == [Outcome.STOPPED] * 2
    # The line of the step that was not validated is not there; all before are.
    assert figures(stopped) == figures(again) == figures(unbroken)[: step - 1]
    assert finished.outcome is Outcome.COMPLETE
    assert figures(finished) == figures(unbroken)
    assert unbroken.lines[step - 1]["valid/bleu_nar"] >= 0
    assert all(value.equal(finished.weights[key]) for key, value in unbroken.weights.items())


def test_a_start_of_the_finished_run_changes_nothing(results: dict[str, list[Result]]) -> None:
    (once_more,) = results["once more"]
    assert once_more.outcome is Outcome.COMPLETE
    assert once_more.lines == results["last"][-1].lines
