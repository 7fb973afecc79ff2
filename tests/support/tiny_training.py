"""Small training runs on the ranks of one job, one after the other; returns what they wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janus_ds.checkpoint.tensors import find_weights, read_weights
from janus_ds.config.deepspeed import TrainOptions
from janus_ds.observe import read_metrics
from janus_ds.parallel.topology import Topology
from janus_ds.train.build_run import run as run_training
from janus_ds.train.signals import StopSignals
from janus_ds.train.trainer import Outcome
from tests.support.tiny_data import TINY_RECIPE, make_tiny_data

NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0")


@dataclass(frozen=True)
class Run:
    """A training run: where it writes and what is special about it."""

    name: str
    stage: int = 2
    micro_batch: int | str = "auto"
    overrides: tuple[str, ...] = ()
    engine: dict[str, Any] = field(default_factory=dict)
    """Further keys of the DeepSpeed file."""
    mode: str | None = None


@dataclass(frozen=True)
class Result:
    """What a run left on disk."""

    outcome: Outcome
    lines: list[dict[str, Any]]
    weights: dict[str, Tensor]

    def series(self, key: str) -> list[float]:
        """One figure over the steps that have it."""
        return [line[key] for line in self.lines if key in line]


def allow_fp16() -> None:
    """On CPUs, of which DeepSpeed thinks that they cannot."""
    from deepspeed.accelerator import get_accelerator

    type(get_accelerator()).is_fp16_supported = lambda self: True


def assert_same_training(result: Result, reference: Result, steps: int) -> None:
    """Every step once, its losses equal but for the order of additions, and close weights."""
    assert [line["step"] for line in result.lines] == list(range(1, steps + 1))
    pairs = list(zip(result.lines, reference.lines, strict=True))
    # A run that was stopped has validated there as well.
    validated = [(ours, theirs) for ours, theirs in pairs if "valid/loss" in ours and "valid/loss" in theirs]
    assert validated or "valid/loss" not in reference.lines[-1]
    for key in ("loss", "ar", "nar", "aux", "length"):
        assert result.series(key) == pytest.approx(reference.series(key), rel=1e-5), key
        for ours, theirs in validated:
            assert ours[f"valid/{key}"] == pytest.approx(theirs[f"valid/{key}"], rel=1e-5), key
    assert result.series("grad_norm") == pytest.approx(reference.series("grad_norm"), rel=1e-4)
    for key in ("lr", "tokens_total", "samples_total"):
        assert result.series(key) == reference.series(key), key
    assert_close_weights(result, reference)


def assert_close_weights(result: Result, reference: Result) -> None:
    """Those that the reference has."""
    for name, value in reference.weights.items():
        torch.testing.assert_close(result.weights[name], value, rtol=1e-3, atol=5e-5, msg=name)


def assert_bitwise(result: Result, reference: Result) -> None:
    """Every figure and every weight, bit for bit."""
    for key in ("step", "loss", "ar", "grad_norm", "lr", "loss_scale", "skipped_steps"):
        assert result.series(key) == reference.series(key), key
    assert result.weights.keys() == reference.weights.keys()
    assert all(torch.equal(result.weights[name], value) for name, value in reference.weights.items())


def make_inputs(folder: Path) -> Path:
    """Recipe and data for :func:`train`; returns the folder."""
    make_tiny_data(folder / "data")
    (folder / "recipe.yaml").write_text(TINY_RECIPE)
    return folder


def train(folder: Path, topology: Topology, run: Run, recipe: Path | None = None) -> Result:
    """Train in this job, by the folder's recipe if no other is given, and read what was written."""
    config = folder / f"{run.name}-{topology.rank}.json"
    # By default ZeRO-3 keeps small parameters whole on every rank: all there are in a tiny model.
    partitioned = {"stage3_param_persistence_threshold": 0} if run.stage == 3 else {}
    zero = {"zero_optimization": {"stage": run.stage, **partitioned}}
    values = {**zero, "train_micro_batch_size_per_gpu": run.micro_batch, **run.engine}
    config.write_text(json.dumps(values))
    output = folder / run.name
    options = TrainOptions(
        deepspeed_config=config,
        recipe=recipe or folder / "recipe.yaml",
        overrides=(f"data.path={folder / 'data'}", *run.overrides),
        output=output,
        tensor_parallel=topology.tensor_size,
        mode=run.mode,
    )
    signals = StopSignals()
    signals.install()
    outcome = run_training(topology, options, signals)
    topology.barrier()
    return Result(outcome, read_metrics(output / "metrics.jsonl"), read_weights(find_weights(output)))
